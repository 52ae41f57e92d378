"""The train step and the evaluation step: pure functions, and the jits of both."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import ArrayLike

from capsjax import sharding
from capsjax._losses import margin_loss, reconstruction_loss
from capsjax.data import shift
from capsjax.nn import CapsNet, pixels_to_unit


class Metrics(NamedTuple):
    """Sums over examples; divided by `examples`, means."""

    margin: jax.Array  # float32: margin loss
    reconstruction: jax.Array  # float32: reconstruction loss, not yet weighted by lam_recon
    correct: jax.Array  # int32: examples whose longest capsule is their label's
    examples: jax.Array  # int32

    @classmethod
    def zeros(cls) -> "Metrics":
        return cls(*(jnp.zeros((), dtype) for dtype in ("float32", "float32", "int32", "int32")))


class TrainState(NamedTuple):
    """All that changes from step to step, and so all that a checkpoint holds."""

    step: jax.Array  # int32: steps done
    params: Any
    opt_state: optax.OptState
    sums: Metrics  # over the epoch so far


class Report(NamedTuple):
    """What one step says of itself, for the host to read a little later."""

    step: jax.Array  # int32: its number, from 1
    pixels: jax.Array  # float32: the mean of its images, from 0 to 1
    parameters: jax.Array  # float32 [n]: length of each array of parameters that it began with
    metrics: Metrics  # of its batch
    gradient: jax.Array  # float32 [n]: length of each array of the gradient


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The static part of a step: hashable, and the same all through a run."""

    graphdef: nnx.GraphDef  # the network without its parameters
    optimizer: optax.GradientTransformation
    lam_recon: float  # weight of the reconstruction loss
    shift_pixels: int  # largest shift of a training image, either way
    dtype: str = "float32"  # what the network computes in; parameters are float32 always


def create(model: CapsNet, optimizer: optax.GradientTransformation) -> tuple[Any, TrainState]:
    """Splits a network into its static graph and the state that training starts from.

    Args:
      model: the network; its arrays move into the state, and a donated state deletes them.
      optimizer: any optax transformation.

    Returns:
      The graph definition, for a `Recipe`, and the `TrainState` of step 0.

    Example:
      >>> import optax
      >>> from flax import nnx
      >>> import capsjax.train
      >>> net = capsjax.nn.CapsNet(channels=16, types=2, rngs=nnx.Rngs(0))
      >>> graphdef, state = capsjax.train.create(net, optax.adam(1e-3))
      >>> int(state.step)
      0
    """
    graphdef, variables = nnx.split(model)
    params = nnx.to_pure_dict(variables)
    zero = jnp.zeros((), jnp.int32)
    return graphdef, TrainState(zero, params, optimizer.init(params), Metrics.zeros())


def merge(graphdef: nnx.GraphDef, params: Any) -> CapsNet:
    """The network again, from its graph and its parameters."""
    return nnx.merge(graphdef, nnx.State(params))


def train_step(
    recipe: Recipe,
    state: TrainState,
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    indices: ArrayLike,
) -> tuple[TrainState, Report]:
    """One step: gather the batch, shift and normalise it, update the parameters.

    params ← params + optimizer(∇ [mean(margin) + lam_recon · mean(reconstruction)])

    Args:
      recipe: the static part.
      state: of the step before.
      key: of the run, the same in every step; the step's number is folded in.
      images: the whole data set, uint8 [N, H, W, C].
      labels: int32 [N].
      indices: int32 [B], the examples of this batch.

    Returns:
      The next state and the `Report` of this step.

    References:
      XifengGuo/CapsNet-Pytorch; Sarasra/models, research/capsules.
    """
    batch = shift(jax.random.fold_in(key, state.step), images[indices], recipe.shift_pixels)
    x, y = pixels_to_unit(batch), labels[indices]

    def loss(params):
        metrics, _ = _examples(recipe, params, x, y, y)
        sums = jax.tree.map(jnp.sum, metrics)
        return (sums.margin + recipe.lam_recon * sums.reconstruction) / x.shape[0], sums

    gradient, metrics = jax.grad(loss, has_aux=True)(state.params)
    updates, opt_state = recipe.optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    sums = jax.tree.map(jnp.add, state.sums, metrics)
    next_state = TrainState(state.step + 1, params, opt_state, sums)
    report = Report(
        state.step + 1, jnp.mean(x), _lengths(state.params), metrics, _lengths(gradient)
    )
    return next_state, report


def eval_step(
    recipe: Recipe,
    params: Any,
    images: jax.Array,
    labels: jax.Array,
    indices: ArrayLike,
    counts: ArrayLike,
) -> tuple[Metrics, jax.Array]:
    """Evaluates a batch: images unshifted, each reconstructed from its longest capsule.

    Args:
      recipe: the static part.
      params: the network's parameters.
      images: the whole data set, uint8 [N, H, W, C].
      labels: int32 [N].
      indices: int32 [B].
      counts: bool [B]; False where the batch was only filled up, so that it does not count.

    Returns:
      The `Metrics` of the examples that count, and every example's class, int32 [B].
    """
    x, y = pixels_to_unit(images[indices]), labels[indices]
    metrics, classes = _examples(recipe, params, x, y, None)
    return jax.tree.map(lambda value: jnp.sum(jnp.where(counts, value, 0)), metrics), classes


def jit_steps(recipe: Recipe, mesh: Mesh) -> tuple[Callable, Callable]:
    """Compiles both steps for a mesh: the batch is split over it, all else is on every device.

    Args:
      recipe: the static part.
      mesh: from `capsjax.sharding.make_mesh`.

    Returns:
      train(state, key, images, labels, indices), which donates the state, and
      evaluate(params, images, labels, indices, counts).
    """
    whole, batch = sharding.replicated(mesh), sharding.split(mesh)
    train = jax.jit(
        partial(train_step, recipe),
        in_shardings=(whole, whole, whole, whole, batch),
        out_shardings=whole,
        donate_argnums=0,
    )
    evaluate = jax.jit(
        partial(eval_step, recipe),
        in_shardings=(whole, whole, whole, batch, batch),
        out_shardings=(whole, whole),
    )
    return train, evaluate


def _lengths(params: Any) -> jax.Array:
    """The length of each array, in the order of the tree's leaves."""
    return jnp.stack([jnp.sqrt(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(params)])


def _examples(recipe, params, x, y, shown) -> tuple[Metrics, jax.Array]:
    """Metrics of each example, and its class; `shown` are the labels that the decoder sees."""
    model = merge(recipe.graphdef, jax.tree.map(lambda p: p.astype(recipe.dtype), params))
    output = model(x.astype(recipe.dtype), shown)
    classes = jnp.argmax(output.lengths, -1).astype(jnp.int32)
    metrics = Metrics(
        margin=margin_loss(output.lengths, y),
        reconstruction=reconstruction_loss(output.reconstruction, x),
        correct=(classes == y).astype(jnp.int32),
        examples=jnp.ones_like(y),
    )
    return metrics, classes
