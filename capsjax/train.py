"""The train step and the evaluation step: pure functions, and the jits of both."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jax.stages import Wrapped
from jax.typing import ArrayLike

from capsjax import sharding
from capsjax.networks import Network, Output
from capsjax.tasks import Batch, Images, Task


class Sums(NamedTuple):
    """Sums over examples; divided by `examples`, means."""

    losses: dict[str, jax.Array]  # float32 each, by the names that the task gives
    correct: jax.Array  # int32: answers that are right
    examples: jax.Array  # int32


class TrainState(NamedTuple):
    """Everything that changes from step to step, and so everything that a checkpoint holds."""

    step: jax.Array  # int32: steps done
    params: Any
    statistics: Any  # of batch normalisation, and seeds of dropout; {} in a network without
    average: Any  # moving average of the parameters; {} in a run without
    opt_state: optax.OptState
    sums: Sums  # over the epoch so far


class Diagnostics(NamedTuple):
    """Diagnostics of one step, which the host reads a little later."""

    step: jax.Array  # int32: its number, from 1
    pixel_mean: jax.Array  # float32: the mean of its images, from 0 to 1
    sums: Sums  # over its batch
    gradient_norms: jax.Array  # float32 [n]: L2 norm of each array of the gradient


@dataclasses.dataclass(frozen=True)
class Setup:
    """The static part of a step: hashable, and the same throughout a run.

    Attributes:
      graphdef: the network without its arrays.
      optimizer: any optax transformation.
      task: what a step does with the data.
      dtype: what the network computes in; parameters are float32 always.
      average: the decay of the moving average of the parameters; None for no average.
    """

    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    task: Task
    dtype: str = "float32"
    average: float | None = None


def create(
    model: Network,
    optimizer: optax.GradientTransformation,
    task: Task,
    *,
    average: float | None = None,
    example: Batch | None = None,
) -> tuple[nnx.GraphDef, TrainState]:
    """Splits a network into its static graph and the state that training starts from.

    Args:
      model: the network; its arrays move into the state, and a donated state deletes them.
      optimizer: any optax transformation.
      task: its losses name the sums.
      average: as in `Setup`.
      example: the shapes of a batch, from `capsjax.tasks.example_batch`; None: class numbers, and
        targets like the images.

    Returns:
      The graph definition, for a `Setup`, and the `TrainState` of step 0.

    Raises:
      ValueError: if the network holds other variables than parameters and batch statistics, or the
        task's losses are not [B] each, one of them "loss".

    Example:
      >>> import optax
      >>> from flax import nnx
      >>> import capsjax.train
      >>> net = capsjax.CapsNet(channels=16, types=2, rngs=nnx.Rngs(0))
      >>> task = capsjax.tasks.Classification(lam_recon=0.392)
      >>> graphdef, state = capsjax.train.create(net, optax.adam(1e-3), task)
      >>> int(state.step), list(state.sums.losses)
      (0, ['loss', 'margin', 'reconstruction'])
    """
    graphdef, params, statistics = _split(model)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(
        step=zero,
        params=params,
        statistics=statistics,
        average=jax.tree.map(jnp.copy, params) if average else {},
        opt_state=optimizer.init(params),
        sums=zero_sums(loss_names(model, task, example)),
    )
    return graphdef, state


def loss_names(model: Network, task: Task, example: Batch | None = None) -> tuple[str, ...]:
    """Returns the names of a task's losses for a network, without computing any."""
    image: Any = jax.ShapeDtypeStruct((1, *model.image_shape), jnp.float32)
    label: Any = jax.ShapeDtypeStruct((1,), jnp.int32)
    example = example or Batch(image, label, image)
    graphdef, variables = nnx.split(model)

    def losses(variables: Any, batch: Batch) -> dict[str, jax.Array]:
        output = task.forward(nnx.merge(graphdef, variables), batch, batch.labels)
        return task.losses(output, batch, jnp.zeros((), jnp.int32))

    shapes = {name: loss.shape for name, loss in jax.eval_shape(losses, variables, example).items()}
    if "loss" not in shapes or {*shapes.values()} != {example.images.shape[:1]}:
        raise ValueError(
            f"{type(task).__name__}.losses: expected one number for each example, [B], under each "
            f'name, and the total under "loss"; got for {example.images.shape[0]}: {shapes}'
        )
    return tuple(shapes)


