"""The decoded arrays of a data set that TFDS prepared, in one file beside it.

Decoding the 70,000 PNGs of MNIST takes seconds, reading this file a fraction of one. It is only a
shortcut: what is missing, damaged or older than the records is made anew, in silence.
"""

import contextlib
import dataclasses
import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np

from . import _npz
from ._dataset import DataError, Dataset, checked

_FILE = "capsjax_cache.npz"
_FORMAT = 1  # raise it with every change of what is done to the arrays before they are cached


def read(prepared: Path, source: str) -> Dataset | None:
    """The cached arrays, None where there are none that belong to the records now there."""
    path = prepared / _FILE
    if not path.is_file():
        return None
    try:
        arrays = _npz.read(path, optional=("class_names", "fingerprint"))
        if str(arrays.pop("fingerprint", "")) != _fingerprint(prepared):
            return None
        return checked(**arrays, source=source)
    except (DataError, TypeError):
        return None


def write(prepared: Path, dataset: Dataset) -> None:
    """Caches the arrays; a folder that cannot be written goes without."""
    arrays = {field.name: getattr(dataset, field.name) for field in dataclasses.fields(dataset)}
    del arrays["source"]
    with contextlib.suppress(OSError):
        handle, draft = tempfile.mkstemp(dir=prepared, prefix=f".{_FILE}-")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, fingerprint=_fingerprint(prepared), **arrays)
            os.chmod(draft, 0o644)
            os.replace(draft, prepared / _FILE)
        except BaseException:
            os.unlink(draft)
            raise


def _fingerprint(prepared: Path) -> str:
    """Changes when any file of the prepared data set does."""
    digest = hashlib.sha256(str(_FORMAT).encode())
    for path in sorted(prepared.iterdir()):
        if _FILE not in path.name:
            stat = path.stat()
            digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()
