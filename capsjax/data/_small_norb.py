"""smallNORB's own files: photographs of toys by two cameras, five classes.

A file holds little-endian 32-bit integers: a magic number that tells the type of the numbers, the
number of axes, and the length of each axis, at least three, of which those that are not used are 1.
Then come the numbers. https://cs.nyu.edu/~ylclab/data/norb-v1.0-small
"""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from capsjax.data._dataset import DataError, allocate_images

CLASS_NAMES = ("animal", "human", "airplane", "truck", "car")
_UINT8, _INT32 = 0x1E3D4C55, 0x1E3D4C54
_PREFIXES = {
    "train": "smallnorb-5x46789x9x18x6x2x96x96-training",
    "test": "smallnorb-5x01235x9x18x6x2x96x96-testing",
}
_SIDE = 96  # pixels
_AT_ONCE = 1000  # images read at once, 18 MB


def find(folder: Path) -> dict[str, Path] | None:
    """Returns the paths of the four files, or None if the folder has none of them."""
    names = {
        f"{letter}_{split}": f"{prefix}-{kind}.mat"
        for split, prefix in _PREFIXES.items()
        for letter, kind in (("x", "dat"), ("y", "cat"))
    }
    found = {array: _find_file(folder, name) for array, name in names.items()}
    missing = [names[array] for array, path in found.items() if path is None]
    if len(missing) == len(names):
        return None
    if missing:
        raise DataError(
            f"{folder}: expected four files of smallNORB, gzipped or not, got "
            f"{len(names) - len(missing)}; add the missing {', '.join(missing)}"
        )
    return {array: path for array, path in found.items() if path}


def read(paths: dict[str, Path]) -> dict[str, np.ndarray]:
    """Returns images [N, 48, 48, 2] and labels [N]."""
    return {
        array: _read_images(path) if array.startswith("x") else _read_labels(path)
        for array, path in paths.items()
    }


def _find_file(folder: Path, name: str) -> Path | None:
    paths = (folder / f"{name}{suffix}" for suffix in ("", ".gz"))
    return next(filter(Path.is_file, paths), None)


def _read_images(path: Path) -> np.ndarray:
    """Reads pairs of photographs as two channels, each pixel the mean of 2 × 2."""
    with _open(path) as file:
        number, *shape = _read_header(file, path, _UINT8, 4)
        if shape != [2, _SIDE, _SIDE]:
            raise DataError(
                f"{path}: expected pairs of images of {_SIDE} × {_SIDE}, got {shape}; it is not a "
                "file of smallNORB"
            )
        half = _SIDE // 2
        images = allocate_images(number, (half, half, 2), path)
        for start in range(0, number, _AT_ONCE):
            part = images[start : start + _AT_ONCE]
            pairs = _read_numbers(file, path, (len(part), 2, half, 2, half, 2), np.uint8)
            means = np.rint(pairs.mean((3, 5), dtype=np.float32))  # [N, 2, 48, 48]
            part[...] = np.moveaxis(means, 1, -1)
        _check_end(file, path)
    return images


def _read_labels(path: Path) -> np.ndarray:
    with _open(path) as file:
        shape = _read_header(file, path, _INT32, 1)
        labels = _read_numbers(file, path, tuple(shape), np.dtype("<i4"))
        _check_end(file, path)
    return labels


def _open(path: Path) -> Any:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _read_header(file: BinaryIO, path: Path, magic: int, ndim: int) -> list[int]:
    """Reads the length of each axis of an array of the expected type."""
    stored = max(3, ndim)
    header = _read_numbers(file, path, (2 + stored,), np.dtype("<i4"))
    if [*header[:2]] != [magic, ndim]:
        raise DataError(
            f"{path}: expected a file that begins with {struct.pack('<2i', magic, ndim).hex(' ')}, "
            f"got {header[:2].tobytes().hex(' ')}; it is damaged or not the file of the "
            f"{'images' if magic == _UINT8 else 'classes'}: download it again"
        )
    shape = header[2 : 2 + ndim].tolist()
    if min(shape) < 1:
        raise DataError(f"{path}: expected axes of length 1 or more, got {shape}; it is damaged")
    return shape


def _read_numbers(
    file: BinaryIO, path: Path, shape: tuple[int, ...], dtype: np.dtype | type
) -> np.ndarray:
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    content = _read_bytes(file, path, expected)
    if len(content) != expected:
        raise DataError(f"{path}: ends too early; it is truncated: download it again")
    return np.frombuffer(content, dtype).reshape(shape)


def _check_end(file: BinaryIO, path: Path) -> None:
    if _read_bytes(file, path, 1):
        raise DataError(f"{path}: holds more than its header says; download it again")


def _read_bytes(file: BinaryIO, path: Path, count: int) -> bytes:
    """Reads bytes, fewer at the end of the file."""
    try:
        return file.read(count)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: {error}; it is truncated or altered: download it again") from None
