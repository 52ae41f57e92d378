"""A network's capsules and its routing, measured on a data set in one call."""

import math
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from capsjax._labels import pick_highest, to_targets
from capsjax._routing import Capsules
from capsjax._vectors import at_least_float32, length
from capsjax.diagnostics._capsules import ScoreHistogram, dead, score_histogram
from capsjax.diagnostics._couplings import active, bonding, coupling_entropy, dynamics
from capsjax.diagnostics._layers import observe
from capsjax.networks import Network

_MOST_COUPLINGS = 2**24  # kept in memory, 64 MiB; an MNIST image has 11,520 in each iteration


class ClassScores(NamedTuple):
    """The class scores as one iteration of the routing leaves them."""

    error: float  # share of the images in which the highest score is that of an absent class
    histogram: ScoreHistogram


class CouplingStatistics(NamedTuple):
    """The couplings of one iteration of the routing."""

    entropy: float  # mean of `coupling_entropy`
    active: float  # share of the input capsules with an active coupling
    bonding: float
    dynamics: float


class LayerActivations(NamedTuple):
    """The capsules of a layer; of a convolutional one, those at each position: [y, x, i]."""

    mean: np.ndarray  # [i], of |u| or the activations over the images
    dead: np.ndarray  # bool [i]


class Diagnosis(NamedTuple):
    """What `diagnose` finds.

    Attributes:
      images: their number.
      scores: after each iteration of the last capsule layer's routing; after the last one only,
        unless the scores are the lengths or activations of its outputs. Empty without capsules.
      couplings: of the last capsule layer, in each iteration; empty if its routing does not tell
        them or there is a single output capsule.
      layers: by name, in order: "primary", the inputs of the first capsule layer, then the outputs
        of each. The inputs of a convolutional layer are "windows" instead, which may overlap and
        then hold a capsule more than once.
    """

    images: int
    scores: tuple[ClassScores, ...]
    couplings: tuple[CouplingStatistics, ...]
    layers: Mapping[str, LayerActivations]


