"""Atomic writing: a file is there whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and renames it to `path` once the block succeeds.

    A file that was there stays until then; if the block raises, nothing changes.

    Args:
      path: the file to write or to replace.

    Raises:
      OSError: if it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        with part.open("r+b") as file:
            os.fsync(file.fileno())  # before the rename, or a power cut could leave an empty file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
