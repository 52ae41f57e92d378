"""What bad data get: one DataError in words, whatever is wrong and wherever it lies."""

import gzip
import shutil

import numpy as np
import pytest
from PIL import Image

from capsjax import data
from capsjax.data import _archive, _dataset
from data_files import IDX_FILES, digits, gzipped, idx, write_folders, write_idx, write_npz


def refused(*words: str, name: str = "mnist", data_dir=None) -> str:
    """Loads what must be refused; every word has to stand in the message."""
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
def test_an_altered_or_truncated_archive(tmp_path, monkeypatch, damage):
    path = tmp_path / "mnist.npz"
    path.write_bytes(damage(_archive._ARCHIVE.read_bytes()))
    monkeypatch.setattr(_archive, "_ARCHIVE", path)
    refused("mnist.npz", "sha256", "install capsjax again")


def test_a_missing_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(_archive, "_ARCHIVE", tmp_path / "mnist.npz")
    refused("mnist.npz", "cannot be read", "install capsjax again")


@pytest.mark.parametrize("name", IDX_FILES)
@pytest.mark.parametrize("packed", [False, True], ids=["idx", "idx.gz"])
def test_a_truncated_idx_file(tmp_path, name, packed):
    files = gzipped() if packed else IDX_FILES
    path = write_idx(tmp_path, digits(), files) / files[name]
    content = path.read_bytes()
    for length in (0, 3, 6, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        refused(path.name, "anew", data_dir=tmp_path)


def test_an_idx_file_with_bytes_too_many(tmp_path):
    path = write_idx(tmp_path, digits()) / IDX_FILES["x_test"]
    path.write_bytes(path.read_bytes() + b"\0")
    refused(path.name, "78401 follow", data_dir=tmp_path)


def test_garbage_in_place_of_a_gzip_file(tmp_path):
    path = write_idx(tmp_path, digits(), gzipped()) / gzipped()["x_train"]
    path.write_bytes(b"<html>not found</html>")
    refused(path.name, "gzip", data_dir=tmp_path)
    path.write_bytes(gzip.compress(b"<html>not found</html>"))
    refused(path.name, "00 00 08 03", data_dir=tmp_path)
    content = bytearray(gzip.compress(idx(digits()["x_train"])))
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    refused(path.name, "gzip", data_dir=tmp_path)


def test_images_and_labels_exchanged(tmp_path):
    exchanged = dict(zip(IDX_FILES, ("y_train", "x_train", "y_test", "x_test"), strict=True))
    write_idx(tmp_path, digits(), {exchanged[name]: file for name, file in IDX_FILES.items()})
    refused("train-images", "00 00 08 03", "00 00 08 01", data_dir=tmp_path)


def test_an_idx_file_of_floats(tmp_path):
    path = write_idx(tmp_path, digits()) / IDX_FILES["x_train"]
    path.write_bytes(b"\0\0\x0d\3" + path.read_bytes()[4:])
    refused("train-images", "00 00 0d 03", data_dir=tmp_path)


def test_an_idx_pair_of_different_lengths(tmp_path):
    arrays = digits()
    arrays["y_train"] = arrays["y_train"][:299]
    refused("299 for 300 images", data_dir=write_idx(tmp_path, arrays))


@pytest.mark.parametrize("gone", IDX_FILES)
def test_an_idx_file_that_is_not_there(tmp_path, gone):
    (write_idx(tmp_path, digits()) / IDX_FILES[gone]).unlink()
    refused(IDX_FILES[gone], "missing", data_dir=tmp_path)


def test_an_idx_file_that_cannot_be_read(tmp_path, monkeypatch):
    path = write_idx(tmp_path, digits()) / IDX_FILES["x_train"]
    path.unlink()
    path.symlink_to("/proc/self/mem")  # opens, and fails at the first byte
    refused("cannot be read", data_dir=tmp_path)


@pytest.mark.parametrize("name", IDX_FILES)
def test_one_altered_pixel_or_label_in_the_files_of_mnist(tmp_path, name):
    arrays = digits(60000, 10000)
    arrays[name] = arrays[name].copy()
    arrays[name].flat[0] ^= 1
    refused(name, "sha256", "altered", data_dir=write_idx(tmp_path, arrays))


@pytest.mark.parametrize("write", [write_idx, lambda f, a: write_npz(f / "a.npz", a)])
@pytest.mark.parametrize("labels", ["y_train", "y_test"])
def test_labels_outside_the_classes(tmp_path, write, labels):
    arrays = digits()
    arrays[labels] = arrays[labels].copy()
    arrays[labels][7] = 10
    refused("number 7 is 10", "10 classes 0 to 9", data_dir=write(tmp_path, arrays))


def test_a_negative_label(tmp_path):
    arrays = digits()
    arrays["y_test"] = arrays["y_test"].astype(np.int64) - 1
    refused("-1", "outside", data_dir=write_npz(tmp_path / "a.npz", arrays))


def test_labels_that_skip_a_class_or_begin_at_one(tmp_path):
    arrays = digits()
    refused("none is 0", name="mine", data_dir=write_npz(tmp_path / "a.npz", _plus_one(arrays)))
    arrays["y_train"] = arrays["y_train"] * 2
    refused("none is 1", name="mine", data_dir=write_npz(tmp_path / "b.npz", arrays))


def _plus_one(arrays):
    return arrays | {name: arrays[name] + 1 for name in ("y_train", "y_test")}


def test_letters_that_are_not_emnists(tmp_path):
    refused("outside", name="emnist/letters", data_dir=write_idx(tmp_path, digits()))


def test_an_emnist_folder_under_another_name(tmp_path):
    files = {n: f"emnist-digits-{f.replace('t10k', 'test')}" for n, f in IDX_FILES.items()}
    write_idx(tmp_path, digits(), files)
    refused("holds emnist/digits, not mnist", "--dataset emnist/digits", data_dir=tmp_path)


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.bool_])
def test_images_of_another_dtype(tmp_path, dtype):
    arrays = digits()
    arrays["x_train"] = arrays["x_train"].astype(dtype)
    words = "must be uint8", f"came as {np.dtype(dtype)}", "astype(np.uint8)"
    refused(*words, data_dir=write_npz(tmp_path / "a.npz", arrays))