def diagnose(
    model: Network, images: ArrayLike, labels: ArrayLike, *, batch_size: int = 50
) -> Diagnosis:
    """Measures lengths, dead capsules and couplings, with the routing and without it.

    "Without" is the first of the iterations: in routing by agreement all its couplings are equal.

    Args:
      model: any `Network`; it runs in evaluation mode (`eval()`).
      images: [N, H, W, C], uint8 from 0 to 255 or float from 0 to 1.
      labels: class numbers [N] or k-hot [N, j].
      batch_size: images at a time. No more than 2^24 couplings are kept, so that those of large
        layers are measured on the first images only.

    Returns:
      `Diagnosis`, which `capsjax.viz.capsules` draws.

    Raises:
      ValueError: if a shape does not fit, there is no image, or `batch_size` is less than 1.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, capsjax
      >>> net = capsjax.CapsNet(channels=16, types=2, routings=2, rngs=nnx.Rngs(0))
      >>> images, labels = jnp.zeros((4, 28, 28, 1)), jnp.arange(4)
      >>> found = capsjax.diagnostics.diagnose(net, images, labels)
      >>> len(found.couplings), round(found.couplings[0].entropy, 4)
      (2, 1.0)
      >>> {name: layer.dead.shape for name, layer in found.layers.items()}
      {'primary': (72,), 'class_caps': (10,)}

    References:
      Mitterreiter, Koch, Giesen, Laue, 2023, arXiv:2301.01583.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim != 4 or not len(images) or len(labels) != len(images):
        raise ValueError(
            "diagnose: expected images [N, H, W, C] and labels [N] or [N, j], N ≥ 1, got "
            f"{list(images.shape)} and {list(labels.shape)}"
        )
    if batch_size < 1:
        raise ValueError(f"diagnose: batch_size is 1 or more, got {batch_size}")
    whole = _observe_in_pieces(model, images, batch_size)
    scores = [_measure_scores(array, labels) for array in _find_scores(whole)]
    couplings = [_measure_couplings(array) for array in whole.couplings]
    lengths = {name: stages[-1] for name, stages in whole.lengths.items()}
    return Diagnosis(
        len(images),
        tuple(ClassScores(float(error), jax.device_get(counts)) for error, counts in scores),
        tuple(CouplingStatistics(*map(float, numbers)) for numbers in couplings),
        {name: LayerActivations(a.mean(0), np.asarray(dead(a))) for name, a in lengths.items()},
    )


class _Reduced(NamedTuple):
    """What is kept of an `Observation`, on the device or on the host."""

    scores: Any  # [n, j], of the network; None if it has no capsules
    lengths: OrderedDict[str, list[Any]]  # [n, ..., i], by layer and iteration
    couplings: list[Any]  # [n, j, i], of the last layer, by iteration


def _observe_in_pieces(model: Network, images: np.ndarray, batch_size: int) -> _Reduced:
    size = min(batch_size, len(images))
    observe_lengths = partial(_observe_lengths, *nnx.split(model))
    # Before the first piece, because long-lived arrays between its buffers would scatter memory.
    whole = _allocate(jax.eval_shape(observe_lengths, images[:size]), len(images))
    for start in range(0, len(images), size):
        # The last piece is filled up, because one of another size would be compiled again.
        filled = images.take(range(start, start + size), 0, mode="wrap")
        piece = jax.device_get(observe_lengths(filled))
        for array, part in zip(jax.tree.leaves(whole), jax.tree.leaves(piece), strict=True):
            array[start : start + size] = part[: max(0, len(array) - start)]
    return whole


def _allocate(piece: _Reduced, images: int) -> _Reduced:
    """Makes arrays of the host for so many images; of couplings, for as many as there is room."""
    numbers = sum(math.prod(couplings.shape[1:]) for couplings in piece.couplings)
    kept = min(images, max(1, _MOST_COUPLINGS // max(1, numbers)))

    def allocate(rows: int, shapes: Any) -> Any:
        return jax.tree.map(lambda a: np.empty((rows, *a.shape[1:]), a.dtype), shapes)

    scores, lengths = allocate(images, (piece.scores, piece.lengths))
    return _Reduced(scores, lengths, allocate(kept, piece.couplings))


@partial(jax.jit, static_argnums=0)
def _observe_lengths(graphdef: nnx.GraphDef, variables: nnx.State, images: jax.Array) -> _Reduced:
    """Observes lengths in place of capsules, and the couplings of the last layer alone."""
    output, layers = observe(nnx.merge(graphdef, variables), images)
    states = [*layers.values()]
    lengths = OrderedDict((name, [*map(_measure, state.outputs)]) for name, state in layers.items())
    if states:
        inputs = _measure(states[0].inputs)
        lengths = OrderedDict({"windows" if inputs.ndim > 2 else "primary": [inputs]}) | lengths
    couplings = [c for state in states[-1:] for c in state.couplings if c.shape[-2] > 1]
    scores = None if output.capsules is None else output.scores
    return jax.tree.map(at_least_float32, _Reduced(scores, lengths, couplings))


def _measure(capsules: jax.Array | Capsules) -> jax.Array:
    """Returns the activations [..., i] of capsules, which are the lengths of vectors."""
    return capsules.activations if isinstance(capsules, Capsules) else length(capsules)


def _find_scores(whole: _Reduced) -> list[np.ndarray]:
    """Returns the class scores after each iteration of the last layer's routing, if they are the
    lengths of its outputs, else those of the network."""
    if whole.scores is None:
        return []
    stages = [*whole.lengths.values()][-1] if whole.lengths else []
    same = stages and stages[-1].shape == whole.scores.shape
    same = same and np.allclose(stages[-1], whole.scores, atol=1e-3)
    return stages if same else [whole.scores]


@jax.jit
def _measure_scores(scores: jax.Array, labels: jax.Array) -> tuple[jax.Array, ScoreHistogram]:
    shown = to_targets(labels, scores.shape)
    right = jnp.take_along_axis(shown, pick_highest(scores)[:, None], -1)
    return jnp.mean(right == 0), score_histogram(scores, labels)


@jax.jit  # fused, because op by op each step would make an array as large as the couplings
def _measure_couplings(couplings: jax.Array) -> tuple[jax.Array, ...]:
    couplings = couplings.reshape(-1, *couplings.shape[-2:])  # each position as an example
    entropy = jnp.mean(coupling_entropy(couplings))
    share = jnp.mean(jnp.any(active(couplings), -2))
    return entropy, share, bonding(couplings), dynamics(couplings)
