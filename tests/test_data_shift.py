"""Tests the augmentation that shifts each image by its own few pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from capsjax.data import shift


def move(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """Shifts one image pixel by pixel."""
    height, width, _ = image.shape
    result = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                result[row, column] = image[row - down, column - right]
    return result


@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(3, 5, 3, 1), (3, 4, 4, 3)]),
    dtype=st.sampled_from([np.uint8, np.float32]),
    limit=st.integers(0, 2),
)
def test_every_image_is_shifted_by_at_most_max_pixels_and_filled_with_zeros(
    seed, shape, dtype, limit
):
    images = np.random.default_rng(seed).integers(1, 256, shape).astype(dtype)
    result = np.asarray(shift(jax.random.key(seed), jnp.asarray(images), limit))
    assert result.dtype == dtype
    offsets = range(-limit, limit + 1)
    for image, found in zip(images, result, strict=True):
        candidates = [move(image, down, right) for down in offsets for right in offsets]
        assert any(np.array_equal(candidate, found) for candidate in candidates)


def test_all_offsets_are_equally_frequent_and_each_image_has_its_own():
    images = jnp.zeros((10_000, 5, 5, 1), jnp.uint8).at[:, 2, 2].set(1)
    result = shift(jax.random.key(0), images, 2)
    landed = np.asarray(jnp.argmax(result.reshape(len(images), -1), axis=1))
    counts = np.bincount(landed, minlength=25)
    assert counts.sum() == 10_000
    assert np.all(np.abs(counts - 400) < 100)  # five standard deviations
    assert np.mean(landed[1:] == landed[:-1]) < 0.06


def test_a_shift_of_zero_pixels_is_the_identity():
    images = jnp.arange(2 * 9, dtype=jnp.uint8).reshape(2, 3, 3, 1)
    assert np.array_equal(shift(jax.random.key(0), images, 0), images)


def test_the_result_depends_on_the_key_and_not_on_jit(rng):
    images = jnp.asarray(rng.integers(0, 256, (64, 28, 28, 1), np.uint8))
    eager = shift(jax.random.key(1), images, 2)
    jitted = jax.jit(shift, static_argnums=2)(jax.random.key(1), images, 2)
    assert np.array_equal(eager, jitted)
    assert not np.array_equal(eager, shift(jax.random.key(2), images, 2))


def test_sharding_the_batch_changes_nothing_and_moves_no_image_between_devices(rng):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    images = jnp.asarray(rng.integers(0, 256, (64, 28, 28, 1), np.uint8))
    split = NamedSharding(mesh, PartitionSpec("data"))
    step = jax.jit(shift, static_argnums=2, out_shardings=split)
    sharded = step(jax.random.key(1), jax.device_put(images, split), 2)
    assert {shard.data.shape for shard in sharded.addressable_shards} == {(8, 28, 28, 1)}
    assert np.array_equal(sharded, shift(jax.random.key(1), images, 2))
    lowered = step.lower(jax.random.key(1), jax.device_put(images, split), 2)
    program = str(lowered.compile().as_text())
    assert "all-gather" not in program
    assert "all-to-all" not in program


@pytest.mark.parametrize("max_pixels", [-1, 20, 28, 100])
def test_a_negative_shift_and_one_as_large_as_the_image_are_refused(max_pixels):
    with pytest.raises(ValueError, match=f"from 0 to 19 for images of 20 × 28, got {max_pixels}"):
        shift(jax.random.key(0), jnp.zeros((2, 20, 28, 1)), max_pixels)


def test_a_single_image_without_a_batch_axis_is_refused():
    with pytest.raises(ValueError, match=r"images \[B, H, W, C\], got shape \(28, 28, 1\)"):
        shift(jax.random.key(0), jnp.zeros((28, 28, 1)), 2)
