"""Whether the Toom-Cook algorithm pays, and in which tiles."""

import math
from typing import NamedTuple

import numpy as np

from capsjax._conv._matrices import MAX_TAPS, POINTS, build_matrices


class AxisPlan(NamedTuple):
    """How one axis is convolved: in tiles, each y = A [(B x) · (C w)]."""

    stride: int
    outputs: int
    tiles: int
    A: np.ndarray  # output transform [outputs of a tile, products]
    B: np.ndarray  # input transform [products, inputs of a tile]
    C: np.ndarray  # kernel transform [products, taps]


def plan_axes(
    image: tuple[int, ...], kernel: tuple[int, ...], strides: tuple[int, int], dtype: str
) -> tuple[AxisPlan, AxisPlan] | None:
    """Plans rows and columns; returns None where other algorithms are faster."""
    taps = max(-(-n // s) for n, s in zip(kernel[:2], strides, strict=True))
    if dtype not in POINTS or taps > MAX_TAPS:
        return None
    sizes = zip(image, kernel[:2], strides, strict=True)
    rows, columns = (_plan_axis(*size, *POINTS[dtype]) for size in sizes)
    products = math.prod(axis.stride * axis.tiles * len(axis.B) for axis in (rows, columns))
    direct = rows.outputs * columns.outputs * kernel[0] * kernel[1]
    # The transforms take about as long as the products of 128 channels: measured over kernels from
    # 3×3 to 9×9, strides 1 and 2, and 16 to 256 channels.
    channels = min(rows.stride * columns.stride * kernel[2], kernel[3])
    return (rows, columns) if (channels + 128) * products <= channels * direct else None


def _plan_axis(size: int, taps: int, stride: int, real: tuple[float, ...], pairs: int) -> AxisPlan:
    """Chooses the size of the tiles that takes the fewest products."""
    outputs, taps = (size - taps) // stride + 1, -(-taps // stride)
    choices = [
        AxisPlan(stride, outputs, -(-outputs // n), *build_matrices(n, taps, real, pairs))
        for n in range(1, min(outputs, 8) + 1)
    ]
    return min(choices, key=lambda axis: axis.tiles * len(axis.B))
