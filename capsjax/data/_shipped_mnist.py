"""The MNIST archive shipped with the package, and the checksums of the original files."""

import hashlib
from pathlib import Path

import numpy as np

from capsjax.data import _idx, _npz
from capsjax.data._dataset import DataError, Dataset

_ARCHIVE = Path(__file__).with_name("mnist.npz")
_ARCHIVE_SHA256 = "70cde9df02dd98064f67a5445e56caa6ca0cabeb065b7836ee47b37849703206"

# Shapes and SHA-256 of the four original IDX files, uncompressed.
_ORIGINALS: dict[str, tuple[tuple[int, ...], str]] = {
    "x_train": (
        (60000, 28, 28),
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "y_train": ((60000,), "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "x_test": (
        (10000, 28, 28),
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "y_test": ((10000,), "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
}


def load() -> dict[str, np.ndarray]:
    """Returns the arrays of the shipped archive, whose checksum is verified first."""
    advice = "install capsjax again, or give your own copy of MNIST as data_dir"
    try:
        digest = hashlib.sha256(_ARCHIVE.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{_ARCHIVE}: cannot be read ({error.strerror}); {advice}") from error
    if digest != _ARCHIVE_SHA256:
        raise DataError(
            f"{_ARCHIVE}: expected sha256 {_ARCHIVE_SHA256}, got {digest}, so the archive is "
            f"truncated or altered; {advice}"
        )
    return _npz.read(_ARCHIVE)


def verify(dataset: Dataset) -> None:
    """Refuses arrays that have the length and shape of MNIST's but differ; a subset passes."""
    if dataset.image_shape != (28, 28, 1):
        return
    for name, (shape, expected) in _ORIGINALS.items():
        array = getattr(dataset, name)
        if len(array) != shape[0]:
            continue
        digest = hashlib.sha256(_idx.make_header(shape))
        digest.update(array.astype(np.uint8, copy=False))
        if digest.hexdigest() != expected:
            raise DataError(
                f"{dataset.source}: expected {name} to be MNIST's, with sha256 {expected} as an "
                f"IDX file, got {digest.hexdigest()}, so it was altered; download it again, or "
                "give the data set a name of its own if it is not MNIST"
            )
