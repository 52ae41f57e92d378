"""Tests that bad data of every kind are refused with one DataError that says what is wrong."""

import gzip
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from capsjax import data
from capsjax.data import _dataset, _shipped_mnist
from data_files import IDX_FILES, digits, encode_idx, gzipped, write_folders, write_idx, write_npz


def assert_refused(*words: str, name: str = "mnist", data_dir=None) -> str:
    """Asserts that loading fails and that the one-line message contains the words; returns it."""
    with pytest.raises(data.DataError) as error:
        data.load(name, data_dir)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def test_a_refusal_is_a_value_error():
    assert issubclass(data.DataError, ValueError)


@pytest.mark.parametrize("damage", [lambda c: c[:5000], lambda c: c[:-1] + b"!", lambda c: b""])
def test_an_altered_or_truncated_archive_is_refused(tmp_path, monkeypatch, damage):
    path = tmp_path / "mnist.npz"
    path.write_bytes(damage(_shipped_mnist._ARCHIVE.read_bytes()))
    monkeypatch.setattr(_shipped_mnist, "_ARCHIVE", path)
    assert_refused("mnist.npz", "sha256", "install capsjax again")


def test_a_missing_archive_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_shipped_mnist, "_ARCHIVE", tmp_path / "mnist.npz")
    assert_refused("mnist.npz", "cannot be read", "install capsjax again")


@pytest.mark.parametrize("name", IDX_FILES)
@pytest.mark.parametrize("packed", [False, True], ids=["idx", "idx.gz"])
def test_a_truncated_idx_file_is_refused(tmp_path, name, packed):
    files = gzipped() if packed else IDX_FILES
    path = write_idx(tmp_path, digits(), files) / files[name]
    content = path.read_bytes()
    for length in (0, 3, 6, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert_refused(path.name, "download it again", data_dir=tmp_path)


def test_an_idx_file_with_extra_bytes_is_refused(tmp_path):
    path = write_idx(tmp_path, digits()) / IDX_FILES["x_test"]
    path.write_bytes(path.read_bytes() + b"\0")
    assert_refused(path.name, "got 78401", data_dir=tmp_path)


def test_garbage_in_place_of_a_gzip_file_is_refused(tmp_path):
    path = write_idx(tmp_path, digits(), gzipped()) / gzipped()["x_train"]
    path.write_bytes(b"<html>not found</html>")
    assert_refused(path.name, "gzip", data_dir=tmp_path)
    path.write_bytes(gzip.compress(b"<html>not found</html>"))
    assert_refused(path.name, "00 00 08 03", data_dir=tmp_path)
    content = bytearray(gzip.compress(encode_idx(digits()["x_train"])))
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    assert_refused(path.name, "gzip", data_dir=tmp_path)


def test_exchanged_images_and_labels_are_refused(tmp_path):
    exchanged = dict(zip(IDX_FILES, ("y_train", "x_train", "y_test", "x_test"), strict=True))
    write_idx(tmp_path, digits(), {exchanged[name]: file for name, file in IDX_FILES.items()})
    assert_refused("train-images", "00 00 08 03", "00 00 08 01", data_dir=tmp_path)


def test_an_idx_file_of_floats_is_refused(tmp_path):
    path = write_idx(tmp_path, digits()) / IDX_FILES["x_train"]
    path.write_bytes(b"\0\0\x0d\3" + path.read_bytes()[4:])
    assert_refused("train-images", "00 00 0d 03", data_dir=tmp_path)


def test_an_idx_pair_of_different_lengths_is_refused(tmp_path):
    arrays = digits()
    arrays["y_train"] = arrays["y_train"][:299]
    assert_refused("got 299 for 300 images", data_dir=write_idx(tmp_path, arrays))


@pytest.mark.parametrize("gone", IDX_FILES)
def test_a_missing_idx_file_is_named(tmp_path, gone):
    (write_idx(tmp_path, digits()) / IDX_FILES[gone]).unlink()
    assert_refused(IDX_FILES[gone], "missing", data_dir=tmp_path)


def test_an_idx_file_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    path = write_idx(tmp_path, digits()) / IDX_FILES["x_train"]
    path.unlink()
    path.symlink_to("/proc/self/mem")  # can be opened, but its first byte cannot be read
    assert_refused("cannot be read", data_dir=tmp_path)


@pytest.mark.parametrize("name", IDX_FILES)
def test_one_altered_pixel_or_label_of_mnist_is_refused(tmp_path, name):
    arrays = digits(60000, 10000)
    arrays[name] = arrays[name].copy()
    arrays[name].flat[0] ^= 1
    assert_refused(name, "sha256", "altered", data_dir=write_idx(tmp_path, arrays))


@pytest.mark.parametrize("write", [write_idx, lambda f, a: write_npz(f / "a.npz", a)])
@pytest.mark.parametrize("labels", ["y_train", "y_test"])
def test_labels_outside_the_classes_are_refused(tmp_path, write, labels):
    arrays = digits()
    arrays[labels] = arrays[labels].copy()
    arrays[labels][7] = 10
    assert_refused("number 7 is 10", "10 classes 0 to 9", data_dir=write(tmp_path, arrays))


def test_a_negative_label_is_refused(tmp_path):
    arrays = digits()
    arrays["y_test"] = arrays["y_test"].astype(np.int64) - 1
    assert_refused("-1", "outside", data_dir=write_npz(tmp_path / "a.npz", arrays))


def test_labels_that_skip_a_class_or_start_at_one_are_refused(tmp_path):
    arrays = digits()
    assert_refused(
        "none is 0", name="mine", data_dir=write_npz(tmp_path / "a.npz", add_one(arrays))
    )
    arrays["y_train"] = arrays["y_train"] * 2
    assert_refused("none is 1", name="mine", data_dir=write_npz(tmp_path / "b.npz", arrays))


def add_one(arrays):
    """Numbers the classes from 1."""
    return arrays | {name: arrays[name] + 1 for name in ("y_train", "y_test")}


def test_digits_under_the_name_of_emnist_letters_are_refused(tmp_path):
    assert_refused("outside", name="emnist/letters", data_dir=write_idx(tmp_path, digits()))


def test_an_emnist_folder_under_another_name_is_refused(tmp_path):
    files = {n: f"emnist-digits-{f.replace('t10k', 'test')}" for n, f in IDX_FILES.items()}
    write_idx(tmp_path, digits(), files)
    assert_refused("holds emnist/digits, not mnist", "--dataset emnist/digits", data_dir=tmp_path)


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.bool_])
def test_images_of_another_dtype_are_refused(tmp_path, dtype):
    arrays = digits()
    arrays["x_train"] = arrays["x_train"].astype(dtype)
    words = "must be uint8", f"got {np.dtype(dtype)}", "astype(np.uint8)"
    assert_refused(*words, data_dir=write_npz(tmp_path / "a.npz", arrays))