def zero_sums(names: tuple[str, ...]) -> Sums:
    """Returns sums over no example."""
    zero = partial(jnp.zeros, ())
    return Sums({name: zero(jnp.float32) for name in names}, zero(jnp.int32), zero(jnp.int32))


def merge(graphdef: nnx.GraphDef, state: TrainState) -> Network:
    """Makes the network, in evaluation mode, from the averaged parameters if there are any."""
    model = _merge(graphdef, state.average or state.params, state.statistics)
    model.eval()
    return model


def train_step(
    setup: Setup,
    state: TrainState,
    key: jax.Array,
    images: Images,
    labels: jax.Array,
    indices: ArrayLike,
) -> tuple[TrainState, Diagnostics]:
    """Does one step: makes the batch, differentiates the loss, updates the parameters.

    params ← params + optimizer(∇ mean(loss)),   average ← δ average + (1 − δ) params

    The average's decay δ = min(decay, (1 + t) / (10 + t)) rises with the step t, so that the
    initial parameters fade quickly.

    Args:
      setup: the static part.
      state: of the step before.
      key: of the run, the same in every step; the step's number is folded in.
      images: the whole data set, uint8 [N, H, W, C], an array or `sharding.PlacedImages`.
      labels: int32 [N].
      indices: int32 [B], the examples of this batch.

    Returns:
      The next state and the `Diagnostics` of this step.

    Raises:
      ValueError: if only one of `setup` and `state` was made with an average.

    References:
      XifengGuo/CapsNet-Pytorch; Sarasra/models, research/capsules; the average's decay:
      tf.train.ExponentialMovingAverage.
    """
    if (setup.average is None) != (not state.average):
        raise ValueError("train_step: give `create` and `Setup` the same average")
    batch = setup.task.train_batch(jax.random.fold_in(key, state.step), images, labels, indices)

    def mean_loss(params: Any) -> tuple[jax.Array, tuple[Sums, Any]]:
        model = _merge(setup.graphdef, params, state.statistics)
        model.train()
        examples, _ = _examples(setup, model, batch, batch.labels, state.step)
        sums = jax.tree.map(jnp.sum, examples)
        return sums.losses["loss"] / batch.images.shape[0], (sums, _split(model)[2])

    params = _cast(state.params, setup.dtype)
    gradient, (sums, statistics) = jax.grad(mean_loss, has_aux=True)(params)
    gradient = _cast(jax.tree.map(_settle, gradient), "float32")
    updates, opt_state = setup.optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    next_state = TrainState(
        step=state.step + 1,
        params=params,
        statistics=statistics,
        average=_average(setup.average, state, params),
        opt_state=opt_state,
        sums=_add(state.sums, sums),
    )
    mean = jnp.mean(batch.images)
    return next_state, Diagnostics(state.step + 1, mean, sums, _norms(gradient))


def eval_step(
    setup: Setup,
    state: TrainState,
    images: Images,
    labels: jax.Array,
    indices: ArrayLike,
    counted: ArrayLike,
) -> tuple[Sums, jax.Array]:
    """Evaluates a batch: no augmentation, and a decoder sees no label.

    Args:
      setup: the static part.
      state: its averaged parameters are evaluated, if it has any.
      images: the whole data set, uint8 [N, H, W, C], an array or `sharding.PlacedImages`.
      labels: int32 [N].
      indices: int32 [B].
      counted: bool [B]; False for examples that only fill up the batch.

    Returns:
      The `Sums` of the counted examples, and the predicted class of every example, int32 [B].
    """
    batch = setup.task.test_batch(images, labels, indices)
    params = _cast(state.average or state.params, setup.dtype)
    model = _merge(setup.graphdef, params, state.statistics)
    model.eval()
    examples, output = _examples(setup, model, batch, None, state.step)
    sums = jax.tree.map(lambda value: jnp.sum(jnp.where(counted, value, 0)), examples)
    return sums, output.predicted


