"""The gradient of a small kernel as one matrix product of shifted copies.

dw[p, q, c, o] = Σ_{b,h,w} x[b, h + p, w + q, c] dy[b, h, w, o], with stride 1

The factors are dy shifted down by p and x shifted left by q: P copies of one and Q of the other,
where patches would be P·Q copies of x.
"""

import math

import jax.numpy as jnp
from jax import Array, lax

from capsjax._conv._matmul import contract

_MAX_TAPS = 5  # a side of the kernel; of each part, so many copies of x and of dy are held
_MAX_PARTS = 8  # of a batch: the copies of one part almost fit into the cache


def pay(strides: tuple[int, int], w: Array) -> bool:
    """Returns whether a CPU is faster with them than with the library's own gradient."""
    return strides == (1, 1) and max(w.shape[:2]) <= _MAX_TAPS


def compute_dw(x: Array, w: Array, dy: Array) -> Array:
    """Computes the gradient of a kernel [P, Q, C, O] for images [B, H, W, C], in float32."""
    batch = x.shape[0]
    parts = math.gcd(_MAX_PARTS, batch) if isinstance(batch, int) else 1  # it may be symbolic
    # Part n takes images n, n + parts, …, so that every device has images of every part.
    arrays = [a.reshape(batch // parts, parts, *a.shape[1:]) for a in (x, dy)]

    def of_part(part: Array) -> Array:
        x, dy = (lax.dynamic_index_in_dim(a, part, 1, keepdims=False) for a in arrays)
        return _compute_dw_of_part(w.shape, x, dy)

    return jnp.sum(lax.map(of_part, jnp.arange(parts)), 0)


def _compute_dw_of_part(shape: tuple[int, ...], x: Array, dy: Array) -> Array:
    rows, columns, channels, outputs = shape
    height, width = x.shape[1], dy.shape[2]
    # The sums run over the last axis of the left factor, which a CPU vectorises.
    padded = jnp.pad(dy.transpose(3, 0, 1, 2), ((0, 0), (0, 0), (rows - 1, rows - 1), (0, 0)))
    padded = lax.optimization_barrier(padded)  # or every copy would transpose and pad anew
    starts = range(rows - 1, -1, -1)
    left = jnp.stack([lax.slice_in_dim(padded, h, h + height, axis=2) for h in starts])
    right = jnp.concatenate([lax.slice_in_dim(x, q, q + width, axis=2) for q in range(columns)], 3)
    dw = contract(left, right, ((2, 3, 4), (0, 1, 2)))  # [P, O, Q·C]
    return dw.reshape(rows, outputs, columns, channels).transpose(0, 2, 3, 1)
