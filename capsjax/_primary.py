"""Primary capsules: a convolution whose outputs are grouped into vectors."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from capsjax._conv import conv
from capsjax._vectors import float_dtype, squash

Grouping = Literal["channels", "flat"]


def primary_capsules(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike,
    *,
    dim: int,
    strides: int = 2,
    grouping: Grouping = "channels",
    coupling: float = 1.0,
) -> jax.Array:
    """Computes the first capsule layer: a valid convolution, its outputs grouped into vectors.

    u_i = squash(coupling · (kernel ∗ x)_i + bias_i)

    Args:
      x: feature maps [..., H, W, C], of any float dtype.
      kernel: [kh, kw, C, types·dim].
      bias: [types·dim].
      dim: k, the numbers in a capsule.
      strides: of the convolution, in pixels, the same in both directions.
      grouping: "channels", as in the paper: a capsule is `dim` neighbouring channels at one
        position, and i runs over (row, column, type). "flat": a capsule is `dim` neighbouring
        values of the flattened [channels, rows, columns], as `.view(batch, -1, dim)` makes them
        of a channels-first tensor; weights trained that way need it.
      coupling: a constant factor on the convolution. The authors' released code routes once over
        the types, which makes it 1/types.

    Returns:
      u: [..., i, k] in the dtype of `x`, each capsule shorter than 1, in 16 bits up to rounding.

    Raises:
      ValueError: if a shape does not fit, the channels (or values, if flat) are not a multiple of
        `dim`, or `grouping` is unknown.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> x = jnp.ones((2, 20, 20, 3))
      >>> u = capsjax.primary_capsules(x, jnp.ones((9, 9, 3, 32)), jnp.zeros(32), dim=8)
      >>> u.shape                     # 6 × 6 positions of 4 types, each of 8 numbers
      (2, 144, 8)

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, §4; the authors' code: Sarasra/models,
      research/capsules; "flat": XifengGuo/CapsNet-Pytorch.
    """
    x, kernel, bias = jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(bias)
    dtype = float_dtype(x)
    if grouping not in get_args(Grouping):
        raise ValueError(
            f"primary_capsules: grouping is one of {get_args(Grouping)}, got {grouping!r}"
        )
    if bias.shape != kernel.shape[-1:]:
        raise ValueError(
            f"primary_capsules: expected a bias of shape {list(kernel.shape[-1:])} for a kernel of "
            f"shape {list(kernel.shape)}, got {list(bias.shape)}"
        )
    s = conv(x.astype(dtype), coupling * kernel, bias, strides=strides)
    if grouping == "flat":
        s = jnp.moveaxis(s, -1, -3)
    rows, columns, channels = s.shape[-3:]
    values = channels if grouping == "channels" else rows * columns * channels
    if dim < 1 or values % dim:
        raise ValueError(f"primary_capsules: {values} {grouping} make no capsules of {dim} numbers")
    u = squash(s.reshape(*s.shape[:-3], rows * columns * channels // dim, dim))
    return u.astype(dtype)
