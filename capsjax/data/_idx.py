"""IDX files, the format in which MNIST, Fashion-MNIST, KMNIST and EMNIST come, gzipped or not.

An IDX file is two zero bytes, a byte for the type of its numbers, a byte for the number of axes,
the length of each axis as a big-endian 32-bit integer, and the numbers.
http://yann.lecun.com/exdb/mnist
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from ._dataset import DataError

_UINT8 = 0x08
_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


def file_names(name: str) -> dict[str, str]:
    """What the file of each array is called."""
    family, _, config = name.partition("/")
    if family != "emnist":
        return _FILES
    return {a: f"emnist-{config}-{file.replace('t10k', 'test')}" for a, file in _FILES.items()}


def find(folder: Path, name: str) -> dict[str, Path] | None:
    """The four files of a data set in a folder, None where there is none of them."""
    for names in (file_names(name), _FILES):
        found = {array: _find_one(folder, file) for array, file in names.items()}
        missing = [names[array] for array, path in found.items() if path is None]
        if not missing:
            return {array: path for array, path in found.items() if path}
        if len(missing) < len(names):
            raise DataError(
                f"{folder}: expected four IDX files, gzipped or not; {', '.join(missing)} missing; "
                "put all four into the folder"
            )
    if others := sorted(path.name for path in folder.glob("emnist-*-train-images-idx3-ubyte*")):
        configs = [f"emnist/{other.split('-')[1]}" for other in others]
        raise DataError(
            f"{folder}: holds {', '.join(configs)}, not {name}; say which of them by its name "
            f"(--dataset {configs[0]})"
        )
    return None


def read(paths: dict[str, Path]) -> dict[str, np.ndarray]:
    """The arrays of a data set, images `[N, H, W]` and labels `[N]`."""
    return {array: parse(_content(path), array, path) for array, path in paths.items()}


def parse(content: bytes, array: str, where: Path | str) -> np.ndarray:
    """The array that an IDX file's content holds."""
    ndim = 3 if array.startswith("x") else 1
    expected = bytes((0, 0, _UINT8, ndim))
    if content[:4] != expected:
        raise DataError(
            f"{where}: expected an IDX file that begins with {expected.hex(' ')} (unsigned bytes, "
            f"{ndim} axes), came {content[:4].hex(' ') or 'an empty file'}; it is damaged or not "
            f"the file of the {'images' if ndim == 3 else 'labels'}: get it anew"
        )
    start = 4 + 4 * ndim
    if len(content) < start:
        raise DataError(f"{where}: cut short within its {start}-byte header; get the file anew")
    shape = struct.unpack_from(f">{ndim}I", content, 4)
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{where}: its header says {' × '.join(map(str, shape))} = {math.prod(shape)} bytes, "
            f"{len(content) - start} follow; the file is cut short or altered: get it anew"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def header(shape: tuple[int, ...]) -> bytes:
    """The bytes before the numbers in an IDX file of unsigned bytes."""
    return struct.pack(f">2xBB{len(shape)}I", _UINT8, len(shape), *shape)


def decompress(content: bytes, where: Path | str) -> bytes:
    """The content of a gzip file."""
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{where}: expected a gzip file, but unpacking it failed ({error}); it is cut short or "
            "altered: get it anew"
        ) from error


def _find_one(folder: Path, file: str) -> Path | None:
    for spelling in (file, file.replace("-idx", ".idx")):
        for suffix in ("", ".gz"):
            path = folder / f"{spelling}{suffix}"
            if path.is_file():
                return path
    return None


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return decompress(content, path) if path.suffix == ".gz" else content