def jit_steps(setup: Setup, mesh: Mesh) -> tuple[Wrapped, Wrapped]:
    """Compiles both steps for a mesh: the batch is split over it, all else is on every device.

    Args:
      setup: the static part.
      mesh: from `capsjax.sharding.make_mesh`.

    Returns:
      train(state, key, images, labels, order), which donates the state, and
      evaluate(state, images, labels, indices, counted). `order` int32 [n, B] holds the batches of
      an epoch of n steps, so that an epoch's indices go to the devices once.
    """
    whole, batch = sharding.replicated(mesh), sharding.split(mesh)
    train = jax.jit(
        partial(_take_turn, partial(train_step, setup)),
        in_shardings=(whole, whole, whole, whole, sharding.split(mesh, axis=1)),
        out_shardings=whole,
        donate_argnums=0,
    )
    evaluate = jax.jit(
        partial(eval_step, setup),
        in_shardings=(whole, whole, whole, batch, batch),
        out_shardings=(whole, whole),
    )
    return train, evaluate


def _take_turn(
    step: Callable,
    state: TrainState,
    key: jax.Array,
    images: Images,
    labels: jax.Array,
    order: jax.Array,
) -> tuple[TrainState, Diagnostics]:
    """Takes the epoch's next batch, and does a step with it."""
    return step(state, key, images, labels, order[state.step % len(order)])


def _split(model: Network) -> tuple[nnx.GraphDef, Any, Any]:
    """Returns the graph, the parameters and the batch statistics."""
    graphdef, *variables = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, statistics = map(nnx.to_pure_dict, variables)
    return graphdef, params, statistics


def _merge(graphdef: nnx.GraphDef, params: Any, statistics: Any) -> Network:
    return nnx.merge(graphdef, nnx.State(params), nnx.State(statistics))


def _cast(params: Any, dtype: str) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def _average(decay: float | None, state: TrainState, params: Any) -> Any:
    """Moves the average towards the parameters after the update."""
    if decay is None:
        return {}
    delta = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
    return jax.tree.map(lambda old, new: delta * old + (1 - delta) * new, state.average, params)


def _settle(gradient: jax.Array) -> jax.Array:
    """Has a GPU write a gradient to memory row by row, as its parameter lies there.

    cuDNN returns a kernel's gradient in a layout of its own. XLA would else copy both moments to
    that layout and back, or read them twice.
    """
    rows = Layout(tuple(range(gradient.ndim)))

    def write(gradient: jax.Array) -> jax.Array:
        return lax.optimization_barrier(with_layout_constraint(gradient, rows))

    return lax.platform_dependent(gradient, cuda=write, default=lambda gradient: gradient)


def _norms(tree: Any) -> jax.Array:
    """Returns the L2 norm of each array, in the order of the tree's leaves."""
    squares = lax.platform_dependent(
        *jax.tree.leaves(tree), tpu=_sum_squares, default=_sum_squares_in_parts
    )
    return jnp.sqrt(squares)


def _sum_squares(*arrays: jax.Array) -> jax.Array:
    return jnp.stack([jnp.sum(jnp.square(array)) for array in arrays])


def _sum_squares_in_parts(*arrays: jax.Array) -> jax.Array:
    """Does what `_sum_squares` does, in two stages.

    A GPU sums the parts of an array while it updates the parameters, then those of all at once. A
    TPU would copy the array into another shape for this.
    """
    most = 1024

    def sum_parts(array: jax.Array) -> jax.Array:
        parts = math.gcd(array.size, most)
        sums = jnp.sum(jnp.square(array).reshape(parts, -1), -1)
        return jnp.pad(sums, (0, most - parts))

    return jnp.sum(jnp.stack([sum_parts(array) for array in arrays]), -1)


def _add(sums: Sums, batch: Sums) -> Sums:
    """Adds the sums of a batch, packed into one array, so that a GPU adds them in one kernel."""
    packed, unpack = ravel_pytree(batch)
    return jax.tree.map(jnp.add, sums, unpack(lax.optimization_barrier(packed)))


def _examples(
    setup: Setup, model: Network, batch: Batch, labels: jax.Array | None, step: jax.Array
) -> tuple[Sums, Output]:
    """Computes losses and correctness of each example; `labels` are what the decoder sees."""
    cast = batch._replace(images=batch.images.astype(setup.dtype))
    output = setup.task.forward(model, cast, labels)
    losses = setup.task.losses(output, batch, step)
    correct = setup.task.correct(output, batch).astype(jnp.int32)
    return Sums(losses, correct, jnp.ones_like(correct)), output
