"""Data sets that TFDS prepared, found in every folder and format that users have."""

import gzip
import io
import shutil
import struct
import subprocess
import sys
import zipfile
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.image_classification import mnist as stock

from capsjax import data
from capsjax.data import _tfrecord
from data_files import (
    IDX_FILES,
    as_tfrecord,
    assert_same_digits,
    crc32c,
    digits,
    gzipped,
    idx,
    pairs,
    serve,
    set_format,
    tfrecord,
    write_idx,
    write_npz,
)


def prepare(folder, arrays, served):
    """A data set that TFDS prepared from a server on this machine."""
    with serve(write_idx(served, arrays, gzipped())) as url, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stock.MNIST, "URL", url)
        data.load("mnist", folder, download=True)
    return folder


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    return prepare(folder / "tfds", digits(), folder / "served")


@pytest.fixture
def prepared(once, tmp_path):
    """TFDS's data_dir with the first digits of MNIST as array_record."""
    return shutil.copytree(once, tmp_path / "tfds")


@pytest.mark.parametrize("inner", ["", "mnist", "mnist/3.0.1"])
def test_a_prepared_data_set_is_found_from_all_three_of_its_folders(prepared, inner):
    dataset = data.load("mnist", prepared / inner)
    assert_same_digits(dataset, digits())
    assert str(prepared / "mnist" / "3.0.1") in dataset.source


def test_tfds_own_default_folder_is_used_without_being_named(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    dataset = data.load("mnist")
    assert_same_digits(dataset, digits())
    assert str(prepared) in dataset.source


def test_without_the_variable_the_default_folder_lies_at_home(prepared, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(prepared.parent))
    prepared.rename(prepared.parent / "tensorflow_datasets")
    assert_same_digits(data.load("mnist"), digits())


def test_tfds_itself_reads_what_capsjax_prepared(prepared):
    source: Any = tfds.data_source("mnist", data_dir=prepared)
    dataset = data.load("mnist", prepared)
    for split in ("train", "test"):
        examples = source[split].__getitems__(range(len(source[split])))
        images, labels = getattr(dataset, f"x_{split}"), getattr(dataset, f"y_{split}")
        assert np.array_equal(np.stack([example["image"] for example in examples]), images)
        assert [example["label"] for example in examples] == labels.tolist()


def test_a_tfrecord_data_set_is_read_without_tensorflow(prepared):
    expected = data.load("mnist", prepared)
    as_tfrecord(prepared / "mnist" / "3.0.1")
    dataset = data.load("mnist", prepared)
    assert "tensorflow" not in sys.modules
    assert np.array_equal(dataset.x_train, expected.x_train)
    assert np.array_equal(dataset.y_test, expected.y_test)


def test_the_newest_version_counts(prepared):
    folder = prepared / "mnist"
    shutil.copytree(folder / "3.0.1", folder / "3.0.0")
    shutil.copytree(folder / "3.0.1", folder / "10.0.0")
    (folder / "notes").mkdir()
    assert "10.0.0" in data.load("mnist", prepared).source


def test_any_other_image_classification_of_tfds_is_read_with_its_class_names(tmp_path, rng):
    features = tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "picture": tfds.features.Image(shape=(8, 6, 3)),
            "kind": tfds.features.ClassLabel(names=["cat", "dog"]),
        }
    )
    images = rng.integers(0, 256, (4, 8, 6, 3), np.uint8)
    write_tfds(tmp_path, "pets", features, ("picture", "kind"), images, [0, 1, 1, 0])
    dataset = data.load("pets", tmp_path)
    assert dataset.class_names == ("cat", "dog")
    assert pairs(dataset.x_test, dataset.y_test) == pairs(images, [0, 1, 1, 0])


def write_tfds(folder, name, features, keys, images, labels, splits=("train", "test")):
    """A data set of another kind, written with TFDS's own writer."""

    class Written(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=keys)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples() for split in splits}

        def _generate_examples(self):
            for number, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield number, {"id": str(number), keys[0]: png(image), keys[1]: label}

    Written.name = name
    tfds.disable_progress_bar()
    Written(data_dir=folder, file_format="array_record").download_and_prepare()
    tfds.enable_progress_bar()


