"""Tests that every source of a data set gives the same digits."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from capsjax import data
from data_files import (
    IDX_FILES,
    assert_same_digits,
    digits,
    encode_idx,
    gzipped,
    load_mnist,
    write_folders,
    write_idx,
    write_npz,
)

ORIGINAL_SHA256 = {
    "x_train": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "y_train": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "x_test": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "y_test": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
DOTTED = {name: file.replace("-idx", ".idx") for name, file in IDX_FILES.items()}


def test_the_shipped_archive_is_mnist_bit_for_bit():
    arrays = digits(60000, 10000)
    found = {name: hashlib.sha256(encode_idx(array)).hexdigest() for name, array in arrays.items()}
    assert found == ORIGINAL_SHA256


def test_mnist_needs_no_network_and_no_folder():
    dataset = load_mnist()
    assert dataset.x_train.shape == (60000, 28, 28, 1)
    assert dataset.x_test.shape == (10000, 28, 28, 1)
    assert dataset.x_train.dtype == dataset.x_test.dtype == np.uint8
    assert dataset.y_train.dtype == dataset.y_test.dtype == np.int32
    assert dataset.image_shape == (28, 28, 1)
    assert dataset.num_classes == 10
    assert "archive" in dataset.source
    assert "60000" in repr(dataset)


def test_loading_the_shipped_archive_imports_no_heavy_library():
    code = "import capsjax, sys; capsjax.data.load('mnist'); print(*sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "capsjax.data" in process.stdout.split(), process.stderr
    heavy = {"tensorflow", "tensorflow_datasets", "matplotlib", "orbax"}
    assert not heavy & set(process.stdout.split())


@pytest.mark.parametrize("files", [IDX_FILES, gzipped(), DOTTED, gzipped(DOTTED)])
def test_idx_files_give_the_same_digits_in_order(tmp_path, files):
    arrays = digits(60000, 10000) if files is IDX_FILES else digits()
    dataset = data.load("mnist", write_idx(tmp_path, arrays, files))
    for name, array in arrays.items():
        assert np.array_equal(np.squeeze(getattr(dataset, name)), array)
    assert dataset.class_names == tuple("0123456789")
    assert str(tmp_path) in dataset.source


@pytest.mark.parametrize("give_file", [True, False], ids=["its path", "its folder"])
def test_an_npz_gives_the_same_digits_in_order(tmp_path, give_file):
    path = write_npz(tmp_path / "mine.npz", digits())
    dataset = data.load("mnist", path if give_file else tmp_path)
    for name, array in digits().items():
        assert np.array_equal(np.squeeze(getattr(dataset, name)), array)
    assert dataset.image_shape == (28, 28, 1)


def test_the_whole_of_mnist_in_an_npz_as_keras_ships_it_is_accepted(tmp_path):
    arrays = digits(60000, 10000)
    dataset = data.load("mnist", write_npz(tmp_path / "mnist.npz", arrays))
    assert_same_digits(dataset, arrays)


def test_class_folders_of_png_give_the_same_digits(tmp_path):
    dataset = data.load("mine", write_folders(tmp_path, digits(1800, 200)))
    assert_same_digits(dataset, digits(1800, 200))
    expected = np.argsort(digits(1800, 200)["y_train"], kind="stable")
    assert np.array_equal(dataset.x_train[..., 0], digits(1800, 200)["x_train"][expected])


def test_an_npz_may_hold_colour_images_of_any_size_and_the_names_of_its_classes(tmp_path, rng):
    images = rng.integers(0, 256, (6, 20, 30, 3), np.uint8)
    labels = np.array([[0], [1], [2], [0], [1], [2]])
    arrays = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    plain = data.load("mine", write_npz(tmp_path / "plain.npz", arrays))
    assert np.array_equal(plain.x_train, images)
    assert plain.y_train.tolist() == [0, 1, 2, 0, 1, 2]
    assert plain.class_names == ("0", "1", "2")
    names = np.array(["cat", "dog", "owl"])
    named = data.load("mine", write_npz(tmp_path / "named.npz", arrays, class_names=names))
    assert named.class_names == ("cat", "dog", "owl")
    in_bytes = write_npz(tmp_path / "bytes.npz", arrays, class_names=names.astype(bytes))
    assert data.load("mine", in_bytes).class_names == ("cat", "dog", "owl")


def test_own_images_under_the_default_name_keep_their_number_of_classes(tmp_path):
    arrays = digits(47, 47)
    arrays["x_train"] = arrays["x_test"] = arrays["x_train"][:, :20]
    arrays["y_train"] = arrays["y_test"] = np.arange(47)
    assert data.load("mnist", write_npz(tmp_path / "mine.npz", arrays)).num_classes == 47


def test_a_subset_of_mnist_that_lacks_a_digit_still_has_ten_classes(tmp_path):
    arrays = digits(5, 5)
    assert set(arrays["y_train"]) != set(range(10))
    assert data.load("mnist", write_idx(tmp_path, arrays)).num_classes == 10


def test_fashion_mnist_and_kmnist_files_get_their_class_names(tmp_path):
    write_idx(tmp_path, digits(), gzipped())
    assert data.load("fashion_mnist", tmp_path).class_names[9] == "Ankle boot"
    assert data.load("kmnist", tmp_path).class_names[0] == "o"


def test_emnist_letters_are_upright_numbered_from_zero_and_named_a_to_z(tmp_path):
    arrays = digits(26, 26)
    arrays["y_train"] = arrays["y_test"] = np.arange(1, 27, dtype=np.uint8)
    stored = arrays | {name: arrays[name].swapaxes(1, 2).copy() for name in ("x_train", "x_test")}
    files = {n: f"emnist-letters-{f.replace('t10k', 'test')}.gz" for n, f in IDX_FILES.items()}
    dataset = data.load("emnist/letters", write_idx(tmp_path, stored, files))
    assert np.array_equal(dataset.x_train[..., 0], arrays["x_train"])
    assert dataset.y_train.tolist() == list(range(26))
    assert dataset.class_names == tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


@pytest.mark.parametrize(
    ("part", "classes"),
    [("byclass", 62), ("bymerge", 47), ("balanced", 47), ("digits", 10), ("mnist", 10)],
)
def test_the_other_parts_of_emnist_have_their_classes(tmp_path, part, classes):
    arrays = digits(classes, classes)
    arrays["y_train"] = arrays["y_test"] = np.arange(classes, dtype=np.uint8)
    files = {n: f"emnist-{part}-{f.replace('t10k', 'test')}" for n, f in IDX_FILES.items()}
    dataset = data.load(f"emnist/{part}", write_idx(tmp_path, arrays, files))
    assert dataset.y_train.tolist() == list(range(classes))
    assert len(set(dataset.class_names)) == classes
    assert dataset.class_names[:10] == tuple("0123456789")


def save_image(path, image):
    """Saves an image, and creates its folder first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.mark.parametrize("suffix", ["png", "PNG", "jpg", "JPG", "jpeg", "JPEG"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_class_folders_may_hold_png_and_jpeg_in_grey_and_colour(tmp_path, suffix, mode):
    channels = {"L": 1, "RGB": 3}[mode]
    pixels = np.full((2, 2, 12, 20, channels), 60, np.uint8)
    pixels[:, 1] += 100
    for split, classes in zip(("train", "test"), pixels, strict=True):
        for name, image in zip(("b", "a"), classes, strict=True):
            save_image(tmp_path / split / name / f"0.{suffix}", Image.fromarray(np.squeeze(image)))
    dataset = data.load("mine", tmp_path)
    assert dataset.class_names == ("a", "b")
    assert dataset.image_shape == (12, 20, channels)
    assert np.abs(dataset.x_train[0].astype(int) - 160).max() <= 2
    assert np.abs(dataset.x_test[1].astype(int) - 60).max() <= 2
    assert dataset.y_train.tolist() == [0, 1]


def write_classes(tmp_path, *images):
    """Writes one class folder per image, the same in both splits."""
    for split in ("train", "test"):
        for number, image in enumerate(images):
            save_image(tmp_path / split / str(number) / "image.png", image)
    return tmp_path


def test_a_mixture_of_grey_and_colour_becomes_rgb(tmp_path):
    grey, red = Image.new("L", (4, 4), 77), Image.new("RGB", (4, 4), (200, 0, 0))
    dataset = data.load("mine", write_classes(tmp_path, grey, red))
    assert dataset.image_shape == (4, 4, 3)
    assert dataset.x_train[0, 0, 0].tolist() == [77, 77, 77]
    assert dataset.x_train[1, 0, 0].tolist() == [200, 0, 0]


def test_palette_images_are_grey_if_their_colours_are_and_opaque_alpha_is_dropped(tmp_path, rng):
    pixels = rng.integers(0, 256, (8, 8), np.uint8)
    grey = Image.fromarray(pixels)
    palette = Image.fromarray(pixels).convert("P")
    dataset = data.load("mine", write_classes(tmp_path / "grey", palette, grey.convert("LA")))
    assert dataset.image_shape == (8, 8, 1)
    assert np.array_equal(dataset.x_train[0, ..., 0], pixels)
    assert np.array_equal(dataset.x_train[1, ..., 0], pixels)
    colour = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    dataset = data.load("mine", write_classes(tmp_path / "colour", colour.convert("RGBA")))
    assert np.array_equal(dataset.x_train[0], np.asarray(colour))
    quantised = colour.quantize(4)
    dataset = data.load("mine", write_classes(tmp_path / "palette", quantised))
    assert np.array_equal(dataset.x_train[0], np.asarray(quantised.convert("RGB")))


def test_a_photograph_is_rotated_as_its_exif_orientation_says(tmp_path):
    pixels = np.zeros((8, 16), np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90° clockwise
    for split in ("train", "test"):
        path = tmp_path / split / "a" / "photo.jpg"
        path.parent.mkdir(parents=True)
        Image.fromarray(pixels).save(path, exif=exif)
    dataset = data.load("mine", tmp_path)
    assert dataset.image_shape == (16, 8, 1)
    assert dataset.x_train[0, :7].min() > 200
    assert dataset.x_train[0, 9:].max() < 50


def test_hidden_files_and_those_of_file_managers_are_ignored(tmp_path):
    write_classes(tmp_path, Image.new("L", (4, 4)))
    for clutter in ("train/.DS_Store", "train/0/.hidden.png", "train/0/Thumbs.db"):
        (tmp_path / clutter).write_bytes(b"not an image")
    assert len(data.load("mine", tmp_path).x_train) == 1
