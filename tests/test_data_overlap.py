"""Pairs of overlapping images: which ones, where they lie, and what their sum is."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsjax.data import overlap
from capsjax.sharding import make_mesh, replicate_images

LABELS = np.array([0, 1, 2, 0, 1, 2, 2, 2])


@pytest.fixture
def images(rng):
    return rng.integers(1, 256, (len(LABELS), 3, 4, 1), np.uint8)


def find(digit, images, shift, canvas):
    """Returns the number of the image that lies on a canvas, and by how much it is shifted."""
    height, width = images.shape[1:3]
    middle = (canvas - height) // 2, (canvas - width) // 2
    for n, down, right in itertools.product(range(len(images)), *[range(-shift, shift + 1)] * 2):
        expected = np.zeros_like(digit)
        top, left = middle[0] + down, middle[1] + right
        expected[top : top + height, left : left + width] = images[n]
        if np.array_equal(digit, expected):
            return n, down, right
    raise AssertionError("no image of the data set")


@pytest.mark.slow
@given(st.integers(0, 2**31 - 1))
def test_a_pair_is_a_base_and_a_top_of_another_class_each_shifted_by_itself(seed):
    images = np.random.default_rng(0).integers(1, 256, (len(LABELS), 3, 4, 1), np.uint8)
    indices = np.arange(len(LABELS))[::-1]
    pairs = jax.device_get(
        overlap(jax.random.key(seed), images, LABELS, indices, shift=2, canvas=9)
    )
    assert pairs.images.shape == (8, 9, 9, 1)
    assert pairs.images.dtype == np.uint8
    for image, labels, digits, index in zip(*pairs, indices, strict=True):
        (base, *_), (top, *_) = (find(digit, images, 2, 9) for digit in digits)
        assert base == index
        assert labels.tolist() == [LABELS[base], LABELS[top]]
        assert labels[0] != labels[1]
        np.testing.assert_array_equal(image, digits.astype(int).sum(0).clip(max=255))


@pytest.mark.slow
def test_every_other_class_image_is_as_likely_and_so_is_every_shift(images):
    many = np.zeros(6000, int)  # image 0, whose class images 0 and 3 have
    pairs = jax.device_get(overlap(jax.random.key(1), images, LABELS, many, shift=1, canvas=6))
    found = [find(digit, images, 1, 6) for digit in pairs.digits[:, 1]]
    counts = np.bincount([n for n, *_ in found], minlength=len(LABELS))
    assert counts[[0, 3]].tolist() == [0, 0]
    assert (abs(counts[[1, 2, 4, 5, 6, 7]] - 1000) < 5 * np.sqrt(1000 * 5 / 6)).all()
    moves = np.unique([move for _, *move in found], axis=0, return_counts=True)[1]
    assert (abs(moves - 6000 / 9) < 5 * np.sqrt(6000 / 9)).all()
    assert len(moves) == 9


def test_tops_are_drawn_from_the_pool_alone(images):
    pool = np.array([3, 0, 5])
    many = np.zeros(100, int)
    pairs = jax.device_get(overlap(jax.random.key(0), images, LABELS, many, pool=pool, canvas=12))
    assert {find(digit, images, 4, 12)[0] for digit in pairs.digits[:, 1]} == {5}


def test_a_pool_without_another_class_gives_its_first_image(images):
    indices = np.array([0, 3])
    pairs = overlap(jax.random.key(0), images, LABELS, indices, pool=indices, canvas=12)
    np.testing.assert_array_equal(pairs.labels, np.zeros((2, 2)))


def test_floats_are_clipped_at_one_and_the_result_does_not_depend_on_jit(images):
    key, indices = jax.random.key(0), jnp.arange(8)
    floats = jnp.asarray(images, jnp.float32) / 255
    ours = overlap(key, floats, LABELS, indices, canvas=12)
    whole = overlap(key, images, LABELS, indices, canvas=12)
    np.testing.assert_allclose(ours.images, whole.images / 255, atol=1e-6)
    jitted = jax.jit(lambda images: overlap(key, images, LABELS, indices, canvas=12))
    for pixels in (jnp.asarray(images), replicate_images(make_mesh(8, 1), images)):
        np.testing.assert_array_equal(jitted(pixels).images, whole.images)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": np.zeros((8, 3, 4))}, r"expected images \[N, H, W, C\].*got \[8, 3, 4\]"),
        ({"labels": np.zeros((8, 10))}, r"labels \[N\].*\[8, 10\]"),
        ({"indices": 3}, r"indices \[B\], got .* and \[\]"),
        ({"pool": []}, r"a pool \[P\] of an image or more, got \[0\]"),
        ({"canvas": 11}, "images of 3 × 4, shifted by up to 4 pixels, do not fit into 11 × 11"),
        ({"shift": -1}, "shifted by up to -1 pixels"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(images, change, words):
    arguments = {"images": images, "labels": LABELS, "indices": np.arange(8), "canvas": 12} | change
    with pytest.raises(ValueError, match=words):
        overlap(jax.random.key(0), **arguments)