@pytest.mark.parametrize("labels", [np.eye(10)[digits()["y_train"]], digits()["y_train"] / 1.0])
def test_one_hot_and_float_labels_are_refused(tmp_path, labels):
    arrays = digits() | {"y_train": labels}
    assert_refused("class numbers", "float64", data_dir=write_npz(tmp_path / "a.npz", arrays))


def test_images_of_the_wrong_number_of_axes_are_refused(tmp_path):
    arrays = digits()
    arrays["x_test"] = arrays["x_test"].reshape(100, 784)
    assert_refused("[N,H,W]", "(100, 784)", data_dir=write_npz(tmp_path / "a.npz", arrays))


def test_training_and_test_images_of_different_shape_are_refused(tmp_path):
    arrays = digits()
    arrays["x_test"] = arrays["x_test"][:, :20]
    words = "(28, 28, 1)", "(20, 28, 1)"
    assert_refused(*words, data_dir=write_npz(tmp_path / "a.npz", arrays))


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_set_is_refused(tmp_path, split):
    arrays = digits()
    for name in (f"x_{split}", f"y_{split}"):
        arrays[name] = arrays[name][:0]
    assert_refused("empty", data_dir=write_npz(tmp_path / "a.npz", arrays))
    assert_refused("empty", data_dir=write_idx(tmp_path / "idx", arrays))


def test_an_npz_with_python_objects_is_refused_and_runs_no_code(tmp_path):
    class Command:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    objects = np.array([Command()], dtype=object)
    path = write_npz(tmp_path / "a.npz", digits() | {"y_train": objects})
    assert_refused("Python objects", data_dir=path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("length", [0, 10, 3000, -1, -30])
def test_a_truncated_npz_is_refused(tmp_path, length):
    path = write_npz(tmp_path / "a.npz", digits())
    path.write_bytes(path.read_bytes()[:length])
    assert_refused("a.npz", "damaged", data_dir=path)


def test_an_npz_with_a_flipped_byte_is_refused(tmp_path):
    path = write_npz(tmp_path / "a.npz", digits())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert_refused("a.npz", "damaged", data_dir=path)


def test_an_npz_without_one_of_its_arrays_is_refused(tmp_path):
    arrays = digits()
    del arrays["y_test"]
    assert_refused("y_test missing", data_dir=write_npz(tmp_path / "a.npz", arrays))


def test_a_single_array_in_place_of_an_npz_is_refused(tmp_path):
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, digits()["x_train"])
    assert_refused("a.npz", "np.savez", data_dir=tmp_path / "a.npz")


def test_class_names_that_are_not_a_list_are_refused(tmp_path):
    path = write_npz(tmp_path / "a.npz", digits(), class_names=np.array("cat"))
    assert_refused("class_names", data_dir=path)


def test_two_npz_files_in_a_folder_are_refused(tmp_path):
    for name in ("a.npz", "b.npz"):
        write_npz(tmp_path / name, digits())
    assert_refused("2 .npz files", data_dir=tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "images.tar").touch()
    assert_refused("images.tar", ".npz", data_dir=tmp_path / "images.tar")


