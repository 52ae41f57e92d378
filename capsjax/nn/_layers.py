"""Flax NNX layers: they hold the parameters and call the functions."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jax.typing import ArrayLike

from capsjax._conv import conv
from capsjax._decoder import decode
from capsjax._primary import Grouping, primary_capsules
from capsjax._routing import Agreement, Routing
from capsjax._vectors import float_dtype

Initializer = initializers.Initializer


class Affine(nnx.Module):
    """Kernel and bias of a convolution or of a dense layer.

    Args:
      shape: of the kernel, [..., in, out]; the bias is [out].
      kernel_init: U(±1/√fan_in) by default, as in PyTorch.
      bias_init: likewise.
      rngs: its stream `params` draws the initial values.
    """

    def __init__(
        self,
        shape: Sequence[int],
        kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        uniform = fan_in_uniform(math.prod(shape[:-1]))
        kernel_init, bias_init = kernel_init or uniform, bias_init or uniform
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(bias_init(rngs.params(), shape[-1:], jnp.float32))


class Conv(Affine):
    """A valid convolution, fast on the platform that it is compiled for.

    Called with x [..., H, W, C], returns [..., (H − P) // s + 1, (W − Q) // s + 1, O].
    """

    def __init__(self, *args: Any, strides: int = 1, **options: Any):
        super().__init__(*args, **options)
        self.strides = strides

    def __call__(self, x: jax.Array) -> jax.Array:
        return conv(x, self.kernel[...], self.bias[...], strides=self.strides)


class Dense(Affine):
    """A dense layer.

    Called with x [..., in], returns x · kernel + bias, [..., out], in the dtype of x; of integers,
    in float32.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.dot(x, self.kernel[...], preferred_element_type=jnp.float32)
        return (y + jnp.broadcast_to(self.bias[...], y.shape)).astype(float_dtype(x))


class Dropout(nnx.Module):
    """Sets each number to zero at random in training, and scales the others to keep the mean.

    y = x / (1 − rate) with probability 1 − rate, else 0;   y = x in evaluation, after `eval()`

    A step passes no key to a network. So the seed of the next mask is kept as a batch statistic,
    which each call in training raises by 1: no two steps share a mask, and a resumed run draws the
    masks of an unbroken one. `nnx.Dropout` keeps its key in another kind of variable, which
    `capsjax.train` refuses.

    Args:
      rate: the probability of a zero, at least 0 and below 1.
      rngs: its stream `params` draws the first seed.

    Raises:
      ValueError: if `rate` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import capsjax
      >>> layer = capsjax.nn.Dropout(0.5, rngs=nnx.Rngs(0))
      >>> sorted(set(layer(jnp.ones(100)).tolist()))
      [0.0, 2.0]

    References:
      Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, "Dropout", 2014.
    """

    def __init__(self, rate: float, *, rngs: nnx.Rngs):
        if not 0 <= rate < 1:
            raise ValueError(f"Dropout: rate is at least 0 and below 1, got {rate}")
        self.rate = rate
        self.deterministic = False  # what `train()` and `eval()` set
        self.seed = nnx.BatchStat(jax.random.bits(rngs.params(), (), jnp.uint32))

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.deterministic or not self.rate:
            return x
        seed = self.seed[...]
        self.seed[...] = seed + 1
        kept = jax.random.bernoulli(jax.random.key(seed), 1 - self.rate, x.shape)
        return jnp.where(kept, x / (1 - self.rate), 0)


class PrimaryCaps(nnx.Module):
    """Primary capsules: `capsjax.primary_capsules` with its parameters.

    u = squash(coupling · (kernel ∗ x) + bias)

    Args:
      in_channels: C.
      out_channels: types·dim_caps.
      dim_caps: k, the numbers in a capsule.
      kernel_size: in pixels, the same in both directions.
      strides: in pixels, the same in both directions.
      grouping: as in `capsjax.primary_capsules`.
      coupling: as in `capsjax.primary_capsules`.
      kernel_init: U(±1/√fan_in) by default, as in PyTorch.
      bias_init: likewise.
      rngs: its stream `params` draws the initial values.

    Called with x [..., H, W, C], returns u [..., i, k].

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import capsjax
      >>> layer = capsjax.nn.PrimaryCaps(256, 256, 8, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 20, 20, 256))).shape
      (2, 1152, 8)

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, §4.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dim_caps: int,
        *,
        kernel_size: int = 9,
        strides: int = 2,
        grouping: Grouping = "channels",
        coupling: float = 1.0,
        kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.conv = Affine(shape, kernel_init, bias_init, rngs=rngs)
        self.dim_caps, self.strides = dim_caps, strides
        self.grouping: Grouping = grouping
        self.coupling = coupling

    def __call__(self, x: ArrayLike) -> jax.Array:
        return primary_capsules(
            x,
            self.conv.kernel[...],
            self.conv.bias[...],
            dim=self.dim_caps,
            strides=self.strides,
            grouping=self.grouping,
            coupling=self.coupling,
        )


class DenseCaps(nnx.Module):
    """A capsule layer in which every input capsule predicts every output capsule.

    v = routing(W u)

    Args:
      in_num_caps: the number of i.
      in_dim_caps: k.
      out_num_caps: the number of j.
      out_dim_caps: d.
      routings: iterations of routing by agreement, or any `capsjax.Routing`.
      weight_init: of W [j, i, d, k]; 0.01 · N(0, 1) by default.
      rngs: its stream `params` draws the initial values.

    Called with u [..., i, k], returns v [..., j, d].

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import capsjax
      >>> layer = capsjax.nn.DenseCaps(1152, 8, 10, 16, routings=3, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 1152, 8))).shape
      (2, 10, 16)

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, §4 (DigitCaps).
    """

    def __init__(
        self,
        in_num_caps: int,
        in_dim_caps: int,
        out_num_caps: int,
        out_dim_caps: int,
        routings: int | Routing = 3,
        *,
        weight_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        self.routing = as_routing(routings)
        weight_init = weight_init or initializers.normal(0.01)
        shape = (out_num_caps, in_num_caps, out_dim_caps, in_dim_caps)
        self.weight = nnx.Param(weight_init(rngs.params(), shape, jnp.float32))
        bias = self.routing.initial_bias(out_num_caps, in_num_caps, out_dim_caps)
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, u: ArrayLike) -> jax.Array:
        bias = None if self.bias is None else self.bias[...]
        return self.routing(u, self.weight[...], bias)


class Decoder(nnx.List):
    """The layers that draw an image from masked capsules: `capsjax.decode` with its parameters.

    Args:
      layers: an `Affine` each.

    Called with x [..., j·d], returns pixels [..., H·W·C] between 0 and 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import capsjax
      >>> rngs, sizes = nnx.Rngs(0), [(160, 512), (512, 784)]
      >>> decoder = capsjax.nn.Decoder(capsjax.nn.Affine(size, rngs=rngs) for size in sizes)
      >>> decoder(capsjax.mask(jnp.ones((2, 10, 16)), jnp.array([3, 7]))).shape
      (2, 784)
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        return decode([(layer.kernel[...], layer.bias[...]) for layer in self], x)


def as_routing(routings: int | Routing) -> Routing:
    """Returns routing by agreement for a number of iterations, any other routing as it is.

    Raises:
      ValueError: if it is neither an int of 1 or more nor a `Routing`.
    """
    if not callable(routings) and not isinstance(routings, str):
        return Agreement(routings)
    frozen = getattr(routings, "__dataclass_params__", None)
    needed = hasattr(routings, "name") and hasattr(routings, "initial_bias")
    if isinstance(routings, type) or not needed or frozen is None or not frozen.frozen:
        raise ValueError(
            "layers of vectors take a number of iterations or a routing, an instance of a frozen "
            f"dataclass with name, initial_bias and __call__, got {routings!r}"
        )
    return routings


def fan_in_uniform(fan_in: int) -> Initializer:
    """Returns U(±1/√fan_in), PyTorch's default for the kernel and the bias of a layer."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