@pytest.mark.parametrize("labels", [np.eye(10)[digits()["y_train"]], digits()["y_train"] / 1.0])
def test_one_hot_and_float_labels(tmp_path, labels):
    arrays = digits() | {"y_train": labels}
    refused("class numbers", "float64", data_dir=write_npz(tmp_path / "a.npz", arrays))


def test_images_of_the_wrong_number_of_axes(tmp_path):
    arrays = digits()
    arrays["x_test"] = arrays["x_test"].reshape(100, 784)
    refused("[N,H,W]", "(100, 784)", data_dir=write_npz(tmp_path / "a.npz", arrays))


def test_training_and_test_images_of_different_shape(tmp_path):
    arrays = digits()
    arrays["x_test"] = arrays["x_test"][:, :20]
    words = "(28, 28, 1)", "(20, 28, 1)"
    refused(*words, data_dir=write_npz(tmp_path / "a.npz", arrays))


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_set(tmp_path, split):
    arrays = digits()
    for name in (f"x_{split}", f"y_{split}"):
        arrays[name] = arrays[name][:0]
    refused("empty", data_dir=write_npz(tmp_path / "a.npz", arrays))
    refused("empty", data_dir=write_idx(tmp_path / "idx", arrays))


def test_an_npz_with_python_objects(tmp_path):
    class Command:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    objects = np.array([Command()], dtype=object)
    path = write_npz(tmp_path / "a.npz", digits() | {"y_train": objects})
    refused("Python objects", data_dir=path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("length", [0, 10, 3000, -1, -30])
def test_a_truncated_npz(tmp_path, length):
    path = write_npz(tmp_path / "a.npz", digits())
    path.write_bytes(path.read_bytes()[:length])
    refused("a.npz", "damaged", data_dir=path)


def test_an_npz_with_a_flipped_byte(tmp_path):
    path = write_npz(tmp_path / "a.npz", digits())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused("a.npz", "damaged", data_dir=path)


def test_an_npz_without_one_of_its_arrays(tmp_path):
    arrays = digits()
    del arrays["y_test"]
    refused("y_test missing", data_dir=write_npz(tmp_path / "a.npz", arrays))


def test_a_single_array_in_place_of_an_npz(tmp_path):
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, digits()["x_train"])
    refused("a.npz", "np.savez", data_dir=tmp_path / "a.npz")


