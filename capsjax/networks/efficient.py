"""Efficient-CapsNet: few capsules, routed by self-attention."""

import dataclasses
import itertools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jax.typing import ArrayLike

from capsjax._relu import relu
from capsjax._routing import Routing, SelfAttention
from capsjax._vectors import length, squash_exp
from capsjax.networks._network import DrawingNetwork, Output
from capsjax.networks._sizes import set_sizes
from capsjax.nn import Affine, Conv, Decoder, DenseCaps, as_routing

_HE, _GLOROT = initializers.he_normal(), initializers.glorot_normal()
_ZEROS = initializers.zeros


@dataclasses.dataclass(frozen=True)
class EfficientCapsNetConfig:
    """The sizes of an `EfficientCapsNet`.

    Args:
      channels: of the convolutions; the last ones become the primary capsules.
      kernel_sizes: of the convolutions, in pixels.
      strides: of the convolutions, in pixels.
      dim_primary: k, the numbers in a primary capsule.
      dim_class: d, the numbers in a class capsule.
      hidden: units of each hidden layer of the decoder.
      routing: how primary capsules become class capsules; an int means that many iterations of
        routing by agreement.
      momentum: of the batch norms' running statistics.

    Raises:
      ValueError: if a size is no integer of 1 or more, sizes do not fit each other, or `momentum`
        is out of range.
    """

    name: ClassVar[str] = "efficient"
    channels: tuple[int, ...] = (32, 64, 64, 128)
    kernel_sizes: tuple[int, ...] = (5, 3, 3, 3)
    strides: tuple[int, ...] = (1, 1, 1, 2)
    dim_primary: int = 8
    dim_class: int = 16
    hidden: tuple[int, ...] = (512, 1024)
    routing: Routing | int = SelfAttention()  # noqa: RUF009  frozen
    momentum: float = 0.99

    def __post_init__(self) -> None:
        object.__setattr__(self, "routing", as_routing(self.routing))
        set_sizes(self, "channels", "kernel_sizes", "strides", "hidden", "dim_primary", "dim_class")
        if not len(self.channels) == len(self.kernel_sizes) == len(self.strides) >= 1:
            raise ValueError(
                "EfficientCapsNet: channels, kernel_sizes and strides are one for each "
                f"convolution, got {self.channels}, {self.kernel_sizes} and {self.strides}"
            )
        if self.channels[-1] % self.dim_primary:
            raise ValueError(
                f"EfficientCapsNet: primary capsules of {self.dim_primary} numbers do not divide "
                f"{self.channels[-1]} channels"
            )
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"EfficientCapsNet: momentum is at least 0 and below 1, got {self.momentum}"
            )

    def build(
        self, image_shape: tuple[int, int, int], num_classes: int, *, rngs: nnx.Rngs
    ) -> "EfficientCapsNet":
        """Builds the network for images (H, W, C) of `num_classes` classes."""
        return EfficientCapsNet(image_shape, num_classes, config=self, rngs=rngs)


