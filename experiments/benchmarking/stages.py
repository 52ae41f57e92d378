"""The stages of a train step: their names, their inputs, and the least that each must compute."""

from typing import NamedTuple

import numpy as np

_CONV1, _CONV2 = 20 * 20 * 81 * 256, 6 * 6 * 81 * 256 * 256  # multiplications for an image
_PREDICTIONS = 10 * 1152 * 8 * 16
_DECODER = 160 * 512 + 512 * 1024 + 1024 * 784
PARAMETERS = 8_215_568
_IMAGE, _MAPS, _OUT = 28 * 28, 20 * 20 * 256, 6 * 6 * 256  # numbers of an image
_K1, _K2, _W = 81 * 256, 81 * 256 * 256, 10 * 1152 * 16 * 8  # numbers in the weights
PEAKS = PRODUCT, COPY = "matrix product", "copy"  # the machine's peak arithmetic and bandwidth
SIDE, LENGTH = 2048, 2**26  # sizes of the arrays that the peaks are measured with


class Cost(NamedTuple):
    """The arithmetic and memory traffic of a stage, computed directly from its definition."""

    flop: float
    bytes: float  # reads and writes, each number once


def count_costs(batch: int) -> dict[str, Cost]:
    """Counts the cost of each stage in float32, and of both peaks."""
    stages = {
        name: Cost(2 * batch * products, 4 * (batch * each + once))
        for name, (products, each, once) in _count_numbers().items()
    }
    return stages | {PRODUCT: Cost(2 * SIDE**3, 0), COPY: Cost(0, 8 * LENGTH)}


def count_step(batch: int, dtype: str) -> Cost:
    """Counts the arithmetic of the convolutions, and the bytes of all stages of a step."""
    costs = count_costs(batch)
    for name in (*PEAKS, "predictions and routing forward"):  # no stage, and one that is in another
        del costs[name]
    width = 1 if dtype == "float32" else 0.5
    flop = sum(cost.flop for name, cost in costs.items() if name.startswith("conv"))
    moved = {name: cost.bytes * width for name, cost in costs.items()}
    return Cost(flop, sum(moved.values()) + (1 - width) * costs["optimiser"].bytes)


def _count_numbers() -> dict[str, tuple[float, float, float]]:
    """Returns multiplications for an image, numbers moved for an image, numbers moved once."""
    return {
        "conv1 forward": (_CONV1, _IMAGE + _MAPS, _K1),
        "conv1 kernel gradient": (_CONV1, _IMAGE + _MAPS, _K1),
        "conv2 forward": (_CONV2, _MAPS + _OUT, _K2),
        "conv2 image gradient": (_CONV2, _MAPS + _OUT, _K2),
        "conv2 kernel gradient": (_CONV2, _MAPS + _OUT, _K2),
        # û once; then three sums and two agreements over it, each 1/8 of that.
        "predictions and routing forward": (_PREDICTIONS * 13 / 8, _OUT + 160, _W),
        "predictions and routing with gradients": (
            *(_PREDICTIONS * (3 + 6 / 8), 2 * (_OUT + 160), 2 * _W),
        ),
        "decoder with gradients": (3 * _DECODER, 160 + 2 * _IMAGE, 2 * _DECODER),
        "optimiser": (0, 0, 7 * PARAMETERS),
    }


def draw_arrays(batch: int) -> dict[str, np.ndarray]:
    """Draws the inputs of all stages, channels last."""
    rng = np.random.default_rng(0)
    shapes = {
        "x": (batch, 28, 28, 1),
        "h": (batch, 20, 20, 256),
        "dy": (batch, 6, 6, 256),
        "u": (batch, 1152, 8),
        "v": (batch, 10, 16),
    }
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
