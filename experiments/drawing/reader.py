"""A trained network as the page asks it: what it reads, what its capsules draw."""

import dataclasses
import math
import threading
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

import capsjax
from capsjax.diagnostics import LayerState, observe
from drawing.ink import Pose, move

MOST_ITERATIONS = 5
MOST_DRAWN = 16  # capsules at once
ANGLES = tuple(range(-90, 91, 5))  # degrees, of the curves


class Reading(NamedTuple):
    """What a network makes of an image, after each iteration of its routing."""

    scores: np.ndarray  # [n, j], from 0 to 1
    capsules: np.ndarray | None  # [n, j, d]; None without capsules
    couplings: np.ndarray | None  # [n, j, rows, columns], the mean over types, as in `_map`


class Reader:
    """A network, ready to read.

    Attributes:
      name: what the page calls it.
      model: the network as it was trained.
      iterations: how many it was trained with; 1 for a routing without iterations.
    """

    def __init__(self, name: str, model: capsjax.Network):
        self.name, self.model, self.iterations = name, model, 1
        self._lock = threading.Lock()  # one at a time: each uses all cores, and memory
        self._watched = nnx.merge(*nnx.split(model))  # shares the weights, and routes for longer
        layer: Any = getattr(self._watched, "class_caps", None)
        if hasattr(getattr(layer, "routing", None), "iterations"):
            self.iterations = layer.routing.iterations
            most = max(MOST_ITERATIONS, self.iterations)
            layer.routing = dataclasses.replace(layer.routing, iterations=most)
        empty = np.zeros(model.image_shape, np.float32)
        first = self.read(empty)  # compiles, so that the first stroke does not wait
        self.turn(empty, Pose())
        self.dim = None if first.capsules is None else first.capsules.shape[-1]
        self.stages = len(first.scores)
        self.grid = None if first.couplings is None else first.couplings.shape[-2:]
        self.draws = self.dim is not None and hasattr(model, "decoder")
        if self.draws:
            assert self.dim is not None
            for number in (1, self.stages + 2, MOST_DRAWN):
                self.draw(np.zeros((number, self.dim)), np.zeros(number, int))

    def read(self, image: np.ndarray) -> Reading:
        """Reads one image [H, W, C], pixels from 0 to 1."""
        with self._lock:
            output, layers = observe(self._watched, image)
            last = next(reversed(layers.values()), None)
            if last is None:
                return Reading(np.asarray(jax.nn.softmax(output.scores))[None], None, None)
            scores, capsules = zip(*map(_split, last.outputs), strict=True)
            couplings = _map(last, self.model)
            return Reading(np.stack(scores), np.stack(capsules), couplings)

    def turn(self, image: np.ndarray, pose: Pose) -> np.ndarray:
        """Reads an image at each of `ANGLES` on top of a pose; scores [angles, j]."""
        poses = (dataclasses.replace(pose, rotation=pose.rotation + angle) for angle in ANGLES)
        turned = np.stack([move(image, pose) for pose in poses])
        with self._lock:
            scores = np.asarray(_call(*nnx.split(self.model), turned))
        return scores

    def draw(self, capsules: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Draws an image [H, W, C] of each capsule [n, d], n at most `MOST_DRAWN`."""
        number = len(capsules)
        # Filled up to a power of two, so that few sizes are compiled.
        fill = (0, 2 ** math.ceil(math.log2(number)) - number)
        with self._lock:
            drawn = _draw(
                *nnx.split(self.model),
                np.pad(np.asarray(capsules, np.float32), (fill, (0, 0))),
                np.pad(np.asarray(classes, np.int32), fill),
            )
        return np.asarray(drawn)[:number]


def _split(capsules: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns how present capsules are, from 0 to 1, and their vectors."""
    if isinstance(capsules, capsjax.Capsules):
        return np.asarray(capsules.activations), np.asarray(capsules.poses)
    return np.asarray(capsjax.length(capsules)), np.asarray(capsules)


def _map(layer: LayerState, model: Any) -> np.ndarray | None:
    """Returns the couplings over positions, or None if the routing does not tell them.

    At each position they are the mean over the types of primary capsules, weighted by how long each
    is: short ones add little to any class. A network without positions gets a column of capsules.
    """
    if not layer.couplings:
        return None
    couplings = np.stack([np.asarray(c) for c in layer.couplings])  # [n, j, i]
    kinds = np.atleast_1d(getattr(model.config, "types", 0))[-1]  # i runs over (row, column, type)
    inputs = couplings.shape[-1]
    if not kinds or inputs % kinds or getattr(model.config, "grouping", "channels") != "channels":
        return couplings[..., None]
    rows, columns = _find_grid(inputs // kinds, model.image_shape)
    present = _split(layer.inputs)[0].reshape(rows, columns, kinds) + 1e-6
    maps = couplings.reshape(*couplings.shape[:2], rows, columns, kinds)
    return np.average(maps, -1, np.broadcast_to(present, maps.shape))


def _find_grid(positions: int, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Returns the rows and columns of so many positions that are nearest to the image's form."""
    ratio = image_shape[0] / image_shape[1]
    pairs = [(n, positions // n) for n in range(1, positions + 1) if positions % n == 0]
    return min(pairs, key=lambda pair: abs(math.log(pair[0] / pair[1] / ratio)))


@partial(jax.jit, static_argnums=0)
def _call(graphdef: nnx.GraphDef, variables: nnx.State, images: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, variables)
    model.eval()
    output = model(images)
    return output.scores if output.capsules is not None else jax.nn.softmax(output.scores)


@partial(jax.jit, static_argnums=0)
def _draw(
    graphdef: nnx.GraphDef, variables: nnx.State, capsules: jax.Array, classes: jax.Array
) -> jax.Array:
    model = nnx.merge(graphdef, variables)
    model.eval()
    chosen = jax.nn.one_hot(classes, model.num_classes)[..., None]  # [n, j, 1]
    return model.decode(chosen * capsules[:, None], classes)
