"""smallNORB: its own files, windows of its images, and a run from the command line."""

import dataclasses
import gzip
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import small_norb
from capsjax import data
from capsjax.networks import CapsNetConfig
from small_norb import SMALL_NORB, Windows
from tiny_run import read_json, run_command

TRAIN = "smallnorb-5x46789x9x18x6x2x96x96-training"
TEST = "smallnorb-5x01235x9x18x6x2x96x96-testing"
MAGIC = {np.dtype(np.uint8): 0x1E3D4C55, np.dtype(np.int32): 0x1E3D4C54}


def encode(array: np.ndarray) -> bytes:
    """Writes an array in smallNORB's format, at least three lengths in its header."""
    lengths = [*array.shape, *[1] * (3 - array.ndim)]
    head = struct.pack(f"<{2 + len(lengths)}i", MAGIC[array.dtype], array.ndim, *lengths)
    return head + array.astype(array.dtype.newbyteorder("<")).tobytes()


def make_arrays(number: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "dat": rng.integers(0, 256, (number, 2, 96, 96), np.uint8),
        "cat": (np.arange(number) % 5).astype(np.int32),
        "info": rng.integers(0, 9, (number, 4), np.int32),
    }


def write_small_norb(folder: Path, train: int = 20, test: int = 10, packed: bool = False) -> Path:
    """Writes its six files, and returns the folder."""
    for prefix, number in ((TRAIN, train), (TEST, test)):
        for kind, array in make_arrays(number, number).items():
            content = encode(array)
            path = folder / f"{prefix}-{kind}.mat{'.gz' * packed}"
            path.write_bytes(gzip.compress(content) if packed else content)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_both_views_become_channels_and_two_by_two_pixels_one(tmp_path, packed):
    dataset = data.load("smallnorb", write_small_norb(tmp_path, packed=packed))
    assert dataset.class_names == ("animal", "human", "airplane", "truck", "car")
    for images, labels, number in (
        (dataset.x_train, dataset.y_train, 20),
        (dataset.x_test, dataset.y_test, 10),
    ):
        arrays = make_arrays(number, number)
        assert images.shape == (number, 48, 48, 2)
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(labels, arrays["cat"])
        for n, row, column, view in ((0, 0, 0, 0), (3, 47, 5, 1), (number - 1, 20, 47, 0)):
            block = arrays["dat"][n, view, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert abs(images[n, row, column, view] - block.mean()) <= 0.5


def test_images_are_read_in_parts(tmp_path, monkeypatch):
    whole = data.load("smallnorb", write_small_norb(tmp_path))
    monkeypatch.setattr("capsjax.data._small_norb._AT_ONCE", 7)
    np.testing.assert_array_equal(data.load("smallnorb", tmp_path).x_train, whole.x_train)


def test_a_missing_file_is_named(tmp_path):
    (write_small_norb(tmp_path) / f"{TEST}-cat.mat").unlink()
    with pytest.raises(data.DataError, match=f"got 3; add the missing {TEST}-cat.mat"):
        data.load("smallnorb", tmp_path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c: c[:10], "ends too early"),
        (lambda c: c[:-1], "ends too early"),
        (lambda c: c + b"\0", "holds more than its header says"),
        (lambda c: b"\0" + c[1:], "expected a file that begins with 55 4c 3d 1e 04 00 00 00, got"),
        (lambda c: c[:8] + struct.pack("<i", -3) + c[12:], "axes of length 1 or more"),
        (lambda c: encode(np.zeros((9, 2, 64, 64), np.uint8)), "pairs of images of 96 × 96"),
        (lambda c: encode(np.zeros(5, np.int32)), "not the file of the images"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_file_is_refused_in_words(tmp_path, damage, words, packed):
    path = write_small_norb(tmp_path, packed=packed) / f"{TRAIN}-dat.mat{'.gz' * packed}"
    unpack, pack = (gzip.decompress, gzip.compress) if packed else (bytes, bytes)
    path.write_bytes(pack(damage(unpack(path.read_bytes()))))
    with pytest.raises(data.DataError, match=words):
        data.load("smallnorb", tmp_path)


@pytest.mark.parametrize("damage", [lambda c: c[:5000], lambda c: c[:50] + b"!!" + c[52:]])
def test_a_damaged_gzip_file_is_refused_in_words(tmp_path, damage):
    path = write_small_norb(tmp_path, packed=True) / f"{TRAIN}-dat.mat.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(data.DataError, match="download it again"):
        data.load("smallnorb", tmp_path)


@given(seed=st.integers(0, 2**31), shape=st.sampled_from([(3, 6, 5, 2), (2, 4, 7, 1)]))
def test_a_window_is_cut_out_of_each_image(seed, shape):
    images = np.random.default_rng(seed).permutation(np.prod(shape)).reshape(shape)
    for key in (jax.random.key(seed), None):
        windows = np.asarray(data.crop(key, jnp.asarray(images), 3))
        for image, window in zip(images, windows, strict=True):
            top, left = np.argwhere(image[..., 0] == window[0, 0, 0])[0]
            np.testing.assert_array_equal(window, image[top : top + 3, left : left + 3])
            if key is None:
                assert (top, left) == ((shape[1] - 3) // 2, (shape[2] - 3) // 2)


def test_all_windows_are_equally_frequent():
    image = jnp.arange(12).reshape(1, 3, 4, 1)
    images = jnp.broadcast_to(image, (6000, 3, 4, 1))
    corners = np.asarray(jax.jit(data.crop, static_argnums=2)(jax.random.key(0), images, 2))
    counts = np.bincount(corners[:, 0, 0, 0], minlength=12)
    assert np.flatnonzero(counts).tolist() == [0, 1, 2, 4, 5, 6]
    assert (abs(counts[counts > 0] - 1000) < 150).all()


@pytest.mark.parametrize("size", [0, 5])
def test_a_window_that_does_not_fit_is_refused(size):
    with pytest.raises(ValueError, match=f"crop: expected a size from 1 to 4 .* got {size}"):
        data.crop(None, jnp.zeros((1, 4, 6, 1)), size)
    with pytest.raises(ValueError, match="expected images"):
        data.crop(None, jnp.zeros((4, 6, 1)), 2)


def test_training_sees_windows_at_random_and_tests_the_middle():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 48, 48, 2), np.uint8))
    labels, task = jnp.arange(4), Windows(0.5)
    tested = task.test_batch(images, labels, jnp.arange(4))
    np.testing.assert_allclose(tested.images, images[:, 8:40, 8:40] / 255, rtol=1e-6)
    first, second = (
        task.train_batch(jax.random.key(n), images, labels, jnp.arange(4)) for n in range(2)
    )
    assert first.images.shape == (4, 32, 32, 2)
    np.testing.assert_array_equal(first.images, first.targets)
    assert (first.images != second.images).any()


@pytest.mark.slow
def test_a_run_trains_on_its_files_and_draws_windows(tmp_path):
    small = CapsNetConfig(channels=4, kernel_size=9, types=1, dim_class=4, hidden=(8,))
    training = dataclasses.replace(small_norb.SMALL_NORB.presets["seed"].training, epochs=1)
    preset = dataclasses.replace(SMALL_NORB.presets["seed"], network=small, training=training)
    experiment = dataclasses.replace(SMALL_NORB, presets={"seed": preset})
    flags = {"data_dir": write_small_norb(tmp_path), "devices": 1, "batch_size": 10}
    run = run_command(experiment, save_dir=tmp_path / "run", pictures=True, **flags)
    assert run.status == 0, run.err
    assert "smallNORB: its files in" in run.out
    assert "of 48×48×2 in 5 classes" in run.out
    assert read_json(run.folder)["image_shape"] == [32, 32, 2]
    assert (run.folder / "reconstructions.png").is_file()
    refused = run_command(experiment, shift_pixels=2, save_dir=tmp_path / "other", **flags)
    assert "--shift-pixels must be 0: only the windows move, got 2" in refused.err
