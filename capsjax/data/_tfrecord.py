"""Reads TFRecord files, which `tfds.load` writes by default, without TensorFlow.

A record consists of its length (uint64), the checksum of the length, its bytes, and the checksum of
the bytes, all little-endian.
https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
"""

import struct
from pathlib import Path

import numpy as np

from capsjax.data._dataset import DataError

_LENGTH = struct.Struct("<Q")
_FRAME = 8 + 4 + 4  # the length and the two checksums around a record's bytes
_POLYNOMIAL = 0x82F63B78  # CRC-32C, bits reversed
_MASK = 0xA282EAD8


def read(path: Path) -> list[bytes]:
    """Returns the records of a file and verifies their checksums.

    Raises:
      DataError: if the file cannot be read, is truncated, or a checksum is wrong.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); remove the data set's folder and prepare "
            "it again"
        ) from error
    starts, lengths = _locate_records(content, path)
    _verify(content, np.array(starts, np.int64), np.array(lengths, np.int64), path)
    return [content[s : s + n] for s, n in zip(starts, lengths, strict=True)]


def _locate_records(content: bytes, path: Path) -> tuple[list[int], list[int]]:
    """Returns the start and the length of each record's bytes."""
    starts, lengths = [], []
    position = 0
    while position < len(content):
        if position + 8 <= len(content):
            (length,) = _LENGTH.unpack_from(content, position)
        else:
            length = len(content)  # too long, so that the file is found to be truncated
        starts.append(position + 12)
        lengths.append(length)
        position += length + _FRAME
    if position != len(content):
        raise DataError(
            f"{path}: truncated or altered, as record number {len(starts) - 1} extends beyond the "
            "end of the file; remove the data set's folder and prepare it again"
        )
    return starts, lengths


def _verify(content: bytes, starts: np.ndarray, lengths: np.ndarray, path: Path) -> None:
    """Verifies the checksum of every record's length, then that of its bytes."""
    data = np.frombuffer(content, np.uint8)
    for begin, count in ((starts - 12, np.full_like(lengths, 8)), (starts, lengths)):
        stored = data[(begin + count)[:, None] + np.arange(4)].view("<u4")[:, 0]
        wrong = np.flatnonzero(_compute_masked_crc32c(data, begin, count) != stored)
        if wrong.size:
            raise DataError(
                f"{path}: record number {wrong[0]} does not match its checksum, so the file was "
                "altered; remove the data set's folder and prepare it again"
            )


def _compute_masked_crc32c(data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Computes the checksums of all pieces at once, one step per byte of the longest piece."""
    table: np.ndarray = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    order = np.argsort(-lengths, kind="stable")
    starts, ascending = starts[order], lengths[order][::-1]
    sums = np.full(len(starts), 0xFFFFFFFF, np.uint32)
    for step in range(int(lengths.max(initial=0))):
        # The longest come first, so the pieces with a byte left at this step are the first `live`.
        live = len(starts) - np.searchsorted(ascending, step, side="right")
        byte = data[starts[:live] + step]
        sums[:live] = table[(sums[:live] ^ byte) & 0xFF] ^ (sums[:live] >> 8)
    sums = ~sums
    masked = ((sums >> 15) | (sums << 17)) + np.uint32(_MASK)
    result = np.empty_like(masked)
    result[order] = masked
    return result
