"""Capsule vectors: their length, and the squashing nonlinearity.

Both are safe at zero. The derivative of the length, s/|s|, is undefined there, and
`s / (|s| + eps)` mends only the value, not the gradient. So a zero vector takes a branch of its
own, and its gradient is 0.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def at_least_float32(x: jax.Array) -> jax.Array:
    """Converts `x` to the dtype in which sums run: float32, or wider if `x` is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def float_dtype(x: jax.Array) -> jnp.dtype:
    """Returns the dtype of the results for an input `x`: its own, or float32 for integers."""
    return x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.dtype(jnp.float32)


def length(x: ArrayLike, axis: int = -1, *, keepdims: bool = False) -> jax.Array:
    """Computes the Euclidean length of vectors, with gradient 0 at x = 0.

    |x| = √(Σ x²)

    Args:
      x: vectors along `axis`, of any shape and float dtype; sums run in float32.
      axis: the axis of a vector's components.
      keepdims: whether `axis` is kept, with size 1.

    Returns:
      The lengths, without `axis`, in the dtype of `x`. Sums of squares below 1e-38 count as zero.

    Raises:
      ValueError: if `x` has no such axis.

    Example:
      >>> import jax, jax.numpy as jnp, capsjax
      >>> float(capsjax.length(jnp.array([3.0, 4.0])))
      5.0
      >>> jax.grad(capsjax.length)(jnp.zeros(2)).tolist()
      [0.0, 0.0]

    References:
      Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules", 2017, arXiv:1710.09829, §2.
    """
    x = jnp.asarray(x)
    _check_axis("length", x, axis)
    square = jnp.sum(jnp.square(at_least_float32(x)), axis, keepdims=keepdims)
    zero = square <= 0  # False for NaN, which passes through
    # Both branches of `where` are differentiated: √ must never see a 0.
    norm = jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))
    return norm.astype(float_dtype(x))


def squash(s: ArrayLike, axis: int = -1) -> jax.Array:
    """Shrinks vectors to a length below 1 and keeps their direction (eq. 1).

    v = |s|² / (1 + |s|²) · s / |s|

    Args:
      s: vectors along `axis`, of any shape and float dtype; finite up to |s| = 1e18.
      axis: the axis of a vector's components.

    Returns:
      v, of the shape and dtype of `s`; zero where `s` is, with gradient 0 there. In 16 bits its
      length may be rounded to 1.

    Raises:
      ValueError: if `s` has no such axis.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> v = capsjax.squash(jnp.array([3.0, 0.0, 4.0]))                  # |s| = 5
      >>> round(float(capsjax.length(v)), 4)                              # 25 / 26
      0.9615

    References:
      Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules", 2017, arXiv:1710.09829, eq. 1.
    """
    return _shrink("squash", s, axis, _squash_factor)


@jax.custom_jvp
def _squash_factor(norm: jax.Array) -> jax.Array:
    """Computes |s| / (1 + |s|²), the factor by which s is scaled."""
    return norm / (1 + norm * norm)


@_squash_factor.defjvp
def _squash_factor_jvp(primals, tangents):
    (norm,), (tangent,) = primals, tangents
    # The quotient rule squares 1 + |s|², which overflows from |s| = 1e10 on.
    inverse = 1 / (1 + norm * norm)
    slope = inverse * (1 - 2 * norm * norm * inverse)
    return norm * inverse, slope * tangent


def squash_exp(s: ArrayLike, axis: int = -1) -> jax.Array:
    """Shrinks vectors to a length below 1, short ones hardly at all.

    v = (1 − e^−|s|) · s / |s|

    Its slope at zero is 1 where that of `squash` is 0, so that short capsules keep learning.

    Args:
      s: vectors along `axis`, of any shape and float dtype; finite up to |s| = 1e18.
      axis: the axis of a vector's components.

    Returns:
      v, of the shape and dtype of `s`; zero where `s` is. In 16 bits its length may be rounded to
      1.

    Raises:
      ValueError: if `s` has no such axis.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> v = capsjax.squash_exp(jnp.array([3.0, 0.0, 4.0]))              # |s| = 5
      >>> round(float(capsjax.length(v)), 4)                              # 1 − e^−5
      0.9933

    References:
      Mazzia, Salvetti, Chiaberge, "Efficient-CapsNet", 2021, arXiv:2101.12491.
    """
    return _shrink("squash_exp", s, axis, _squash_exp_factor)


def _squash_exp_factor(norm: jax.Array) -> jax.Array:
    """Computes (1 − e^−n) / n; near zero by its series, where the quotient's slope is 0 / 0."""
    short = norm < 1e-3
    # Both branches of `where` are differentiated: none may see what it cannot take.
    small, large = jnp.where(short, norm, 0), jnp.where(short, 1, norm)
    series = 1 - small / 2 * (1 - small / 3 * (1 - small / 4 * (1 - small / 5)))
    return jnp.where(short, series, -jnp.expm1(-large) / large)


def _shrink(function: str, s: ArrayLike, axis: int, factor: Callable) -> jax.Array:
    """Scales vectors by a factor of their length, which leaves them shorter than 1."""
    s = jnp.asarray(s)
    _check_axis(function, s, axis)
    s32 = at_least_float32(s)
    # Rounding can raise |v| to 1 or above; scaling by 1 − eps keeps it below.
    below_one = 1 - jnp.finfo(s32.dtype).eps
    v = s32 * (below_one * factor(length(s32, axis, keepdims=True)))
    return v.astype(float_dtype(s))


def _check_axis(function: str, x: jax.Array, axis: int) -> None:
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"{function}: axis {axis} of an array of shape {list(x.shape)}")
