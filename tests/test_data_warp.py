"""Affine and elastic augmentation: one bilinear warp per image."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from capsjax.data import shift, warp
from capsjax.data._warp import _draw_fields, _warp_image
from capsjax.sharding import make_mesh

KEY = jax.random.key(0)
LIMITS = {"rotation": 20.0, "shear": 15.0, "zoom": 0.2, "shift": 2.5, "elastic": 1.0}


def jit_warp(key, images, **limits):
    """Warps as a step does; one by one the operations would take seconds to compile."""
    return jax.jit(partial(warp, **limits))(key, images)


def warp_by_hand(image, theta, phi, zoom_rows, zoom_columns, down, right, field=None):
    """The definition in the docstring, pixel by pixel in float64; angles in degrees."""
    height, width, _ = image.shape
    theta, phi = math.radians(theta), math.radians(phi)
    cos, sin, tan = math.cos(theta), math.sin(theta), math.tan(phi)
    warped = np.zeros(image.shape)
    for p in range(height):
        for q in range(width):
            r, c = p - (height - 1) / 2, q - (width - 1) / 2
            r, c = r / (1 + zoom_rows), c / (1 + zoom_columns)
            r, c = r, c + tan * r
            r, c = cos * r - sin * c, sin * r + cos * c
            r, c = r + (height - 1) / 2 - down, c + (width - 1) / 2 - right
            if field is not None:
                r, c = r + field[p, q, 0], c + field[p, q, 1]
            for row in (math.floor(r), math.floor(r) + 1):
                for column in (math.floor(c), math.floor(c) + 1):
                    if 0 <= row < height and 0 <= column < width:
                        weight = (1 - abs(r - row)) * (1 - abs(c - column))
                        warped[p, q] += weight * image[row, column]
    return warped


@pytest.mark.parametrize(
    "draws",
    [
        (0, 0, 0, 0, 0, 0),
        (20, 0, 0, 0, 0, 0),
        (0, -15, 0, 0, 0, 0),
        (0, 0, 0.2, -0.2, 0, 0),
        (0, 0, 0, 0, 1.25, -2.5),
        (-12, 7, -0.1, 0.15, -0.6, 9.5),
        (0, 0, 0, 0, 20, 0),
    ],
)
def test_an_image_is_warped_as_the_definition_says(rng, draws):
    image = rng.uniform(size=(9, 7, 2)).astype(np.float32)
    warped = jax.jit(_warp_image)(image, jnp.array(draws, jnp.float32))
    np.testing.assert_allclose(warped, warp_by_hand(image, *draws), atol=2e-5)


def test_an_image_is_distorted_as_the_definition_says(rng):
    image = rng.uniform(size=(9, 7, 2)).astype(np.float32)
    field = rng.normal(size=(9, 7, 2)).astype(np.float32)
    draws = (-12, 7, -0.1, 0.15, -0.6, 0.5)
    warped = jax.jit(_warp_image)(image, jnp.array(draws, jnp.float32), field)
    np.testing.assert_allclose(warped, warp_by_hand(image, *draws, field), atol=2e-5)


def test_displacements_have_their_deviation_everywhere_and_are_smooth():
    fields = np.asarray(jax.jit(partial(_draw_fields, shape=(4000, 28, 20, 1)))(KEY))
    assert fields.shape == (4000, 28, 20, 2)
    np.testing.assert_allclose(fields.std(0), 1, atol=0.05)
    np.testing.assert_allclose(fields.mean(0), 0, atol=0.07)
    for size, along_rows in ((28, fields), (20, fields.swapaxes(1, 2))):
        for distance in (size // 7, size // 2):
            covariance = (along_rows[:, distance:] * along_rows[:, :-distance]).mean(0)
            sevenths = 7 * distance / size
            np.testing.assert_allclose(covariance, math.exp(-(sevenths**2) / 4), atol=0.08)
    # Both numbers of a displacement are independent of each other.
    assert np.abs((fields[..., 0] * fields[..., 1]).mean(0)).max() < 0.08


def test_the_field_is_as_large_as_asked_for_and_does_not_change_the_affine_draws(rng):
    images = rng.uniform(size=(3, 12, 12, 1)).astype(np.float32)

    @jax.jit
    def bend(images):
        field = 1.5 * _draw_fields(jax.random.fold_in(KEY, 1), images.shape)
        return jax.vmap(_warp_image)(images, jnp.zeros((3, 6)), field)

    np.testing.assert_allclose(jit_warp(KEY, images, elastic=1.5), bend(images), atol=5e-6)
    affine = {name: limit for name, limit in LIMITS.items() if name != "elastic"}
    nearly = jit_warp(KEY, images, **affine, elastic=1e-6)
    np.testing.assert_allclose(nearly, jit_warp(KEY, images, **affine), atol=1e-4)


def test_without_limits_nothing_changes(rng):
    images = rng.uniform(size=(3, 8, 9, 1)).astype(np.float32)
    np.testing.assert_allclose(jit_warp(KEY, images), images, atol=1e-6)


def test_every_image_is_drawn_by_itself_and_anew_for_every_key(rng):
    images = np.broadcast_to(rng.uniform(size=(1, 12, 12, 1)).astype(np.float32), (6, 12, 12, 1))
    warped = np.asarray(jit_warp(KEY, images, **LIMITS))
    assert len(np.unique(warped.reshape(6, -1), axis=0)) == 6
    other = jit_warp(jax.random.key(1), images, **LIMITS)
    assert np.abs(warped - other).max(axis=(1, 2, 3)).min() > 0.01


@pytest.mark.parametrize("name", LIMITS)
def test_each_limit_moves_the_image(rng, name):
    images = rng.uniform(size=(4, 12, 12, 1)).astype(np.float32)
    moved = jit_warp(KEY, images, **{name: LIMITS[name]})
    assert np.abs(moved - images).max() > 0.05


def test_a_blob_stays_within_the_limit_of_the_shift():
    images = np.zeros((500, 21, 21, 1), np.float32)
    images[:, 10, 10] = 1
    warped = np.asarray(jit_warp(KEY, images, shift=2.5))[..., 0]
    rows = (warped.sum(2) * np.arange(21)[None]).sum(1) - 10
    assert 2.3 < np.abs(rows).max() <= 2.5001
    assert abs(rows.mean()) < 0.2
    np.testing.assert_allclose(warped.sum((1, 2)), 1, atol=1e-5)


def test_integers_become_floats_and_floats_keep_their_dtype(rng, dtype):
    images = rng.integers(0, 256, (2, 6, 6, 1), np.uint8)
    assert jit_warp(KEY, images, **LIMITS).dtype == jnp.float32
    assert jit_warp(KEY, jnp.asarray(images, dtype), **LIMITS).dtype == dtype


def test_eight_devices_warp_as_one(rng):
    images = rng.uniform(size=(16, 8, 8, 1)).astype(np.float32)
    split = NamedSharding(make_mesh(16, 8), PartitionSpec("data"))
    warped = jax.jit(partial(warp, **LIMITS), out_shardings=split)(
        KEY, jax.device_put(images, split)
    )
    # Positions of up to 8 pixels are rounded by 5e-7, each as the compiler orders its operations.
    np.testing.assert_allclose(warped, jit_warp(KEY, images, **LIMITS), atol=5e-6)


@pytest.mark.parametrize(
    ("shape", "limits", "message"),
    [
        ((8, 8, 1), {}, r"images \[B, H, W, C\], got shape \[8, 8, 1\]"),
        ((2, 8, 8, 1), {"rotation": -1}, "rotation from 0 to 180, got -1"),
        ((2, 8, 8, 1), {"zoom": 1}, "zoom from 0 to 0.99, got 1"),
        ((2, 8, 8, 1), {"elastic": 9}, "elastic from 0 to 8, got 9"),
        ((2, 8, 8, 1), {"shift": math.nan}, "shift from 0 to 8, got nan"),
    ],
)
def test_what_cannot_be_warped_is_an_error_in_words(shape, limits, message):
    with pytest.raises(ValueError, match=message):
        warp(KEY, jnp.zeros(shape), **limits)


@pytest.mark.slow
def test_a_whole_shift_agrees_with_the_exact_one():
    image = np.arange(48, dtype=np.float32).reshape(1, 6, 8, 1)
    exact = {np.asarray(shift(jax.random.key(seed), image, 1)).tobytes() for seed in range(40)}
    down = _warp_image(image[0], jnp.array([0, 0, 0, 0, 1, 0], jnp.float32))
    assert np.asarray(down)[None].tobytes() in exact
