"""Windows: the capsules that each output position sees, and what they share where windows overlap.

Letters: y and x rows and columns of positions, y' and x' of windows, n the side of a window.
"""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from capsjax._vectors import at_least_float32


def extract_windows(u: ArrayLike, size: int, strides: int = 1) -> jax.Array:
    """Gathers the capsules of every window, without padding.

    windows[..., y', x', (p q i), :] = u[..., s y' + p, s x' + q, i, :]

    Args:
      u: capsules [..., y, x, i, k], of any dtype.
      size: n, the side of a window, in positions.
      strides: s, the step between neighbouring windows.

    Returns:
      [..., (y − n) // s + 1, (x − n) // s + 1, n·n·i, k]: capsules of a window, which any routing
      takes for input capsules; its positions are leading axes.

    Raises:
      ValueError: if `u` has fewer axes, or no window fits.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> windows = capsjax.extract_windows(jnp.ones((2, 12, 12, 8, 16)), size=3, strides=2)
      >>> windows.shape
      (2, 5, 5, 72, 16)
      >>> v = capsjax.dense_capsules(windows, jnp.ones((4, 72, 6, 16)))
      >>> v.shape                          # 4 types of capsules of 6 numbers at 5 × 5 positions
      (2, 5, 5, 4, 6)
    """
    u = jnp.asarray(u)
    if u.ndim < 4:
        raise ValueError(
            f"extract_windows: expected capsules [..., y, x, i, k], got {list(u.shape)}"
        )
    *lead, rows, columns, i, k = u.shape
    height, width = count_windows("extract_windows", (rows, columns), size, strides)
    windows = _cut(u, (height, width), size, strides, axis=u.ndim - 4)
    return windows.reshape(*lead, height, width, size * size * i, k)


def logsumexp_over_windows(logs: ArrayLike, size: int, strides: int = 1) -> jax.Array:
    """Computes, for each capsule, the log-sum-exp over all windows that hold it.

    result[..., y', x', i] = log Σ e^logs over all windows, and their i, of the same capsule

    It does not overflow and is differentiable.

    Args:
      logs: [..., y', x', n·n·i], finite, in the order of `extract_windows`.
      size: n, the side of a window, in positions.
      strides: s, the step between neighbouring windows.

    Returns:
      Of the shape of `logs`, in float32: each sum stands in every window that holds the capsule.

    Raises:
      ValueError: if the capsules of a window do not fill n × n positions, or a size is below 1.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> logs = jnp.zeros((1, 2, 3))      # windows of 1 × 1 do not overlap: a sum of one term
      >>> capsjax.logsumexp_over_windows(logs, size=1).tolist()
      [[[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]
      >>> logs = jnp.zeros((2, 2, 9))      # the centre of 4 × 4 is in all four windows of 3 × 3
      >>> round(float(jnp.exp(capsjax.logsumexp_over_windows(logs, size=3)[0, 0, 4])), 4)
      4.0

    References:
      The competition of the parents of a capsule: Gritzman, 2019, arXiv:1907.00652.
    """
    logs = at_least_float32(jnp.asarray(logs))
    if min(size, strides) < 1 or logs.ndim < 3 or logs.shape[-1] % (size * size):
        raise ValueError(
            f"logsumexp_over_windows: expected logs [..., y', x', n·n·i] for windows of {size} × "
            f"{size} and a stride of 1 or more, got {list(logs.shape)} and {strides}"
        )
    *lead, height, width, inputs = logs.shape
    windows = logs.reshape(*lead, height, width, size, size, inputs // size**2)
    axis = len(lead)

    def tell(positions: jax.Array) -> jax.Array:
        return _cut(positions, (height, width), size, strides, axis)

    highest = _overlap(lax.stop_gradient(windows), strides, axis, jnp.maximum, -jnp.inf)
    peak = tell(highest)
    total = tell(_overlap(jnp.exp(windows - peak), strides, axis, operator.add, 0))
    return (peak + jnp.log(total)).reshape(logs.shape)


def count_windows(
    function: str, positions: tuple[int, int], size: int, strides: int
) -> tuple[int, int]:
    """Returns the rows and columns of windows; raises ValueError if there are none."""
    if min(size, strides) < 1 or min(positions) < size:
        raise ValueError(
            f"{function}: windows of {size} × {size} with a stride of {strides} do not fit into "
            f"{positions[0]} × {positions[1]} positions"
        )
    rows, columns = ((n - size) // strides + 1 for n in positions)
    return rows, columns


def _cut(x: jax.Array, windows: tuple[int, int], size: int, strides: int, axis: int) -> jax.Array:
    """Returns x, whose axes `axis` and the next are positions, as [..., y', x', n, n, ...]."""
    for n, number in enumerate(windows):
        at = axis + n  # of the positions; behind them the offsets within a window
        taps = [
            lax.slice_in_dim(x, p, p + (number - 1) * strides + 1, strides, at) for p in range(size)
        ]
        x = jnp.stack(taps, axis + 1 + n + 1)
    return x


def _overlap(
    windows: jax.Array, strides: int, axis: int, combine: Callable, fill: float
) -> jax.Array:
    """Lays windows [..., y', x', n, n, ...] on their positions, and combines where they overlap."""
    size = windows.shape[axis + 2]
    layers = []
    for p in range(size):
        for q in range(size):
            tap = lax.index_in_dim(windows, p, axis + 2, keepdims=False)
            tap = lax.index_in_dim(tap, q, axis + 2, keepdims=False)
            margins = [(0, 0, 0)] * tap.ndim
            margins[axis] = (p, size - 1 - p, strides - 1)
            margins[axis + 1] = (q, size - 1 - q, strides - 1)
            layers.append(lax.pad(tap, jnp.asarray(fill, tap.dtype), margins))
    return functools.reduce(combine, layers)
