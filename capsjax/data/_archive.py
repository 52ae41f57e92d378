"""MNIST itself: the archive shipped in the package, and the checksums of the original files."""

import hashlib
from pathlib import Path

import numpy as np

from . import _idx, _npz
from ._dataset import DataError, Dataset

_ARCHIVE = Path(__file__).with_name("mnist.npz")
_ARCHIVE_SHA256 = "70cde9df02dd98064f67a5445e56caa6ca0cabeb065b7836ee47b37849703206"

# Of the four original IDX files, uncompressed.
_ORIGINAL_SHA256 = {
    "x_train": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "y_train": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "x_test": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "y_test": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_ORIGINAL_LENGTH = {"train": 60000, "test": 10000}


def load() -> dict[str, np.ndarray]:
    """The arrays of the shipped archive."""
    reinstall = "install capsjax again, or give your own copy of MNIST as data_dir"
    try:
        digest = hashlib.sha256(_ARCHIVE.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{_ARCHIVE}: cannot be read ({error.strerror}); {reinstall}") from error
    if digest != _ARCHIVE_SHA256:
        raise DataError(
            f"{_ARCHIVE}: expected sha256 {_ARCHIVE_SHA256}, came {digest}: the archive is cut "
            f"short or altered; {reinstall}"
        )
    return _npz.read(_ARCHIVE)


def verify(dataset: Dataset) -> None:
    """Refuse arrays of MNIST's own length and shape that are not MNIST; a subset passes."""
    for array, digest in _ORIGINAL_SHA256.items():
        values = getattr(dataset, array)
        shape = (_ORIGINAL_LENGTH[array[2:]], *((28, 28) if array[0] == "x" else ()))
        if dataset.image_shape != (28, 28, 1) or len(values) != shape[0]:
            continue
        found = hashlib.sha256(_idx.header(shape))
        found.update(values.astype(np.uint8, copy=False))
        if found.hexdigest() != digest:
            raise DataError(
                f"{dataset.source}: {array} has MNIST's shape but, as an IDX file, sha256 "
                f"{found.hexdigest()} instead of {digest}, so it was altered; get it anew, or give "
                "the data set its own name if it is not MNIST"
            )
