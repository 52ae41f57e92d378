"""Convolutional capsules: at every position the same layer routes the capsules of a window."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jax.typing import ArrayLike

from capsjax._routing import Routing
from capsjax._windows import count_windows, extract_windows
from capsjax.nn._layers import Initializer, as_routing


class ConvCaps(nnx.Module):
    """A capsule layer at every position, with the same weights at all of them.

    v[y, x] = routing(W u[s y … s y + n, s x … s x + n])

    Args:
      in_types: the number of i, capsules at an input position.
      in_dim_caps: k.
      out_types: the number of j, capsules at an output position.
      out_dim_caps: d.
      routings: iterations of routing by agreement, or any `capsjax.Routing`.
      kernel_size: n, the side of a window, in positions.
      strides: s, the step between neighbouring windows, in positions.
      weight_init: of W [j, n·n·i, d, k]; by default N(0, 1) · 3 J / √(n·n·i·d), where J is the
        number of j. Equally coupled unit capsules then have sums of length 3, and the lengths in a
        stack of layers settle at 0.87; with less than 2 in place of 3 they would shrink to 0.
      rngs: its stream `params` draws the initial values.

    Raises:
      ValueError: if a size is below 1; when called, if no window fits.

    Called with u [..., y, x, i, k], returns v [..., (y − n) // s + 1, (x − n) // s + 1, j, d].

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import capsjax
      >>> layer = capsjax.nn.ConvCaps(8, 16, 4, 6, strides=2, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 12, 12, 8, 16))).shape
      (2, 5, 5, 4, 6)
    """

    def __init__(
        self,
        in_types: int,
        in_dim_caps: int,
        out_types: int,
        out_dim_caps: int,
        routings: int | Routing = 3,
        *,
        kernel_size: int = 3,
        strides: int = 1,
        weight_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        self.routing = as_routing(routings)
        self.kernel_size, self.strides = kernel_size, strides
        count_windows("ConvCaps", (kernel_size, kernel_size), kernel_size, strides)
        inputs = kernel_size * kernel_size * in_types
        weight_init = weight_init or initializers.normal(
            3 * out_types / math.sqrt(inputs * out_dim_caps)
        )
        shape = (out_types, inputs, out_dim_caps, in_dim_caps)
        self.weight = nnx.Param(weight_init(rngs.params(), shape, jnp.float32))
        bias = self.routing.initial_bias(out_types, inputs, out_dim_caps)
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, u: ArrayLike) -> jax.Array:
        windows = extract_windows(u, self.kernel_size, self.strides)
        bias = None if self.bias is None else self.bias[...]
        return self.routing(windows, self.weight[...], bias)
