"""Tests that data sets prepared by TFDS are read from every folder and format that users have."""

import io
import os
import shutil
import stat
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.image_classification import mnist as stock

from capsjax import data
from capsjax.data import _cache, _prepare, _tfrecord
from data_files import (
    assert_same_digits,
    compute_crc32c,
    convert_to_tfrecord,
    digits,
    encode_tfrecord,
    gzipped,
    serve,
    set_format,
    sort_pairs,
    write_emnist_zip,
    write_idx,
    write_npz,
)


def prepare(folder, arrays, served):
    """Has TFDS prepare the arrays as MNIST, downloaded from a server on this machine."""
    with serve(write_idx(served, arrays, gzipped())) as url, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stock.MNIST, "URL", url)
        data.load("mnist", folder, download=True)
    return folder


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Returns a data_dir of TFDS that tests copy and do not change."""
    folder = tmp_path_factory.mktemp("prepared")
    return prepare(folder / "tfds", digits(), folder / "served")


@pytest.fixture
def prepared(pristine, tmp_path):
    """Returns a data_dir of TFDS with the first digits of MNIST as array_record."""
    return shutil.copytree(pristine, tmp_path / "tfds")


@pytest.mark.parametrize("inner", ["", "mnist", "mnist/3.0.1"])
def test_a_prepared_data_set_is_found_from_all_three_of_its_folders(prepared, inner):
    dataset = data.load("mnist", prepared / inner)
    assert_same_digits(dataset, digits())
    assert str(prepared / "mnist" / "3.0.1") in dataset.source


@pytest.mark.parametrize("inner", ["mnist", "mnist/3.0.1"])
def test_a_data_set_of_another_name_is_refused(prepared, inner):
    with pytest.raises(data.DataError, match="expected fashion_mnist, but TFDS prepared mnist"):
        data.load("fashion_mnist", prepared / inner)


def test_a_data_set_that_another_process_put_in_place_first_is_taken(prepared, tmp_path):
    again = shutil.copytree(prepared, tmp_path / "again")
    _prepare._move(again, prepared)
    assert_same_digits(data.load("mnist", prepared), digits())


def test_the_default_folder_of_tfds_is_used_if_none_is_given(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    dataset = data.load("mnist")
    assert_same_digits(dataset, digits())
    assert str(prepared) in dataset.source


def test_the_default_folder_of_tfds_is_in_the_home_folder(prepared, monkeypatch):
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
    convert_to_tfrecord(prepared / "mnist" / "3.0.1")
    dataset = data.load("mnist", prepared)
    assert "tensorflow" not in sys.modules
    assert np.array_equal(dataset.x_train, expected.x_train)
    assert np.array_equal(dataset.y_test, expected.y_test)


def test_the_highest_version_is_read(prepared):
    folder = prepared / "mnist"
    shutil.copytree(folder / "3.0.1", folder / "3.0.0")
    shutil.copytree(folder / "3.0.1", folder / "10.0.0")
    (folder / "notes").mkdir()
    assert "10.0.0" in data.load("mnist", prepared).source


def test_any_other_classification_data_set_is_read_with_its_class_names(tmp_path, rng):
    picture = tfds.features.Image(shape=(8, 6, 3))
    kind = tfds.features.ClassLabel(names=["cat", "dog"])
    images = rng.integers(0, 256, (4, 8, 6, 3), np.uint8)
    write_tfds(tmp_path, "pets", {"picture": picture, "kind": kind}, images, [0, 1, 1, 0])
    dataset = data.load("pets", tmp_path)
    assert dataset.class_names == ("cat", "dog")
    assert sort_pairs(dataset.x_test, dataset.y_test) == sort_pairs(images, [0, 1, 1, 0])


def write_tfds(folder, name, features, images, labels, splits=("train", "test")):
    """Writes images and their labels, features of any name and kind, with TFDS's own writer."""
    keys = tuple(features)
    features = tfds.features.FeaturesDict({"id": tfds.features.Text(), **features})

    class Written(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=keys)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples() for split in splits}

        def _generate_examples(self):
            for number, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield number, {"id": str(number), keys[0]: encode_png(image), keys[1]: label}

    Written.name = name
    tfds.disable_progress_bar()
    Written(data_dir=folder, file_format="array_record").download_and_prepare()
    tfds.enable_progress_bar()


def encode_png(image):
    """Returns the image as the content of a PNG file."""
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
def test_a_cache_that_is_damaged_or_of_other_records_is_silently_rebuilt(prepared, damage):
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


def test_a_data_set_whose_cache_cannot_be_written_is_still_read(prepared):
    folder = prepared / "mnist" / "3.0.1"
    (folder / "capsjax_cache.npz").unlink()
    (folder / "capsjax_cache.npz").mkdir()
    before = sorted(folder.iterdir())
    assert_same_digits(data.load("mnist", prepared), digits())
    assert sorted(folder.iterdir()) == before


def test_other_users_may_read_the_cache_whatever_the_umask(prepared):
    path = prepared / "mnist" / "3.0.1" / "capsjax_cache.npz"
    path.unlink()
    umask = os.umask(0o077)
    try:
        data.load("mnist", prepared)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_caches_written_at_the_same_time_leave_one_complete_file(prepared):
    dataset = data.load("mnist", prepared)
    folder = prepared / "mnist" / "3.0.1"
    before = sorted(folder.iterdir())
    # Threads share a process id, and so may processes in two containers: their drafts collide.
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: _cache.write(folder, dataset), range(40)))
    assert sorted(folder.iterdir()) == before
    cached = _cache.read(folder, "the cache")
    assert cached is not None
    assert_same_digits(cached, digits())


