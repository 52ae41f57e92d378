"""Writes real digits in the forms that users keep, and serves files from this machine."""

import contextlib
import functools
import gzip
import http.server
import json
import struct
import threading
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from capsjax import data
from capsjax.data import _download

IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


@functools.cache
def load_mnist() -> data.Dataset:
    """Loads the shipped archive once for all tests."""
    return data.load("mnist")


def digits(train: int = 300, test: int = 100) -> dict[str, np.ndarray]:
    """Returns the first digits of MNIST as in its files: uint8, without a channel axis."""
    full = load_mnist()
    return {
        "x_train": full.x_train[:train, ..., 0],
        "y_train": full.y_train[:train].astype(np.uint8),
        "x_test": full.x_test[:test, ..., 0],
        "y_test": full.y_test[:test].astype(np.uint8),
    }


def encode_idx(array: np.ndarray) -> bytes:
    """Returns the content of an IDX file with an array of uint8."""
    head = bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">i", n) for n in array.shape)
    return head + array.tobytes()


def write_idx(
    folder: Path, arrays: dict[str, np.ndarray], files: dict[str, str] = IDX_FILES
) -> Path:
    """Writes four IDX files, those gzipped whose name ends in .gz."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        content = encode_idx(arrays[name])
        packed = gzip.compress(content, 1) if file.endswith(".gz") else content
        (folder / file).write_bytes(packed)
    return folder


def gzipped(files: dict[str, str] = IDX_FILES) -> dict[str, str]:
    """Returns the names of the gzipped files."""
    return {name: f"{file}.gz" for name, file in files.items()}


def write_emnist_zip(path: Path, part: str, arrays: dict[str, np.ndarray]) -> Path:
    """Writes the archive of all parts of EMNIST, here with only one of them in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, file in IDX_FILES.items():
            member = f"gzip/emnist-{part}-{file.replace('t10k', 'test')}.gz"
            archive.writestr(member, gzip.compress(encode_idx(arrays[name]), 1))
    return path


def write_npz(path: Path, arrays: dict[str, np.ndarray], **more: np.ndarray) -> Path:
    """Writes an `.npz` archive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    everything: dict[str, Any] = arrays | more
    np.savez(path, **everything)
    return path


def write_folders(folder: Path, arrays: dict[str, np.ndarray], suffix: str = "png") -> Path:
    """Writes class folders named after the labels."""
    for split in ("train", "test"):
        pairs = zip(arrays[f"x_{split}"], arrays[f"y_{split}"], strict=True)
        for number, (image, label) in enumerate(pairs):
            path = folder / split / str(label) / f"{number:05}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return folder


def convert_to_tfrecord(prepared: Path) -> Path:
    """Rewrites an array_record data set as the tfrecord that `tfds.load` would have written."""
    for path in prepared.glob("*.array_record-*"):
        reader = ArrayRecordReader(str(path))
        records = reader.read_all()
        reader.close()
        target = path.with_name(path.name.replace("array_record", "tfrecord"))
        target.write_bytes(b"".join(map(encode_tfrecord, records)))
        path.unlink()
    (prepared / "capsjax_cache.npz").unlink()
    return set_format(prepared, "tfrecord")


def set_format(prepared: Path, file_format: str) -> Path:
    """Changes the format that a prepared data set claims to have."""
    path = prepared / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fileFormat": file_format}))
    return prepared


def encode_tfrecord(record: bytes) -> bytes:
    """Returns a record as it stands in a TFRecord file."""
    length = struct.pack("<Q", len(record))
    return length + _compute_checksum(length) + record + _compute_checksum(record)


def compute_crc32c(content: bytes) -> int:
    """Computes CRC-32C byte by byte."""
    value = 0xFFFFFFFF
    for byte in content:
        value = (value >> 8) ^ _compute_crc32c_of_byte((value ^ byte) & 0xFF)
    return value ^ 0xFFFFFFFF


@functools.cache
def _compute_crc32c_of_byte(value: int) -> int:
    """Returns one entry of the table for CRC-32C."""
    for _ in range(8):
        value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value


def _compute_checksum(content: bytes) -> bytes:
    """Returns the masked CRC-32C that TFRecord stores."""
    value = compute_crc32c(content)
    return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def sort_pairs(images: np.ndarray, labels: Iterable[int]) -> list[bytes]:
    """Returns each image with its label, in an order that does not depend on the source."""
    rows = zip(images, labels, strict=True)
    return sorted(bytes([int(label)]) + image.tobytes() for image, label in rows)


def assert_same_digits(dataset: data.Dataset, arrays: dict[str, np.ndarray]) -> None:
    """Asserts that images and labels are the same, in any order."""
    for split in ("train", "test"):
        images, labels = getattr(dataset, f"x_{split}"), getattr(dataset, f"y_{split}")
        assert images.dtype == np.uint8
        assert labels.dtype == np.int32
        assert images.shape == (*arrays[f"x_{split}"].shape, 1)
        assert sort_pairs(images, labels) == sort_pairs(arrays[f"x_{split}"], arrays[f"y_{split}"])
    assert dataset.class_names == tuple("0123456789")


class SilentHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files without logging the requests."""

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing."""


@contextlib.contextmanager
def serve(folder: Path, handler: type[SilentHandler] = SilentHandler) -> Iterator[str]:
    """Runs a web server on this machine and yields the URL of the folder."""
    make = functools.partial(handler, directory=str(folder))
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), make) as server,
        # On a busy machine the server may not run for longer than the 3 seconds of a user.
        mock.patch.object(_download, "_PROBE_SECONDS", 60),
    ):
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()
