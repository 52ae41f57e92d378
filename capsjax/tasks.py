"""Tasks: how a batch is made from the data set, what it costs, and when an answer is right."""

import dataclasses
import math
from typing import Any, NamedTuple, Protocol, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from capsjax._labels import to_targets
from capsjax._losses import (
    Loss,
    add_losses,
    cross_entropy,
    margin_loss,
    reconstruction_loss,
    spread_loss,
)
from capsjax._pixels import to_unit_interval
from capsjax.data import shift, warp
from capsjax.networks import Network, Output
from capsjax.sharding import PlacedImages


class Batch(NamedTuple):
    """What a step works on."""

    images: jax.Array  # [B, H, W, C], pixels from 0 to 1: the network's input
    labels: jax.Array  # class numbers [B], or k-hot [B, j]
    targets: jax.Array  # [B, H, W, C], pixels from 0 to 1: what is to be reconstructed


Images = jax.Array | PlacedImages  # of a data set, [N, H, W, C]


class Task(Protocol):
    """A task as a value: a frozen, hashable dataclass, the static part of a step.

    All methods are pure and are traced inside the jitted step. A data set's images are an array
    [N, H, W, C] or `capsjax.sharding.PlacedImages`, to be read by `images[indices]`.
    """

    def train_batch(
        self, key: jax.Array, images: Images, labels: jax.Array, indices: ArrayLike
    ) -> Batch:
        """Makes a training batch of the examples `indices` of a uint8 data set, augmented."""

    def test_batch(self, images: Images, labels: jax.Array, indices: ArrayLike) -> Batch:
        """Makes a batch for evaluation, without randomness."""

    def count_tests(self, images: int) -> int:
        """Returns how many test examples there are of these images; they are numbered from 0."""

    def forward(self, model: Network, batch: Batch, labels: jax.Array | None) -> Output:
        """Calls the network; `labels` are what its decoder may know, None in evaluation."""

    def losses(self, output: Output, batch: Batch, step: jax.Array) -> dict[str, jax.Array]:
        """Returns losses by name, [B] each; "loss" is the total, which training minimises."""

    def correct(self, output: Output, batch: Batch) -> jax.Array:
        """Returns which answers are right, bool [B]."""


@dataclasses.dataclass(frozen=True)
class Classification:
    """Classifies images, each of one class or of several.

    total = score loss + lam_recon · reconstruction;   without a decoder: total = score loss

    Args:
      lam_recon: the weight of the reconstruction loss.
      shift_pixels: the largest shift of a training image in each direction, in pixels.
      rotation: the largest rotation of a training image either way, in degrees.
      shear: the largest shear either way, in degrees.
      zoom: the largest change of scale, drawn apart for rows and columns; 0.2 for 0.8 to 1.2.
      elastic: the standard deviation of a smooth distortion, in pixels.
      loss: the score loss: "margin", "spread" or "cross_entropy".
      margin_steps: the steps over which the spread loss's margin rises linearly from 0.2 to 0.9.

    Raises:
      ValueError: if there is no such loss, or a number is out of range.

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, §3 to §5. Hinton, Sabour, Frosst, "Matrix
      Capsules with EM Routing", ICLR 2018: the spread loss and its margin.
    """

    lam_recon: float
    shift_pixels: float = 0
    rotation: float = 0
    shear: float = 0
    zoom: float = 0
    elastic: float = 0
    loss: Loss = "margin"
    margin_steps: int = 10_000

    def __post_init__(self) -> None:
        if self.loss not in get_args(Loss):
            raise ValueError(f"Classification: loss is one of {get_args(Loss)}, got {self.loss!r}")
        if self.margin_steps < 1:
            raise ValueError(f"Classification: margin_steps is 1 or more, got {self.margin_steps}")
        for name in ("lam_recon", "shift_pixels", "rotation", "shear", "zoom", "elastic"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"Classification: {name} is a number of 0 or more, got {value}")

    def train_batch(
        self, key: jax.Array, images: Images, labels: jax.Array, indices: ArrayLike
    ) -> Batch:
        """Gathers the examples and moves each image at random.

        Whole pixels are shifted exactly; anything else is one bilinear warp.
        """
        pixels, whole = _gather(images, indices), self.shift_pixels == int(self.shift_pixels)
        sizes = {name: getattr(self, name) for name in ("rotation", "shear", "zoom", "elastic")}
        if whole and not any(sizes.values()):
            moved = to_unit_interval(shift(key, pixels, int(self.shift_pixels)))
        else:
            moved = warp(key, to_unit_interval(pixels), shift=self.shift_pixels, **sizes)
        return Batch(moved, labels[indices], moved)

    def test_batch(self, images: Images, labels: jax.Array, indices: ArrayLike) -> Batch:
        """Gathers the examples."""
        pixels = to_unit_interval(_gather(images, indices))
        return Batch(pixels, labels[indices], pixels)

    def count_tests(self, images: int) -> int:
        """Returns `images`."""
        return images

    def forward(self, model: Network, batch: Batch, labels: jax.Array | None) -> Output:
        """Calls the network."""
        return model(batch.images, labels)

    def losses(self, output: Output, batch: Batch, step: jax.Array) -> dict[str, jax.Array]:
        """Returns the total, score and reconstruction losses; the last if there is a decoder."""
        score_loss = self._score_loss(output.scores, batch.labels, step)
        if output.reconstruction is None:
            return {"loss": score_loss, self.loss: score_loss}
        reconstruction = reconstruction_loss(output.reconstruction, batch.targets)
        total = add_losses(score_loss, reconstruction, self.lam_recon)
        return {"loss": total, self.loss: score_loss, "reconstruction": reconstruction}

    def _score_loss(self, scores: jax.Array, labels: jax.Array, step: jax.Array) -> jax.Array:
        match self.loss:
            case "margin":
                return margin_loss(scores, labels)
            case "spread":
                risen = jnp.minimum(step / self.margin_steps, 1)
                return spread_loss(scores, labels, 0.2 + (0.9 - 0.2) * risen)
            case "cross_entropy":
                return cross_entropy(scores, labels)

    def correct(self, output: Output, batch: Batch) -> jax.Array:
        """Returns whether the k > 0 classes of highest score are the k of the label."""
        if batch.labels.ndim < output.scores.ndim:
            return output.predicted == batch.labels
        present = to_targets(batch.labels, output.scores.shape)
        rank = jnp.argsort(jnp.argsort(-output.scores, -1), -1)
        right = jnp.all((rank < present.sum(-1, keepdims=True)) == (present > 0), -1)
        return right & jnp.any(present > 0, -1)


def _gather(images: Images, indices: ArrayLike) -> jax.Array:
    """Returns `images[indices]`; the barrier makes all that use the batch share one gather."""
    return lax.optimization_barrier(images[jnp.asarray(indices)])


def example_batch(task: Task, images: Any, labels: Any) -> Batch:
    """Returns the shapes and dtypes of a batch of one example, without making any."""
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    arrays = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (images, labels))
    return jax.eval_shape(task.test_batch, *arrays, one)


def batch_shape(task: Task, images: Any, labels: Any) -> tuple[int, int, int]:
    """Returns (H, W, C) of the images that a task makes of a data set, without making any."""
    height, width, channels = example_batch(task, images, labels).images.shape[1:]
    return height, width, channels
