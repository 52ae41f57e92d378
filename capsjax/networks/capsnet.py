"""CapsNet: the network of "Dynamic Routing Between Capsules"."""

import dataclasses
import itertools
import math
from typing import Any, ClassVar, Literal, get_args

import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jax.typing import ArrayLike

from capsjax._primary import Grouping
from capsjax._relu import relu
from capsjax._routing import Agreement, Routing
from capsjax._vectors import length
from capsjax.networks._network import DrawingNetwork, Output
from capsjax.networks._sizes import set_sizes
from capsjax.nn import (
    Affine,
    Conv,
    Decoder,
    DenseCaps,
    Initializer,
    PrimaryCaps,
    as_routing,
    fan_in_uniform,
)

Init = Literal["uniform", "truncated_normal"]


@dataclasses.dataclass(frozen=True)
class CapsNetConfig:
    """The sizes of a `CapsNet`.

    Args:
      channels: of the first convolution.
      kernel_size: of both convolutions, in pixels.
      types: of primary capsules.
      dim_primary: k, the numbers in a primary capsule.
      dim_class: d, the numbers in a class capsule.
      hidden: units of each hidden layer of the decoder.
      grouping: as in `capsjax.primary_capsules`.
      primary_coupling: `coupling` in `capsjax.primary_capsules`.
      routing: how primary capsules become class capsules; an int means that many iterations of
        routing by agreement.
      init: initial values; "uniform": W 0.01 · N(0, 1) and all else as in PyTorch,
        U(±1/√fan_in); "truncated_normal": as in the authors' released code.

    Raises:
      ValueError: if a size is no integer of 1 or more, or another argument is out of range.
    """

    name: ClassVar[str] = "capsnet"
    channels: int = 256
    kernel_size: int = 9
    types: int = 32
    dim_primary: int = 8
    dim_class: int = 16
    hidden: tuple[int, ...] = (512, 1024)
    grouping: Grouping = "channels"
    primary_coupling: float = 1.0
    routing: Routing | int = Agreement()  # noqa: RUF009  frozen
    init: Init = "uniform"

    def __post_init__(self) -> None:
        object.__setattr__(self, "routing", as_routing(self.routing))
        set_sizes(self, "channels", "kernel_size", "types", "dim_primary", "dim_class", "hidden")
        for name, known in (("grouping", get_args(Grouping)), ("init", get_args(Init))):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"CapsNet: {name} is one of {known}, got {value!r}")
        if not 0 < self.primary_coupling < math.inf:
            raise ValueError(
                f"CapsNet: primary_coupling is a number above 0, got {self.primary_coupling}"
            )

    def build(
        self, image_shape: tuple[int, int, int], num_classes: int, *, rngs: nnx.Rngs
    ) -> "CapsNet":
        """Builds the network for images (H, W, C) of `num_classes` classes."""
        return CapsNet(image_shape, num_classes, config=self, rngs=rngs)


class CapsNet(DrawingNetwork):
    """CapsNet: convolution → primary capsules → class capsules → decoder.

    |v| scores the classes; the decoder draws the image from the capsule of the label.

    Args:
      image_shape: (H, W, C); the size of every layer follows from it.
      num_classes: j.
      routings: iterations of routing by agreement, or any `capsjax.Routing`; None: the config's.
      config: the sizes, such as `capsjax.presets.PAPER.network`.
      rngs: its stream `params` draws the initial values.
      **sizes: fields of `CapsNetConfig` that shall differ from `config`.

    Called with images [..., H, W, C], pixels between 0 and 1, and labels as in `capsjax.mask`,
    returns an `Output`.

    Raises:
      ValueError: if the image is too small for the convolutions, or an argument is out of range;
        when called, if the images have another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import capsjax
      >>> net = capsjax.CapsNet((24, 20, 3), num_classes=5, channels=16, types=2, rngs=nnx.Rngs(0))
      >>> output = net(jnp.ones((2, 24, 20, 3)))
      >>> output.scores.shape, output.capsules.shape, output.reconstruction.shape
      ((2, 5), (2, 5, 16), (2, 24, 20, 3))

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, figures 1 and 2.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (28, 28, 1),
        num_classes: int = 10,
        routings: int | Routing | None = None,
        *,
        config: CapsNetConfig = CapsNetConfig(),
        rngs: nnx.Rngs,
        **sizes: Any,
    ):
        if routings is not None:
            if "routing" in sizes:
                raise TypeError("CapsNet: give routings or routing, not both")
            sizes["routing"] = routings
        config = dataclasses.replace(config, **sizes)
        super().__init__(config, image_shape, num_classes)
        depth = image_shape[2]
        grid = _grid_shape(image_shape, num_classes, config.kernel_size)
        kernel, channels = (config.kernel_size,) * 2, config.channels
        draw = _INITS[config.init]

        fan_in = math.prod(kernel) * depth
        self.conv1 = Conv((*kernel, depth, channels), *draw(fan_in, 0.05), rngs=rngs)
        kernel_init, bias_init = draw(math.prod(kernel) * channels, 0.1)
        self.primary = PrimaryCaps(
            channels,
            config.types * config.dim_primary,
            config.dim_primary,
            kernel_size=config.kernel_size,
            grouping=config.grouping,
            coupling=config.primary_coupling,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        self.class_caps = DenseCaps(
            math.prod(grid) * config.types,
            config.dim_primary,
            num_classes,
            config.dim_class,
            config.routing,
            weight_init=_WEIGHT_INITS[config.init],
            rngs=rngs,
        )
        units = (num_classes * config.dim_class, *config.hidden, math.prod(image_shape))
        self.decoder = Decoder(
            Affine((n_in, n_out), *draw(n_in, 0.1), rngs=rngs)
            for n_in, n_out in itertools.pairwise(units)
        )

    def __call__(self, images: ArrayLike, labels: ArrayLike | None = None) -> Output:
        images = jnp.asarray(images)
        self.check_images(images)
        capsules = self.class_caps(self.primary(relu(self.conv1(images))))
        return Output(length(capsules), capsules, self.decode(capsules, labels))


def _grid_shape(
    image_shape: tuple[int, int, int], num_classes: int, kernel_size: int
) -> tuple[int, int]:
    """Returns rows and columns of primary capsules."""
    height, width, depth = image_shape
    rows, columns = ((size - kernel_size + 1 - kernel_size) // 2 + 1 for size in (height, width))
    if min(rows, columns, depth, num_classes) < 1:
        raise ValueError(
            f"CapsNet: got images of {height}×{width}×{depth} in {num_classes} classes; two "
            f"convolutions of {kernel_size}×{kernel_size} need images of at least "
            f"{2 * kernel_size - 1}×{2 * kernel_size - 1} pixels, one channel and one class"
        )
    return rows, columns


def _draw_uniform(fan_in: int, stddev: float) -> tuple[Initializer, Initializer]:
    return fan_in_uniform(fan_in), fan_in_uniform(fan_in)


def _draw_truncated_normal(fan_in: int, stddev: float) -> tuple[Initializer, Initializer]:
    return initializers.truncated_normal(stddev), initializers.constant(0.1)


# (fan_in, stddev) -> initialisers of a kernel and its bias.
_INITS = {"uniform": _draw_uniform, "truncated_normal": _draw_truncated_normal}
_WEIGHT_INITS = {
    "uniform": initializers.normal(0.01),
    "truncated_normal": initializers.truncated_normal(0.1),
}
