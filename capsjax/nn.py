"""Flax NNX modules: they hold the parameters and call the functions."""

import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jax.typing import ArrayLike

from capsjax._conv import conv
from capsjax._decoder import decode, mask
from capsjax._primary import Grouping, primary_capsules
from capsjax._routing import check_routings, dense_capsules
from capsjax._vectors import length

Initializer = initializers.Initializer


class CapsNetOutput(NamedTuple):
    """What CapsNet computes."""

    lengths: jax.Array  # |v| [..., j]: the class scores
    capsules: jax.Array  # v [..., j, d]
    reconstruction: jax.Array  # [..., H, W, C], pixels between 0 and 1


class Prediction(NamedTuple):
    """What CapsNet says of images."""

    classes: jax.Array  # [...] int32: the class of the longest capsule
    lengths: jax.Array  # |v| [..., j]
    reconstruction: jax.Array  # [..., H, W, C], pixels between 0 and 1


class Affine(nnx.Module):
    """A kernel and a bias, of a convolution or of a dense layer.

    kernel [..., in, out], bias [out]
    """

    def __init__(self, shape: tuple[int, ...], kernel_init, bias_init, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(bias_init(rngs.params(), shape[-1:], jnp.float32))


class PrimaryCaps(nnx.Module):
    """Primary capsules, `capsjax.primary_capsules` with its parameters.

    u = squash(coupling · (kernel ∗ x) + bias)

    Args:
      in_channels: C.
      out_channels: types·dim_caps.
      dim_caps: k, the numbers in a capsule.
      kernel_size: pixels, the same both ways.
      strides: pixels, the same both ways.
      grouping: as in `capsjax.primary_capsules`.
      coupling: as in `capsjax.primary_capsules`.
      kernel_init: U(±1/√fan_in) by default, as in PyTorch.
      bias_init: the same.
      rngs: the stream `params` is drawn from.

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
        uniform = fan_in_uniform(kernel_size * kernel_size * in_channels)
        self.conv = Affine(shape, kernel_init or uniform, bias_init or uniform, rngs=rngs)
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

    v = routing(W u), as `capsjax.dense_capsules` with its parameters

    Args:
      in_num_caps: the number of i.
      in_dim_caps: k.
      out_num_caps: the number of j.
      out_dim_caps: d.
      routings: as in `capsjax.routing`.
      use_bias: adds a bias [j, d], 0.1 at first, to s in every iteration.
      stop_gradient: as in `capsjax.routing`.
      weight_init: of W [j, i, d, k]; 0.01 · N(0, 1) by default.
      rngs: the stream `params` is drawn from.

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
        routings: int = 3,
        *,
        use_bias: bool = False,
        stop_gradient: bool = True,
        weight_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        shape = (out_num_caps, in_num_caps, out_dim_caps, in_dim_caps)
        weight_init = weight_init or initializers.normal(0.01)
        self.weight = nnx.Param(weight_init(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.full((out_num_caps, out_dim_caps), 0.1)) if use_bias else None
        self.routings, self.stop_gradient = routings, stop_gradient

    def __call__(self, u: ArrayLike) -> jax.Array:
        return dense_capsules(
            u,
            self.weight[...],
            self.routings,
            bias=None if self.bias is None else self.bias[...],
            stop_gradient=self.stop_gradient,
        )


class CapsNet(nnx.Module):
    """CapsNet: convolution → primary capsules → class capsules → decoder.

    |v| scores the classes; the decoder draws the image from the capsule of the label.

    Args:
      image_shape: (H, W, C); every layer's size follows from it.
      classes: the number of classes.
      routings: iterations of routing by agreement.
      channels, kernel_size, types, dim_primary, dim_class, hidden, grouping, primary_coupling,
        routing_bias, stop_gradient, init: the architecture; `capsjax.presets.Model` says what each
        is, and `CapsNet(..., **dataclasses.asdict(capsjax.presets.PAPER.model))` takes a preset's.
      rngs: the stream `params` is drawn from.

    Called with images [..., H, W, C], pixels between 0 and 1, and labels as in `capsjax.mask`,
    returns `CapsNetOutput`.

    Raises:
      ValueError: if the image is too small for the convolutions, or an argument is out of range;
        when called, if the images have another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import capsjax
      >>> net = capsjax.nn.CapsNet((24, 20, 3), classes=5, channels=16, types=2, rngs=nnx.Rngs(0))
      >>> output = net(jnp.ones((2, 24, 20, 3)))
      >>> output.lengths.shape, output.capsules.shape, output.reconstruction.shape
      ((2, 5), (2, 5, 16), (2, 24, 20, 3))

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, figures 1 and 2.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (28, 28, 1),
        classes: int = 10,
        routings: int = 3,
        *,
        channels: int = 256,
        kernel_size: int = 9,
        types: int = 32,
        dim_primary: int = 8,
        dim_class: int = 16,
        hidden: tuple[int, ...] = (512, 1024),
        grouping: Grouping = "channels",
        primary_coupling: float = 1.0,
        routing_bias: bool = False,
        stop_gradient: bool = True,
        init: str = "uniform",
        rngs: nnx.Rngs,
    ):
        height, width, depth = image_shape
        grid = [(size - kernel_size + 1 - kernel_size) // 2 + 1 for size in (height, width)]
        if min(*grid, depth, classes) < 1:
            raise ValueError(
                f"CapsNet: images of {height}×{width}×{depth} in {classes} classes; two "
                f"convolutions of {kernel_size}×{kernel_size} need images of at least "
                f"{2 * kernel_size - 1}×{2 * kernel_size - 1} pixels, one channel and one class"
            )
        sizes = (channels, kernel_size, types, dim_primary, dim_class, *hidden)
        if min(sizes) < 1:
            raise ValueError(f"CapsNet: sizes are 1 or more, got {sizes}")
        check_routings(routings)
        if init not in _INITS:
            raise ValueError(f"CapsNet: init is one of {tuple(_INITS)}, got {init!r}")
        self.image_shape = (height, width, depth)
        inits = _INITS[init]

        fan_in = kernel_size * kernel_size * depth
        self.conv1 = Affine(
            (kernel_size, kernel_size, depth, channels), *inits(fan_in, 0.05), rngs=rngs
        )
        kernel_init, bias_init = inits(kernel_size * kernel_size * channels, 0.1)
        self.primary = PrimaryCaps(
            channels,
            types * dim_primary,
            dim_primary,
            kernel_size=kernel_size,
            grouping=grouping,
            coupling=primary_coupling,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        self.classes = DenseCaps(
            grid[0] * grid[1] * types,
            dim_primary,
            classes,
            dim_class,
            routings,
            use_bias=routing_bias,
            stop_gradient=stop_gradient,
            weight_init=_WEIGHT_INITS[init],
            rngs=rngs,
        )
        units = (classes * dim_class, *hidden, height * width * depth)
        self.decoder = nnx.List(
            Affine((n_in, n_out), *inits(n_in, 0.1), rngs=rngs)
            for n_in, n_out in itertools.pairwise(units)
        )

    def __call__(self, images: ArrayLike, labels: ArrayLike | None = None) -> CapsNetOutput:
        images = jnp.asarray(images)
        self.check_images(images)
        x = jax.nn.relu(conv(images, self.conv1.kernel[...], self.conv1.bias[...]))
        capsules = self.classes(self.primary(x))
        layers = [(layer.kernel[...], layer.bias[...]) for layer in self.decoder]
        pixels = decode(layers, mask(capsules, labels))
        return CapsNetOutput(length(capsules), capsules, pixels.reshape(images.shape))

    def check_images(self, images: jax.Array) -> None:
        """Raises ValueError unless images are [..., H, W, C] of this network's size."""
        if images.shape[-3:] != self.image_shape:
            raise ValueError(
                f"CapsNet: expected images [..., {', '.join(map(str, self.image_shape))}], "
                f"got {list(images.shape)}"
            )


def predict(model: CapsNet, images: ArrayLike) -> Prediction:
    """Classifies one image or many, and draws what the network saw.

    class = argmax_j |v_j|

    Args:
      model: a `CapsNet`.
      images: [..., H, W, C], uint8 from 0 to 255 or float from 0 to 1; [..., H, W] for a network
        of one channel.

    Returns:
      `Prediction`: classes [...] int32, lengths [..., j], reconstruction [..., H, W, C].

    Raises:
      ValueError: if the images have another shape than the network's.

    Example:
      >>> import numpy as np
      >>> from flax import nnx
      >>> import capsjax
      >>> net = capsjax.nn.CapsNet(channels=16, types=2, rngs=nnx.Rngs(0))
      >>> capsjax.predict(net, np.zeros((28, 28), np.uint8)).lengths.shape
      (10,)
    """
    images = jnp.asarray(images)
    if model.image_shape[-1] == 1 and images.shape[-2:] == model.image_shape[:2]:
        images = images[..., None]
    model.check_images(images)
    return _predict(*nnx.split(model), images)


# Jitted, unlike the functions that it is made of: op by op it would compile a hundred times.
@partial(jax.jit, static_argnums=0)
def _predict(graphdef: nnx.GraphDef, params: nnx.State, images: jax.Array) -> Prediction:
    output = nnx.merge(graphdef, params)(pixels_to_unit(images))
    classes = jnp.argmax(output.lengths, -1).astype(jnp.int32)
    return Prediction(classes, output.lengths, output.reconstruction)


def pixels_to_unit(images: jax.Array) -> jax.Array:
    """Turns integer pixels from 0 to 255 into float32 from 0 to 1; floats stay as they are."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    return images.astype(jnp.float32) / 255


def fan_in_uniform(fan_in: int) -> Initializer:
    """U(±1/√fan_in), PyTorch's default for the kernel and the bias of a layer."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _uniform(fan_in: int, stddev: float) -> tuple[Initializer, Initializer]:
    return fan_in_uniform(fan_in), fan_in_uniform(fan_in)


def _truncated_normal(fan_in: int, stddev: float) -> tuple[Initializer, Initializer]:
    return initializers.truncated_normal(stddev), initializers.constant(0.1)


# (fan_in, stddev) -> initialisers of a kernel and its bias.
_INITS = {"uniform": _uniform, "truncated_normal": _truncated_normal}
_WEIGHT_INITS = {
    "uniform": initializers.normal(0.01),
    "truncated_normal": initializers.truncated_normal(0.1),
}
