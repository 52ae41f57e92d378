"""Rearranges images, kernel and outputs into tiles and phases, and outputs back.

B' counts the tiles of all images, C' the channels of all phases.
"""

import jax.numpy as jnp
from jax import Array, lax

from capsjax._conv._tiling import AxisPlan

_Axes = tuple[AxisPlan, AxisPlan]


def split_inputs(axes: _Axes, x: Array) -> Array:
    """Splits images [B, H, W, C] into tiles of inputs, [rows, columns, B', C']."""
    rows, columns = axes
    x = _split_axis(x, 2, columns, columns.B.shape[1], columns.stride)
    x = _split_axis(x, 1, rows, rows.B.shape[1], rows.stride)
    return _merge_tiles_and_phases(x)


def split_outputs(axes: _Axes, dy: Array) -> Array:
    """Splits [B, H', W', O] into tiles of outputs, [rows, columns, B', O]."""
    rows, columns = axes
    dy = _split_axis(dy, 2, columns, columns.A.shape[0], 1)
    dy = _split_axis(dy, 1, rows, rows.A.shape[0], 1)
    return _merge_tiles_and_phases(dy)


def join_outputs(axes: _Axes, y: Array, batch: int) -> Array:
    """Joins tiles [rows, columns, B', O] into [B, H', W', O]: the inverse of `split_outputs`."""
    rows, columns = axes
    n, m, _, out = y.shape
    y = y.reshape(n, m, batch, rows.tiles, columns.tiles, out).transpose(2, 3, 0, 4, 1, 5)
    y = y.reshape(batch, rows.tiles * n, columns.tiles * m, out)
    return y[:, : rows.outputs, : columns.outputs]


def split_kernel(axes: _Axes, w: Array) -> Array:
    """Splits a kernel [P, Q, C, O] into the taps of each phase, [rows, columns, C', O]."""
    (s, n), (t, m) = ((axis.stride, axis.C.shape[1]) for axis in axes)
    p, q, c, out = w.shape
    w = jnp.pad(w, ((0, n * s - p), (0, m * t - q), (0, 0), (0, 0)))
    return w.reshape(n, s, m, t, c, out).transpose(0, 2, 1, 3, 4, 5).reshape(n, m, s * t * c, out)


def _split_axis(x, dim, axis, length, phases):
    """Splits dimension `dim` into [tiles, length, phases]; tiles of inputs overlap."""
    step = axis.A.shape[0] * phases
    length *= phases
    pads = [(0, 0, 0)] * x.ndim
    pads[dim] = (0, (axis.tiles - 1) * step + length - x.shape[dim], 0)
    x = lax.pad(x, jnp.zeros((), x.dtype), pads)
    tiles = [lax.slice_in_dim(x, i * step, i * step + length, axis=dim) for i in range(axis.tiles)]
    x = jnp.stack(tiles, dim)
    return x.reshape(*x.shape[: dim + 1], length // phases, phases, *x.shape[dim + 2 :])


def _merge_tiles_and_phases(x):
    """[B, tiles, rows, phases, tiles, columns, phases, C] -> [rows, columns, B', C']."""
    b, s, n, p, t, m, q, c = x.shape
    return x.transpose(2, 5, 0, 1, 4, 3, 6, 7).reshape(n, m, b * s * t, p * q * c)
