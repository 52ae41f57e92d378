"""Looking into the capsule layers of a network."""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from capsjax._pixels import to_unit_interval
from capsjax._routing import EM, Capsules, EMState, MatrixVotes, Routing
from capsjax.networks import Network, Output
from capsjax.nn import ConvCaps, ConvEMCaps, DenseCaps, EMCaps


class LayerState(NamedTuple):
    """What a capsule layer received, and what each iteration of its routing made of it."""

    inputs: jax.Array | Capsules  # u [..., i, k]
    outputs: tuple[jax.Array | Capsules, ...]  # v [..., j, d]; the last is the layer's output
    couplings: tuple[jax.Array, ...]  # c [..., j, i]; empty if the routing does not tell them


class Observation(NamedTuple):
    """What a network answered, and the states of its capsule layers."""

    output: Output
    layers: OrderedDict[str, LayerState]  # in the order in which they ran


def observe(model: Network, images: ArrayLike) -> Observation:
    """Looks into every layer of capsules of `capsjax.nn` while a network reads images.

    v = routing(u, W), c = routing.couplings(u, W), by a routing that stops after each iteration

    With `capsjax.Agreement` the first iteration has equal couplings: it is the layer without its
    routing. In layers of poses and activations, u and v are `capsjax.Capsules` and c are the
    responsibilities. In convolutional layers y and x are leading axes and i runs over the capsules
    of a window.

    Args:
      model: any `Network`; it runs in evaluation mode (`eval()`).
      images: [..., H, W, C], uint8 from 0 to 255 or float from 0 to 1.

    Returns:
      `Observation`: the `Output`, and for each layer, by its name in the network, its inputs
      [..., i, k] and, after each iteration, outputs [..., j, d] and couplings [..., j, i]. A
      routing without a field `iterations` has one iteration. `ConvEMCaps` shows no couplings: there
      an input capsule shares itself out among the windows that hold it.

    Raises:
      ValueError: if the images have another shape than the network's.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, capsjax
      >>> net = capsjax.CapsNet(channels=16, types=2, routings=2, rngs=nnx.Rngs(0))
      >>> layer = capsjax.diagnostics.observe(net, jnp.zeros((4, 28, 28, 1))).layers["class_caps"]
      >>> layer.inputs.shape, len(layer.outputs), layer.outputs[-1].shape
      ((4, 72, 8), 2, (4, 10, 16))
      >>> layer.couplings[-1].shape
      (4, 10, 72)

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, procedure 1.
    """
    images = jnp.asarray(images)
    model.check_images(images)
    return _observe(*nnx.split(model), images)


# Jitted, as `predict` is: op by op it would compile a hundred times.
@partial(jax.jit, static_argnums=0)
def _observe(graphdef: nnx.GraphDef, variables: nnx.State, images: jax.Array) -> Observation:
    model = nnx.merge(graphdef, variables)
    model.eval()
    states: OrderedDict[str, LayerState] = OrderedDict()
    for path, layer in nnx.iter_modules(model):
        note = partial(states.__setitem__, ".".join(map(str, path)))
        # Each calls its routing with all that is to be seen.
        if isinstance(layer, DenseCaps | ConvCaps):
            layer.routing = _watch(layer.routing, note)
        elif isinstance(layer, EMCaps | ConvEMCaps):
            layer.routing = _watch_em(layer.routing, note)
    return Observation(model(to_unit_interval(images)), states)


def _watch(routing: Routing, note: Callable[[LayerState], None]) -> Any:
    """Returns a function that routes in the same way and notes the layer's state."""

    def route(u: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        stages = _stop_after_each_iteration(routing)
        outputs = tuple(stage(u, weight, bias) for stage in stages)
        told = [stage.couplings for stage in stages if hasattr(stage, "couplings")]
        note(LayerState(u, outputs, tuple(couple(u, weight, bias) for couple in told)))
        return outputs[-1]

    return route


def _watch_em(routing: EM, note: Callable[[LayerState], None]) -> Any:
    """Does the same for EM routing."""

    def route(votes: MatrixVotes, activations: jax.Array, **options: Any) -> EMState:
        stages = _stop_after_each_iteration(routing)
        states = [stage(votes, activations, **options) for stage in stages]
        outputs = tuple(Capsules(state.poses, state.activations) for state in states)
        alone = options["over_windows"] is None
        couplings = tuple(state.responsibilities for state in states if alone)
        note(LayerState(Capsules(votes.poses, activations), outputs, couplings))
        return states[-1]

    return route


def _stop_after_each_iteration(routing: Any) -> list[Any]:
    """Returns routings that stop after 1, 2, … iterations; one without iterations as it is."""
    if not hasattr(routing, "iterations"):
        return [routing]
    numbers = range(1, routing.iterations + 1)
    return [dataclasses.replace(routing, iterations=number) for number in numbers]