def png(image):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_decoded_arrays_are_cached_and_the_cache_needs_no_tfds(prepared):
    expected = data.load("mnist", prepared)
    code = (
        "import sys; from capsjax import data; d = data.load('mnist', sys.argv[1]); "
        "print(d.x_train.sum(), 'tensorflow_datasets' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(prepared)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.stdout.split() == [str(expected.x_train.sum()), "False"], process.stderr


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "stale", "wrong"])
def test_a_cache_that_is_damaged_or_of_other_records_is_silently_made_anew(prepared, damage):
    folder = prepared / "mnist" / "3.0.1"
    path = folder / "capsjax_cache.npz"
    data.load("mnist", prepared)
    content = bytearray(path.read_bytes())
    cached = dict(np.load(path))
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "foreign":
        path.write_bytes(b"something else")
    elif damage == "stale":
        np.savez(
            path, **(cached | {"fingerprint": "of other records", "x_train": cached["x_test"]})
        )
    else:
        np.savez(path, **(cached | {"y_train": cached["y_train"] + 1}))
    assert_same_digits(data.load("mnist", prepared), digits())
    assert np.array_equal(np.load(path)["x_train"], cached["x_train"])
    assert np.array_equal(np.load(path)["y_train"], cached["y_train"])


def test_a_folder_that_takes_no_cache_is_read_all_the_same(prepared):
    folder = prepared / "mnist" / "3.0.1"
    (folder / "capsjax_cache.npz").unlink()
    (folder / "capsjax_cache.npz").mkdir()
    before = sorted(folder.iterdir())
    assert_same_digits(data.load("mnist", prepared), digits())
    assert sorted(folder.iterdir()) == before


def test_changed_records_are_decoded_again(prepared, tmp_path):
    data.load("mnist", prepared)
    other = prepare(tmp_path / "other", digits(40, 20), tmp_path / "served")
    folder = prepared / "mnist" / "3.0.1"
    for path in (other / "mnist" / "3.0.1").iterdir():
        if path.suffix != ".npz":
            shutil.copy(path, folder)
    assert_same_digits(data.load("mnist", prepared), digits(40, 20))


def refused(folder, *words, name="mnist"):
    with pytest.raises(data.DataError) as error:
        data.load(name, folder)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("kind", ["array_record", "tfrecord"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "gone"])
def test_damaged_records_are_refused_in_words(prepared, kind, damage):
    folder = prepared / "mnist" / "3.0.1"
    if kind == "tfrecord":
        as_tfrecord(folder)
    (path,) = folder.glob(f"mnist-train.{kind}-*")
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2 - 20] ^= 1
        path.write_bytes(content)
    elif damage == "emptied":
        path.touch()
    refused(prepared, str(folder), "prepare")


def test_records_fewer_than_promised_are_refused(prepared):
    folder = prepared / "mnist" / "3.0.1"
    as_tfrecord(folder)
    (path,) = folder.glob("mnist-train.tfrecord-*")
    records = _tfrecord.read(path)
    path.write_bytes(b"".join(map(tfrecord, records[:-1])))
    refused(prepared, "expected 300 examples in train, came 299")


def test_parquet_is_refused_and_never_read_in_part(prepared):
    folder = prepared / "mnist" / "3.0.1"
    (folder / "capsjax_cache.npz").unlink()
    set_format(folder, "parquet")
    refused(prepared, "parquet", "tfds build mnist", "--file_format=array_record")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}"])
def test_a_damaged_dataset_info_is_refused_in_words(prepared, content):
    (prepared / "mnist" / "3.0.1" / "dataset_info.json").write_bytes(content)
    refused(prepared, "dataset_info.json", "prepare the data set again")


