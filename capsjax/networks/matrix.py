"""Matrix capsules: poses that are matrices, and activations, routed by EM."""

import dataclasses
import itertools
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jax.typing import ArrayLike

from capsjax._relu import relu
from capsjax._routing import EM, Capsules
from capsjax.networks._network import Network, Output
from capsjax.networks._sizes import set_sizes
from capsjax.nn import Conv, ConvEMCaps, EMCaps, PrimaryEMCaps, as_em


@dataclasses.dataclass(frozen=True)
class MatrixCapsNetConfig:
    """The sizes of a `MatrixCapsNet`.

    Args:
      channels: of the first convolution, A in the paper.
      types: of primary capsules and of each layer of convolutional ones, (B, C, D) in the paper.
      kernel_sizes: of the first convolution and of each layer of convolutional capsules.
      strides: likewise.
      side: the rows and columns of a pose matrix.
      routing: how capsules become those of the next layer; an int means that many iterations of EM.

    Raises:
      ValueError: if a size is no integer of 1 or more, sizes do not fit each other, or `routing` is
        not EM.
    """

    name: ClassVar[str] = "matrix"
    channels: int = 64
    types: tuple[int, ...] = (8, 16, 16)
    kernel_sizes: tuple[int, ...] = (5, 3, 3)
    strides: tuple[int, ...] = (2, 2, 1)
    side: int = 4
    routing: EM | int = EM()  # noqa: RUF009  frozen

    def __post_init__(self) -> None:
        object.__setattr__(self, "routing", as_em(self.routing))
        set_sizes(self, "channels", "types", "kernel_sizes", "strides", "side")
        if not len(self.types) == len(self.kernel_sizes) == len(self.strides) >= 1:
            raise ValueError(
                "MatrixCapsNet: kernel_sizes and strides are one for the convolution and one for "
                f"each of types but the first, got {self.kernel_sizes}, {self.strides} and "
                f"{self.types}"
            )
        if self.side < 2:
            raise ValueError(f"MatrixCapsNet: the side of a matrix is 2 or more, got {self.side}")

    def build(
        self, image_shape: tuple[int, int, int], num_classes: int, *, rngs: nnx.Rngs
    ) -> "MatrixCapsNet":
        """Builds the network for images (H, W, C) of `num_classes` classes."""
        return MatrixCapsNet(image_shape, num_classes, config=self, rngs=rngs)


class MatrixCapsNet(Network):
    """Matrix capsules: convolution → primary → two layers of convolutional → class capsules.

    Each capsule has a pose, a 4×4 matrix, and an activation; each layer is routed by EM. The
    activations of the class capsules are the scores. 68,308 parameters on MNIST, 68,618 on
    smallNORB: the convolution has biases, the primary capsules have none, and each type of a routed
    capsule has one β_u and one β_a.

    Args:
      image_shape: (H, W, C); the size of every layer follows from it.
      num_classes: j.
      config: the sizes.
      rngs: its stream `params` draws the initial values.
      **sizes: fields of `MatrixCapsNetConfig` that shall differ from `config`.

    Called with images [..., H, W, C], pixels between 0 and 1, returns an `Output`: capsules are the
    poses [..., j, 16], column by column; there is no reconstruction.

    Raises:
      ValueError: if the image is too small for the windows, or an argument is out of range; when
        called, if the images have another shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import capsjax
      >>> net = capsjax.MatrixCapsNet((20, 20, 3), num_classes=5, channels=8, rngs=nnx.Rngs(0))
      >>> output = jax.eval_shape(net, jnp.ones((2, 20, 20, 3)))      # net(images) computes it
      >>> output.scores.shape, output.capsules.shape
      ((2, 5), (2, 5, 16))

    References:
      Hinton, Sabour, Frosst, "Matrix capsules with EM routing", 2018; the authors' code:
      google-research/capsule_em; Gritzman, 2019, arXiv:1907.00652.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (28, 28, 1),
        num_classes: int = 10,
        *,
        config: MatrixCapsNetConfig = MatrixCapsNetConfig(),
        rngs: nnx.Rngs,
        **sizes: Any,
    ):
        config = dataclasses.replace(config, **sizes)
        super().__init__(config, image_shape, num_classes)
        _check_shape(image_shape, num_classes, config)
        kernel_size, *kernel_sizes = config.kernel_sizes
        strides, *caps_strides = config.strides
        self.conv = Conv(
            (kernel_size, kernel_size, image_shape[2], config.channels),
            initializers.normal(0.05),
            initializers.constant(0.1),
            strides=strides,
            rngs=rngs,
        )
        self.primary = PrimaryEMCaps(config.channels, config.types[0], config.side**2, rngs=rngs)
        options: dict[str, Any] = {"side": config.side, "routing": config.routing, "rngs": rngs}
        layers = zip(itertools.pairwise(config.types), kernel_sizes, caps_strides, strict=True)
        self.conv_caps = nnx.List(
            ConvEMCaps(*types, kernel_size=size, strides=step, **options)
            for types, size, step in layers
        )
        self.class_caps = EMCaps(config.types[-1], num_classes, **options)

    def __call__(self, images: ArrayLike, labels: ArrayLike | None = None) -> Output:
        images = jnp.asarray(images)
        self.check_images(images)
        capsules: Capsules = self.primary(relu(self.conv(images)))
        for layer in self.conv_caps:
            capsules = layer(capsules)
        poses, activations = self.class_caps(capsules)
        return Output(activations, poses, None)


def _check_shape(
    image_shape: tuple[int, int, int], num_classes: int, config: MatrixCapsNetConfig
) -> None:
    """Raises ValueError unless at least one position is left for the class capsules."""
    needed = 1
    for size, strides in zip(config.kernel_sizes[::-1], config.strides[::-1], strict=True):
        needed = (needed - 1) * strides + size
    height, width, depth = image_shape
    if min(height, width) < needed or min(depth, num_classes) < 1:
        raise ValueError(
            f"MatrixCapsNet: got images of {height}×{width}×{depth} in {num_classes} classes; "
            f"windows of {config.kernel_sizes} with strides {config.strides} need images of at "
            f"least {needed}×{needed} pixels, one channel and one class"
        )