class EfficientCapsNet(DrawingNetwork):
    """Efficient-CapsNet: convolutions → 16 primary capsules → class capsules → decoder.

    Each convolution is followed by a ReLU and a batch norm. A primary capsule is 8 channels, each
    summed over the whole map with weights of its own (a depthwise convolution), and squashed by
    `capsjax.squash_exp`. 161,824 parameters on MNIST, without the decoder's.

    Args:
      image_shape: (H, W, C); the size of every layer follows from it.
      num_classes: j.
      config: the sizes.
      rngs: its stream `params` draws the initial values.
      **sizes: fields of `EfficientCapsNetConfig` that shall differ from `config`.

    Called with images [..., H, W, C], pixels between 0 and 1, and labels as in `capsjax.mask`,
    returns an `Output`. The batch norms use the batch's statistics in training (`train()`), their
    running ones in evaluation (`eval()`).

    Raises:
      ValueError: if the image is too small for the convolutions, or an argument is out of range;
        when called, if the images have another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import capsjax
      >>> net = capsjax.EfficientCapsNet((20, 20, 3), num_classes=5, rngs=nnx.Rngs(0))
      >>> prediction = capsjax.predict(net, jnp.ones((2, 20, 20, 3)))
      >>> prediction.scores.shape, prediction.reconstruction.shape
      ((2, 5), (2, 20, 20, 3))

    References:
      Mazzia, Salvetti, Chiaberge, "Efficient-CapsNet: Capsule Network with Self-Attention Routing",
      2021, arXiv:2101.12491; EscVM/Efficient-CapsNet.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (28, 28, 1),
        num_classes: int = 10,
        *,
        config: EfficientCapsNetConfig = EfficientCapsNetConfig(),
        rngs: nnx.Rngs,
        **sizes: Any,
    ):
        config = dataclasses.replace(config, **sizes)
        super().__init__(config, image_shape, num_classes)
        grid = _grid_shape(image_shape, num_classes, config)
        depths = itertools.pairwise((image_shape[2], *config.channels))
        kernels = zip(depths, config.kernel_sizes, config.strides, strict=True)
        self.convs = nnx.List(
            Conv((size, size, *depth), _HE, _ZEROS, strides=strides, rngs=rngs)
            for depth, size, strides in kernels
        )
        self.norms = nnx.List(
            nnx.BatchNorm(channels, momentum=config.momentum, epsilon=1e-3, rngs=rngs)
            for channels in config.channels
        )
        features = config.channels[-1]
        # Of a depthwise kernel, as Keras counts: `features` input channels, one output each.
        glorot = initializers.glorot_uniform(in_axis=-2, out_axis=-1)
        depthwise = glorot(rngs.params(), (*grid, features, 1), jnp.float32)
        self.depthwise = nnx.Param(depthwise[..., 0])
        self.depthwise_bias = nnx.Param(jnp.zeros(features, jnp.float32))
        self.class_caps = DenseCaps(
            features // config.dim_primary,
            config.dim_primary,
            num_classes,
            config.dim_class,
            config.routing,
            # As Keras counts the fan-in of [j, i, k, d]: j · i · k.
            weight_init=initializers.he_normal(in_axis=-1, out_axis=-2, batch_axis=()),
            rngs=rngs,
        )
        units = [num_classes * config.dim_class, *config.hidden, math.prod(image_shape)]
        inits = [*(_HE for _ in config.hidden), _GLOROT]
        self.decoder = Decoder(
            Affine(shape, init, _ZEROS, rngs=rngs)
            for shape, init in zip(itertools.pairwise(units), inits, strict=True)
        )

    def __call__(self, images: ArrayLike, labels: ArrayLike | None = None) -> Output:
        images = jnp.asarray(images)
        self.check_images(images)
        capsules = self.class_caps(self.primary_capsules(images))
        return Output(length(capsules), capsules, self.decode(capsules, labels))

    def primary_capsules(self, images: jax.Array) -> jax.Array:
        """Computes the primary capsules [..., i, k] of images [..., H, W, C]."""
        x = images
        for layer, norm in zip(self.convs, self.norms, strict=True):
            x = norm(relu(layer(x))).astype(images.dtype)  # the statistics are float32
        kernel, bias = self.depthwise[...].astype(x.dtype), self.depthwise_bias[...]
        s = jnp.einsum("...hwc,hwc->...c", x, kernel, preferred_element_type=jnp.float32)
        s = s + jnp.expand_dims(bias, range(s.ndim - 1))
        u = squash_exp(s.reshape(*s.shape[:-1], -1, self.config.dim_primary))
        return u.astype(images.dtype)


def _grid_shape(
    image_shape: tuple[int, int, int], num_classes: int, config: EfficientCapsNetConfig
) -> tuple[int, int]:
    """Returns rows and columns of the last convolution's map."""
    height, width, depth = image_shape
    for size, strides in zip(config.kernel_sizes, config.strides, strict=True):
        height, width = ((n - size) // strides + 1 for n in (height, width))
    if min(height, width, depth, num_classes) < 1:
        raise ValueError(
            "EfficientCapsNet: got images of {}×{}×{} in {} classes, which the convolutions of {} "
            "pixels reduce to nothing; it needs larger images, one channel and one class".format(
                *image_shape, num_classes, config.kernel_sizes
            )
        )
    return height, width