def test_a_data_set_without_a_test_split_is_refused_in_words(tmp_path, rng):
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(8, 8, 1)),
            "label": tfds.features.ClassLabel(num_classes=2),
            "id": tfds.features.Text(),
        }
    )
    images = rng.integers(0, 256, (2, 8, 8), np.uint8)
    write_tfds(tmp_path, "half", features, ("image", "label"), images, [0, 1], splits=("train",))
    refused(tmp_path, "splits train and test, there are train", name="half")


def test_images_of_different_size_in_tfds_are_refused_with_both_sizes(tmp_path):
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 1)),
            "label": tfds.features.ClassLabel(num_classes=2),
            "id": tfds.features.Text(),
        }
    )
    images = [np.zeros((8, 8), np.uint8), np.zeros((9, 7), np.uint8)]
    write_tfds(tmp_path, "sizes", features, ("image", "label"), images, [0, 1])
    refused(tmp_path, "(8, 8, 1)", "(9, 7, 1)", name="sizes")


def test_what_is_no_image_classification_is_refused_in_words(tmp_path):
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(8, 8, 1)),
            "label": tfds.features.Text(),
            "id": tfds.features.Text(),
        }
    )
    write_tfds(tmp_path, "texts", features, ("image", "label"), [np.zeros((8, 8), np.uint8)], ["a"])
    refused(tmp_path, "one class each", "label (Text)", name="texts")


def emnist_zip(part, arrays):
    """EMNIST's archive of all its parts, with one of them in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, file in IDX_FILES.items():
            member = f"gzip/emnist-{part}-{file.replace('t10k', 'test')}.gz"
            archive.writestr(member, gzip.compress(idx(arrays[name]), 1))
    return buffer.getvalue()


def test_emnist_letters_from_tfds_are_upright_named_and_numbered_as_from_its_files(
    tmp_path, monkeypatch
):
    arrays = digits(26, 26)
    arrays["y_train"] = arrays["y_test"] = np.arange(1, 27, dtype=np.uint8)
    stored = arrays | {name: arrays[name].swapaxes(1, 2).copy() for name in ("x_train", "x_test")}
    served = tmp_path / "served"
    served.mkdir()
    (served / "gzip.zip").write_bytes(emnist_zip("letters", stored))
    with serve(served) as url:
        monkeypatch.setattr(stock.EMNIST, "URL", f"{url}gzip.zip")
        dataset = data.load("emnist/letters", tmp_path / "tfds", download=True)
    assert dataset.class_names == tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    expected = pairs(arrays["x_train"], arrays["y_train"] - 1)
    assert pairs(dataset.x_train, dataset.y_train) == expected
    source: Any = tfds.data_source("emnist/letters", data_dir=tmp_path / "tfds")
    assert sorted(source["train"][n]["label"] for n in range(26)) == list(range(1, 27))
    refused(tmp_path / "tfds", "emnist/letters", "name one of them", name="emnist")


def test_the_checksum_of_a_record_is_crc32c():
    assert crc32c(b"123456789") == 0xE3069283  # the check value of the CRC catalogue
    pieces = [b"123456789", b"", b"a", bytes(300)]
    data_, starts = np.frombuffer(b"".join(pieces), np.uint8), np.array([0, 9, 9, 10])
    sums = _tfrecord._masked_crc32c(data_, starts, np.array([len(piece) for piece in pieces]))
    expected = [struct.unpack("<I", tfrecord(piece)[-4:])[0] for piece in pieces]
    assert sums.tolist() == expected


@pytest.mark.slow
def test_every_source_gives_the_same_mnist(tmp_path):
    arrays = digits(60000, 10000)
    prepared = prepare(tmp_path / "tfds", arrays, tmp_path / "served")
    folder = prepared / "mnist" / "3.0.1"
    assert_same_digits(data.load("mnist", prepared), arrays)
    as_tfrecord(folder)  # and with it the cached arrays go
    assert_same_digits(data.load("mnist", prepared), arrays)
    assert_same_digits(data.load("mnist", tmp_path / "served"), arrays)
    assert_same_digits(data.load("mnist", write_npz(tmp_path / "a.npz", arrays)), arrays)