@pytest.fixture
def folders(tmp_path):
    """Returns a folder with class folders of the first digits."""
    return write_folders(tmp_path, digits(100, 100))


def test_images_of_different_size_are_refused(folders):
    Image.new("L", (28, 30)).save(folders / "train" / "9" / "zz.png")
    words = "zz.png", "28 × 30", "00001.png", "28 × 28"
    assert_refused(*words, name="mine", data_dir=folders)


def test_a_class_in_only_one_split_is_named(folders):
    shutil.copytree(folders / "train" / "9", folders / "train" / "new")
    assert_refused("only in train/: new", "only in test/: none", data_dir=folders)
    (folders / "train" / "new").rename(folders / "test" / "new")
    assert_refused("only in train/: none", "only in test/: new", data_dir=folders)


@pytest.mark.parametrize("split", ["train", "test"])
def test_class_folders_without_one_of_the_splits_are_refused(folders, split):
    shutil.rmtree(folders / split)
    assert_refused(str(folders / split), data_dir=folders)
    (folders / split).mkdir()
    assert_refused(str(folders / split), "found none", data_dir=folders)


def test_an_empty_class_folder_is_refused(folders):
    for split in ("train", "test"):
        (folders / split / "x").mkdir()
    assert_refused("empty", "train/x", data_dir=folders)


@pytest.mark.parametrize("stray", ["notes.txt", "picture.bmp", "more"])
def test_anything_but_png_and_jpeg_among_the_images_is_refused(folders, stray):
    if stray == "more":
        (folders / "train" / "0" / stray).mkdir()
    else:
        (folders / "train" / "0" / stray).touch()
    assert_refused(stray, "convert it or move it away", data_dir=folders)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_damaged_image_is_refused(tmp_path, suffix):
    write_folders(tmp_path, digits(100, 100), suffix)
    path = next((tmp_path / "test" / "3").iterdir())
    content = path.read_bytes()
    for length in (0, 20, len(content) // 2):
        path.write_bytes(content[:length])
        assert_refused(str(path), "damaged", data_dir=tmp_path)


def test_transparent_images_and_those_of_16_bits_are_refused(folders):
    path = folders / "train" / "0" / "zz.png"
    transparent = Image.new("RGBA", (28, 28), (255, 0, 0, 100))
    transparent.save(path)
    assert_refused("zz.png", "transparent", data_dir=folders)
    transparent.quantize(2).save(path)
    assert_refused("zz.png", "transparent", data_dir=folders)
    Image.fromarray(np.zeros((28, 28), np.uint16)).save(path)
    assert_refused("zz.png", "8 bits", data_dir=folders)
    path.write_bytes(encode_png_of_16_bits(28, 28))
    assert_refused("zz.png", "8 bits per channel, got 16", data_dir=folders)


def encode_png_of_16_bits(height: int, width: int) -> bytes:
    """Returns a black RGB image of 16 bits per channel, which Pillow reads but does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = zlib.compress(bytes(height * (1 + 6 * width)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_the_home_of_nobody_is_no_folder():
    assert_refused("no such folder", data_dir="~nosuchuser/images")


def test_more_images_than_fit_in_memory_are_refused():
    with pytest.raises(data.DataError, match=r"931\.3 GiB, this machine has"):
        _dataset.allocate_images(1000, (1000, 1000, 1000), "here")


def test_an_empty_folder_is_answered_with_what_it_may_hold(tmp_path):
    words = "four IDX files", ".npz", "train/<class>/"
    assert_refused(*words, "--dataset mnist --download --data-dir", data_dir=tmp_path)
    assert_refused("does not exist", data_dir=tmp_path / "nowhere")


def test_a_missing_member_of_the_family_is_answered_with_the_command_that_downloads_it():
    command = "python -m capsjax.run --dataset fashion_mnist --download"
    message = assert_refused(name="fashion_mnist")
    assert message.endswith(command)
    command = "python -m capsjax.run --dataset emnist/letters --download"
    message = assert_refused(name="emnist/letters")
    assert message.endswith(command)


def test_another_name_of_tfds_is_answered_with_the_command_that_prepares_it(tmp_path):
    command = "tfds build cifar10 --file_format=array_record"
    message = assert_refused(name="cifar10")
    assert message.endswith(command)
    place = tmp_path / "my data"
    message = assert_refused(name="cifar10", data_dir=place)
    assert message.endswith(f"{command} --data_dir='{place}'")


def test_an_unknown_name_is_answered_with_a_suggestion():
    assert_refused("minst", "did you mean mnist", name="minst")
    assert_refused("my_own", "data_dir", name="my_own")
    assert_refused("emnist/letters", "emnist/balanced", name="emnist")


@pytest.mark.parametrize("name", ["", "../mnist", "/mnist", "mnist/", "a b", "mnist/.."])
def test_a_malformed_name_is_refused(name):
    assert_refused("name of a data set", name=name)
