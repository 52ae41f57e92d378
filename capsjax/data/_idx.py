"""IDX files, gzipped or not: the format of MNIST, Fashion-MNIST, KMNIST and EMNIST.

An IDX file consists of two zero bytes, one byte for the type of the numbers, one byte for the
number of axes, the length of each axis as a big-endian 32-bit integer, and the numbers.
http://yann.lecun.com/exdb/mnist
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from capsjax.data._dataset import DataError

_UINT8 = 0x08
_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


def get_file_names(name: str) -> dict[str, str]:
    """Returns the name of each array's file."""
    family, _, config = name.partition("/")
    if family != "emnist":
        return _FILES
    return {a: f"emnist-{config}-{file.replace('t10k', 'test')}" for a, file in _FILES.items()}


def find(folder: Path, name: str) -> dict[str, Path] | None:
    """Returns the paths of the data set's four files, or None if the folder has no IDX files."""
    for names in (get_file_names(name), _FILES):
        found = {array: _find_file(folder, file) for array, file in names.items()}
        missing = [names[array] for array, path in found.items() if path is None]
        if not missing:
            return {array: path for array, path in found.items() if path}
        if len(missing) < len(names):
            raise DataError(
                f"{folder}: expected four IDX files, gzipped or not, got "
                f"{len(names) - len(missing)}; add the missing {', '.join(missing)}"
            )
    if others := sorted(path.name for path in folder.glob("emnist-*-train-images-idx3-ubyte*")):
        configs = [f"emnist/{other.split('-')[1]}" for other in others]
        raise DataError(
            f"{folder}: holds {', '.join(configs)}, not {name}; load it under its own name "
            f"(--dataset {configs[0]})"
        )
    return None


def read(paths: dict[str, Path]) -> dict[str, np.ndarray]:
    """Returns the arrays of a data set, images [N, H, W] and labels [N]."""
    return {array: parse(_read_content(path), array, path) for array, path in paths.items()}


def parse(content: bytes, array: str, where: Path | str) -> np.ndarray:
    """Returns the array that the content of an IDX file encodes."""
    ndim = 3 if array.startswith("x") else 1
    expected = bytes((0, 0, _UINT8, ndim))
    if content[:4] != expected:
        raise DataError(
            f"{where}: expected an IDX file that begins with {expected.hex(' ')} (unsigned bytes, "
            f"{ndim} axes), got {content[:4].hex(' ') or 'an empty file'}; it is damaged or not "
            f"the file of the {'images' if ndim == 3 else 'labels'}: download it again"
        )
    start = 4 + 4 * ndim
    if len(content) < start:
        raise DataError(
            f"{where}: expected a header of {start} bytes, got a file of {len(content)}; it is "
            "truncated: download it again"
        )
    shape = struct.unpack_from(f">{ndim}I", content, 4)
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{where}: expected {' × '.join(map(str, shape))} = {math.prod(shape)} bytes after the "
            f"header, got {len(content) - start}; the file is truncated or altered: download it "
            "again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def make_header(shape: tuple[int, ...]) -> bytes:
    """Returns the bytes that precede the numbers in an IDX file of unsigned bytes."""
    return struct.pack(f">2xBB{len(shape)}I", _UINT8, len(shape), *shape)


def decompress(content: bytes, where: Path | str) -> bytes:
    """Unpacks the content of a gzip file."""
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{where}: expected a gzip file, but unpacking it failed ({error}); it is truncated or "
            "altered: download it again"
        ) from error


def _find_file(folder: Path, file: str) -> Path | None:
    """Returns the path of a file, which may be gzipped and may have a dot in place of `-idx`."""
    for spelling in (file, file.replace("-idx", ".idx")):
        for suffix in ("", ".gz"):
            path = folder / f"{spelling}{suffix}"
            if path.is_file():
                return path
    return None


def _read_content(path: Path) -> bytes:
    """Returns the content of a file, unpacked if it is gzipped."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); check its permissions, or download it "
            "again"
        ) from error
    return decompress(content, path) if path.suffix == ".gz" else content