def test_class_names_that_are_no_list(tmp_path):
    path = write_npz(tmp_path / "a.npz", digits(), class_names=np.array("cat"))
    refused("class_names", data_dir=path)


def test_two_npz_files_in_a_folder(tmp_path):
    for name in ("a.npz", "b.npz"):
        write_npz(tmp_path / name, digits())
    refused("2 .npz files", data_dir=tmp_path)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "images.tar").touch()
    refused("images.tar", ".npz", data_dir=tmp_path / "images.tar")


@pytest.fixture
def folders(tmp_path):
    return write_folders(tmp_path, digits(100, 100))


def test_images_of_different_size(folders):
    Image.new("L", (28, 30)).save(folders / "train" / "9" / "zz.png")
    words = "zz.png", "28 × 30", "00001.png", "28 × 28"
    refused(*words, name="mine", data_dir=folders)


def test_a_class_that_only_one_split_has(folders):
    shutil.copytree(folders / "train" / "9", folders / "train" / "new")
    refused("only in train/: new", "only in test/: none", data_dir=folders)
    (folders / "train" / "new").rename(folders / "test" / "new")
    refused("only in train/: none", "only in test/: new", data_dir=folders)


@pytest.mark.parametrize("split", ["train", "test"])
def test_class_folders_without_one_of_the_splits(folders, split):
    shutil.rmtree(folders / split)
    refused(str(folders / split), data_dir=folders)
    (folders / split).mkdir()
    refused(str(folders / split), "found none", data_dir=folders)


def test_an_empty_class_folder(folders):
    for split in ("train", "test"):
        (folders / split / "x").mkdir()
    refused("empty", "train/x", data_dir=folders)


@pytest.mark.parametrize("stray", ["notes.txt", "picture.bmp", "more"])
def test_what_is_no_png_or_jpeg_among_the_images(folders, stray):
    if stray == "more":
        (folders / "train" / "0" / stray).mkdir()
    else:
        (folders / "train" / "0" / stray).touch()
    refused(stray, "convert it or move it away", data_dir=folders)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_damaged_image(tmp_path, suffix):
    write_folders(tmp_path, digits(100, 100), suffix)
    path = next((tmp_path / "test" / "3").iterdir())
    content = path.read_bytes()
    for length in (0, 20, len(content) // 2):
        path.write_bytes(content[:length])
        refused(str(path), "damaged", data_dir=tmp_path)


def test_transparent_images_and_those_of_16_bits(folders):
    path = folders / "train" / "0" / "zz.png"
    transparent = Image.new("RGBA", (28, 28), (255, 0, 0, 100))
    transparent.save(path)
    refused("zz.png", "transparent", data_dir=folders)
    transparent.quantize(2).save(path)
    refused("zz.png", "transparent", data_dir=folders)
    Image.fromarray(np.zeros((28, 28), np.uint16)).save(path)
    refused("zz.png", "8 bits", data_dir=folders)


def test_more_images_than_memory_holds():
    with pytest.raises(data.DataError, match=r"931\.3 GiB, this machine has"):
        _dataset.empty_images(1000, (1000, 1000, 1000), "here")


def test_a_folder_with_nothing_in_it(tmp_path):
    words = "four IDX files", ".npz", "train/<class>/"
    refused(*words, "--dataset mnist --download --data-dir", data_dir=tmp_path)
    refused("does not exist", data_dir=tmp_path / "nowhere")


def test_a_name_of_the_family_that_is_nowhere():
    command = "python experiments/mnist.py --dataset fashion_mnist --download"
    assert refused(name="fashion_mnist").endswith(command)
    command = "python experiments/mnist.py --dataset emnist/letters --download"
    assert refused(name="emnist/letters").endswith(command)


def test_a_name_that_needs_tfds_own_command_line(tmp_path):
    command = "tfds build cifar10 --file_format=array_record"
    assert refused(name="cifar10").endswith(command)
    place = tmp_path / "my data"
    assert refused(name="cifar10", data_dir=place).endswith(f"{command} --data_dir='{place}'")


def test_an_unknown_name():
    refused("minst", "did you mean mnist", name="minst")
    refused("my_own", "data_dir", name="my_own")
    refused("emnist/letters", "emnist/balanced", name="emnist")


@pytest.mark.parametrize("name", ["", "../mnist", "/mnist", "mnist/", "a b", "mnist/.."])
def test_what_is_no_name(name):
    refused("name of a data set", name=name)
