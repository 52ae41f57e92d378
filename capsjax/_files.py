"""Files that are there whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to: what is there at the end takes the place of `path`."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        with part.open("r+b") as file:
            os.fsync(file.fileno())  # before the name, or a power cut leaves it with nothing in it
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
