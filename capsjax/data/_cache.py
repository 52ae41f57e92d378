"""Caches the decoded arrays of a data set prepared by TFDS, in one file beside its records.

Decoding the 70,000 PNGs of MNIST takes seconds, reading this file a fraction of one. It is only a
shortcut: a cache that is missing, damaged or older than the records is silently rebuilt.
"""

import contextlib
import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from capsjax._files import write_atomically
from capsjax.data import _npz
from capsjax.data._dataset import DataError, Dataset, build_dataset

_FILE = "capsjax_cache.npz"
_FORMAT = 1  # increase it whenever the arrays are processed differently before they are cached


def read(prepared: Path, source: str) -> Dataset | None:
    """Returns the cached data set, or None if no cache matches the present records."""
    path = prepared / _FILE
    if not path.is_file():
        return None
    try:
        arrays = _npz.read(path, optional=("class_names", "fingerprint"))
        if str(arrays.pop("fingerprint", "")) != _compute_fingerprint(prepared):
            return None
        return build_dataset(**arrays, source=source)
    except (DataError, TypeError):
        return None


def write(prepared: Path, dataset: Dataset) -> None:
    """Caches the arrays, unless the folder cannot be written."""
    arrays = {field.name: getattr(dataset, field.name) for field in dataclasses.fields(dataset)}
    del arrays["source"]
    with contextlib.suppress(OSError), write_atomically(prepared / _FILE) as part:
        with part.open("wb") as file:  # to a path, np.savez would append .npz
            np.savez(file, fingerprint=_compute_fingerprint(prepared), **arrays)
        part.chmod(0o644)  # other users of the folder read it too, whatever this one's umask


def _compute_fingerprint(prepared: Path) -> str:
    """Returns a digest that changes whenever a file of the prepared data set does."""
    digest = hashlib.sha256(str(_FORMAT).encode())
    for path in sorted(prepared.iterdir()):
        if _FILE not in path.name:
            stat = path.stat()
            digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()
