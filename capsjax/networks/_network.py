"""What every network is: its output, its base class, and how it predicts."""

from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from capsjax._decoder import mask
from capsjax._labels import pick_highest
from capsjax._pixels import to_unit_interval
from capsjax.nn import Decoder


class Output(NamedTuple):
    """The output of a network.

    Attributes:
      scores: [..., j], the class scores: |v_j|, an activation, or a logit.
      capsules: [..., j, d], the class capsules; None without capsules.
      reconstruction: [..., H, W, C], pixels from 0 to 1; None without a decoder.
    """

    scores: jax.Array
    capsules: jax.Array | None
    reconstruction: jax.Array | None

    @property
    def predicted(self) -> jax.Array:
        """The class of the highest score, int32 [...]."""
        return pick_highest(self.scores)


class NetworkConfig(Protocol):
    """The sizes of a network: a frozen dataclass, each size with its default.

    A saved network stores `name` and the fields; `capsjax.NETWORKS[name]` makes the config again.
    """

    name: ClassVar[str]

    def build(
        self, image_shape: tuple[int, int, int], num_classes: int, *, rngs: nnx.Rngs
    ) -> "Network":
        """Builds the network for images (H, W, C) of `num_classes` classes."""


class Network(nnx.Module):
    """The base of all networks.

    A network defines `__call__`; one with a decoder defines `decode` as well.

    Args:
      config: the sizes; static and hashable, so a part of the graph definition.
      image_shape: (H, W, C).
      num_classes: j.

    Raises:
      ValueError: if `image_shape` is another tuple.
    """

    def __init__(self, config: Any, image_shape: tuple[int, int, int], num_classes: int):
        self.config = config
        if len(image_shape) != 3:
            raise ValueError(
                f"{type(self).__name__}: expected image_shape (H, W, C), got {tuple(image_shape)}"
            )
        height, width, channels = image_shape
        self.image_shape = (height, width, channels)
        self.num_classes = num_classes

    def __call__(self, images: jax.Array, labels: ArrayLike | None = None) -> Output:
        """Computes the `Output` of images [..., H, W, C], pixels from 0 to 1.

        A decoder draws the capsules of `labels`, class numbers [...] or k-hot [..., j]; without
        labels, the capsule of the highest score.
        """
        raise TypeError(f"{type(self).__name__} defines no __call__")

    def decode(self, capsules: jax.Array, labels: ArrayLike | None = None) -> jax.Array:
        """Draws images [..., H, W, C] from class capsules [..., j, d], as `__call__` does."""
        raise TypeError(f"{type(self).__name__} has no decoder")

    def check_images(self, images: jax.Array) -> None:
        """Raises ValueError unless images are [..., H, W, C] of this network's size."""
        if images.shape[-3:] != self.image_shape:
            raise ValueError(
                f"{type(self).__name__}: expected images "
                f"[..., {', '.join(map(str, self.image_shape))}], got {list(images.shape)}"
            )


class DrawingNetwork(Network):
    """A network whose attribute `decoder` draws images from its class capsules."""

    decoder: Decoder

    def decode(self, capsules: jax.Array, labels: ArrayLike | None = None) -> jax.Array:
        """Draws images [..., H, W, C] from class capsules [..., j, d], as `__call__` does."""
        pixels = self.decoder(mask(capsules, labels))
        return pixels.reshape(*pixels.shape[:-1], *self.image_shape)


class Prediction(NamedTuple):
    """A network's answer to images.

    Attributes:
      predicted: [...] int32, the class of the highest score.
      scores: [..., j], the class scores.
      reconstruction: [..., H, W, C], pixels from 0 to 1; None without a decoder.
    """

    predicted: jax.Array
    scores: jax.Array
    reconstruction: jax.Array | None


def predict(model: Network, images: ArrayLike) -> Prediction:
    """Classifies one image or many, and draws what the network saw.

    predicted = argmax_j scores_j

    Args:
      model: any `Network`; it runs in evaluation mode (`eval()`).
      images: [..., H, W, C], uint8 from 0 to 255 or float from 0 to 1; [..., H, W] for a network
        of one channel.

    Returns:
      `Prediction`: predicted [...] int32, scores [..., j], reconstruction [..., H, W, C].

    Raises:
      ValueError: if the images have another shape than the network's.

    Example:
      >>> import numpy as np
      >>> from flax import nnx
      >>> import capsjax
      >>> net = capsjax.CapsNet(channels=16, types=2, rngs=nnx.Rngs(0))
      >>> capsjax.predict(net, np.zeros((28, 28), np.uint8)).scores.shape
      (10,)
    """
    images = jnp.asarray(images)
    if model.image_shape[-1] == 1 and images.shape[-2:] == model.image_shape[:2]:
        images = images[..., None]
    model.check_images(images)
    return _predict(*nnx.split(model), images)


# Jitted, unlike the functions that it is made of: op by op it would compile a hundred times.
@partial(jax.jit, static_argnums=0)
def _predict(graphdef: nnx.GraphDef, variables: nnx.State, images: jax.Array) -> Prediction:
    model = nnx.merge(graphdef, variables)
    model.eval()
    output = model(to_unit_interval(images))
    return Prediction(output.predicted, output.scores, output.reconstruction)