def test_changed_records_are_decoded_again(prepared, tmp_path):
    data.load("mnist", prepared)
    other = prepare(tmp_path / "other", digits(40, 20), tmp_path / "served")
    folder = prepared / "mnist" / "3.0.1"
    for path in (other / "mnist" / "3.0.1").iterdir():
        if path.suffix != ".npz":
            shutil.copy(path, folder)
    assert_same_digits(data.load("mnist", prepared), digits(40, 20))


def assert_refused(folder, *words, name="mnist"):
    """Asserts that loading fails and that the message contains the words."""
    with pytest.raises(data.DataError) as error:
        data.load(name, folder)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("kind", ["array_record", "tfrecord"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "gone"])
def test_damaged_records_are_refused(prepared, kind, damage):
    folder = prepared / "mnist" / "3.0.1"
    if kind == "tfrecord":
        convert_to_tfrecord(folder)
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
    assert_refused(prepared, str(folder), "prepare")


def test_too_few_records_are_refused(prepared):
    folder = prepared / "mnist" / "3.0.1"
    convert_to_tfrecord(folder)
    (path,) = folder.glob("mnist-train.tfrecord-*")
    records = _tfrecord.read(path)
    path.write_bytes(b"".join(map(encode_tfrecord, records[:-1])))
    assert_refused(prepared, "expected 300 examples in train, got 299")


def test_parquet_is_refused_with_the_command_for_array_record(prepared):
    folder = prepared / "mnist" / "3.0.1"
    (folder / "capsjax_cache.npz").unlink()
    set_format(folder, "parquet")
    assert_refused(prepared, "parquet", "tfds build mnist", "--file_format=array_record")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}"])
def test_a_damaged_dataset_info_is_refused(prepared, content):
    (prepared / "mnist" / "3.0.1" / "dataset_info.json").write_bytes(content)
    assert_refused(prepared, "dataset_info.json", "prepare the data set again")


def test_a_data_set_without_a_test_split_is_refused(tmp_path, rng):
    features = {
        "image": tfds.features.Image(shape=(8, 8, 1)),
        "label": tfds.features.ClassLabel(num_classes=2),
    }
    images = rng.integers(0, 256, (2, 8, 8), np.uint8)
    write_tfds(tmp_path, "half", features, images, [0, 1], splits=("train",))
    assert_refused(tmp_path, "splits train and test, got train", name="half")


def test_images_of_different_size_in_tfds_are_refused_with_both_sizes(tmp_path):
    features = {
        "image": tfds.features.Image(shape=(None, None, 1)),
        "label": tfds.features.ClassLabel(num_classes=2),
    }
    images = [np.zeros((8, 8), np.uint8), np.zeros((9, 7), np.uint8)]
    write_tfds(tmp_path, "sizes", features, images, [0, 1])
    assert_refused(tmp_path, "(8, 8, 1)", "(9, 7, 1)", name="sizes")


def test_a_data_set_without_class_labels_is_refused(tmp_path):
    features = {
        "image": tfds.features.Image(shape=(8, 8, 1)),
        "label": tfds.features.Text(),
    }
    write_tfds(tmp_path, "texts", features, [np.zeros((8, 8), np.uint8)], ["a"])
    assert_refused(tmp_path, "one class each", "label (Text)", name="texts")


def test_emnist_letters_from_tfds_are_upright_named_and_numbered_as_from_its_files(
    tmp_path, monkeypatch
):
    arrays = digits(26, 26)
    arrays["y_train"] = arrays["y_test"] = np.arange(1, 27, dtype=np.uint8)
    stored = arrays | {name: arrays[name].swapaxes(1, 2).copy() for name in ("x_train", "x_test")}
    archive = write_emnist_zip(tmp_path / "served" / "gzip.zip", "letters", stored)
    with serve(archive.parent) as url:
        monkeypatch.setattr(stock.EMNIST, "URL", f"{url}gzip.zip")
        dataset = data.load("emnist/letters", tmp_path / "tfds", download=True)
    assert dataset.class_names == tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    expected = sort_pairs(arrays["x_train"], arrays["y_train"] - 1)
    assert sort_pairs(dataset.x_train, dataset.y_train) == expected
    source: Any = tfds.data_source("emnist/letters", data_dir=tmp_path / "tfds")
    assert sorted(source["train"][n]["label"] for n in range(26)) == list(range(1, 27))
    assert_refused(tmp_path / "tfds", "emnist/letters", "name one of them", name="emnist")


def test_the_checksum_of_a_record_is_crc32c():
    assert compute_crc32c(b"123456789") == 0xE3069283  # the check value in the CRC catalogue
    pieces = [b"123456789", b"", b"a", bytes(300)]
    joined, starts = np.frombuffer(b"".join(pieces), np.uint8), np.array([0, 9, 9, 10])
    lengths = np.array([len(piece) for piece in pieces])
    sums = _tfrecord._compute_masked_crc32c(joined, starts, lengths)
    expected = [struct.unpack("<I", encode_tfrecord(piece)[-4:])[0] for piece in pieces]
    assert sums.tolist() == expected


@pytest.mark.slow
def test_every_source_gives_the_same_digits(tmp_path):
    arrays = digits(3700, 1300)  # more than are decoded at a time
    prepared = prepare(tmp_path / "tfds", arrays, tmp_path / "served")
    folder = prepared / "mnist" / "3.0.1"
    assert_same_digits(data.load("mnist", prepared), arrays)
    convert_to_tfrecord(folder)  # which also removes the cache
    assert_same_digits(data.load("mnist", prepared), arrays)
    assert_same_digits(data.load("mnist", tmp_path / "served"), arrays)
    assert_same_digits(data.load("mnist", write_npz(tmp_path / "a.npz", arrays)), arrays)
