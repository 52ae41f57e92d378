"""CNN: convolutions and dense layers, what capsules are compared with."""

import dataclasses
import functools
import itertools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jax.typing import ArrayLike

from capsjax._relu import relu
from capsjax.networks._network import Network, Output
from capsjax.networks._sizes import set_sizes
from capsjax.nn import Conv, Dense, Dropout

_HE, _ZEROS = initializers.he_normal(), initializers.zeros


@dataclasses.dataclass(frozen=True)
class CNNConfig:
    """The sizes of a `CNN`.

    Args:
      channels: of the convolutions.
      kernel_sizes: of the convolutions, in pixels.
      pool: after each convolution, the largest of pool × pool pixels is kept; 1 keeps all.
      hidden: units of each hidden dense layer.
      dropout: the probability with which a number before the last layer is set to zero.

    Raises:
      ValueError: if a size is no integer of 1 or more, sizes do not fit each other, or `dropout` is
        out of range.
    """

    name: ClassVar[str] = "cnn"
    channels: tuple[int, ...] = (32, 64, 128)
    kernel_sizes: tuple[int, ...] = (5, 3, 3)
    pool: int = 2
    hidden: tuple[int, ...] = (256,)
    dropout: float = 0.3

    def __post_init__(self) -> None:
        set_sizes(self, "channels", "kernel_sizes", "pool", "hidden")
        if not len(self.channels) == len(self.kernel_sizes) >= 1:
            raise ValueError(
                "CNN: channels and kernel_sizes are one for each convolution, got "
                f"{self.channels} and {self.kernel_sizes}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"CNN: dropout is at least 0 and below 1, got {self.dropout}")

    def build(
        self, image_shape: tuple[int, int, int], num_classes: int, *, rngs: nnx.Rngs
    ) -> "CNN":
        """Builds the network for images (H, W, C) of `num_classes` classes."""
        return CNN(image_shape, num_classes, config=self, rngs=rngs)


# The baselines of Sabour, Frosst, Hinton, 2017, as recalled. Padding and pooling follow from the
# numbers of parameters that the paper gives, 35.4 M (§5) and 24.56 M (§6); 0.5 is the usual rate.
MNIST_BASELINE = CNNConfig((256, 256, 128), (5, 5, 5), pool=1, hidden=(328, 192), dropout=0.5)
MULTI_MNIST_BASELINE = CNNConfig((512, 256), (9, 5), hidden=(1024,), dropout=0)


class CNN(Network):
    """A convolutional network without capsules: convolutions → dense layers → logits.

    Each convolution keeps the size of its images by zeros around them and is followed by a ReLU and
    max pooling; each hidden dense layer by a ReLU; dropout precedes the last layer.

    Args:
      image_shape: (H, W, C); the size of every layer follows from it.
      num_classes: j.
      config: the sizes, such as `capsjax.networks.cnn.MNIST_BASELINE`.
      rngs: its stream `params` draws the initial values and the first seed of the dropout.
      **sizes: fields of `CNNConfig` that shall differ from `config`.

    Called with images [..., H, W, C], pixels between 0 and 1, returns an `Output` whose scores are
    the logits of `capsjax.cross_entropy`, without capsules and reconstruction. Dropout acts in
    training (`train()`), not in evaluation (`eval()`).

    Raises:
      ValueError: if the image is too small for the pooling, or an argument is out of range; when
        called, if the images have another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import capsjax
      >>> net = capsjax.CNN((24, 20, 3), num_classes=5, rngs=nnx.Rngs(0))
      >>> net(jnp.ones((2, 24, 20, 3))).scores.shape
      (2, 5)

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, §5 and §6.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (28, 28, 1),
        num_classes: int = 10,
        *,
        config: CNNConfig = CNNConfig(),
        rngs: nnx.Rngs,
        **sizes: Any,
    ):
        config = dataclasses.replace(config, **sizes)
        super().__init__(config, image_shape, num_classes)
        grid = _grid_shape(image_shape, num_classes, config)
        depths = itertools.pairwise((image_shape[2], *config.channels))
        self.convs = nnx.List(
            Conv((size, size, *depth), _HE, _ZEROS, rngs=rngs)
            for size, depth in zip(config.kernel_sizes, depths, strict=True)
        )
        units = (math.prod(grid) * config.channels[-1], *config.hidden, num_classes)
        self.dense = nnx.List(
            Dense(shape, _HE, _ZEROS, rngs=rngs) for shape in itertools.pairwise(units)
        )
        self.dropout = Dropout(config.dropout, rngs=rngs)

    def __call__(self, images: ArrayLike, labels: ArrayLike | None = None) -> Output:
        images = jnp.asarray(images)
        self.check_images(images)
        x = images
        for conv, size in zip(self.convs, self.config.kernel_sizes, strict=True):
            x = _pool(relu(conv(_pad(x, size))), self.config.pool)
        x = x.reshape(*x.shape[:-3], -1)
        *hidden, last = self.dense
        for dense in hidden:
            x = relu(dense(x))
        return Output(last(self.dropout(x)), None, None)


def _grid_shape(
    image_shape: tuple[int, int, int], num_classes: int, config: CNNConfig
) -> tuple[int, int]:
    """Returns rows and columns of the last map."""
    height, width, depth = image_shape
    for _ in config.channels:
        height, width = height // config.pool, width // config.pool
    if min(height, width, depth, num_classes) < 1:
        times, pool = len(config.channels), config.pool
        raise ValueError(
            f"CNN: got images of {image_shape[0]}×{image_shape[1]}×{depth} in {num_classes} "
            f"classes; pooling {times} times by {pool}×{pool} needs at least "
            f"{pool**times}×{pool**times} pixels, one channel and one class"
        )
    return height, width


def _pad(x: jax.Array, size: int) -> jax.Array:
    """Adds zeros around images [..., H, W, C], so that a valid convolution keeps their size."""
    around = ((size - 1) // 2, size // 2)
    return jnp.pad(x, (*[(0, 0)] * (x.ndim - 3), around, around, (0, 0)))


def _pool(x: jax.Array, size: int) -> jax.Array:
    """Takes the largest of each size × size pixels of images [..., H, W, C]; drops a rest."""
    rows, columns = (n // size * size for n in x.shape[-3:-1])
    starts = itertools.product(range(size), repeat=2)
    # On a CPU in two thirds of the time that `lax.reduce_window` and its gradient take.
    return functools.reduce(
        jnp.maximum, [x[..., p:rows:size, q:columns:size, :] for p, q in starts]
    )
