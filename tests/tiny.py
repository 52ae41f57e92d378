"""A network, images and a recipe so small that the steps compile in seconds."""

import functools
from collections.abc import Callable

import chex
import jax
import numpy as np
import optax
import pytest
from flax import nnx

from capsjax import train
from capsjax.nn import CapsNet
from capsjax.sharding import make_mesh
from capsjax.train import Recipe, TrainState, create

IMAGE = (8, 8, 1)
CLASSES = 5
N = 20  # images
BATCH = 16  # divisible by 1, 2, 4 and 8 devices


def model(seed: int = 0, **architecture) -> CapsNet:
    """Drawn by NumPy: jax would compile an initializer for every shape."""
    architecture = {"channels": 4, "kernel_size": 2, "types": 2, "hidden": (8,), **architecture}
    abstract = nnx.eval_shape(lambda: CapsNet(IMAGE, CLASSES, **architecture, rngs=nnx.Rngs(0)))
    graphdef, shapes = nnx.split(abstract)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), shapes)
    return nnx.merge(graphdef, jax.device_put(params))


SCHEDULE = optax.exponential_decay(0.01, 2, 0.98, staircase=True)
_OPTIMIZER = optax.adam(SCHEDULE)
RECIPE = Recipe(create(model(), _OPTIMIZER)[0], _OPTIMIZER, lam_recon=0.5, shift_pixels=1)


def state(seed: int = 0) -> TrainState:
    """The state of step 0, new arrays in every call."""
    return create(model(seed), _OPTIMIZER)[1]


def images() -> tuple[np.ndarray, np.ndarray]:
    """N noisy images, uint8, of one pattern a class, and their labels."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 200, (CLASSES, *IMAGE))
    labels = np.arange(N, dtype=np.int32) % CLASSES
    return (patterns[labels] + rng.integers(0, 56, (N, *IMAGE))).astype(np.uint8), labels


def batches(steps: int) -> np.ndarray:
    """Indices of the batches [steps, B], each without repetition."""
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(N)[:BATCH] for _ in range(steps)]).astype(np.int32)


@functools.cache
def steps(devices: int = 1) -> tuple[Callable, Callable]:
    """Both steps of RECIPE, compiled once for all tests; on one device a second trace fails."""
    with pytest.MonkeyPatch.context() as patch:
        if devices == 1:  # chex counts all that share a source as one
            chex.clear_trace_counter()
            for name in ("train_step", "eval_step"):
                patch.setattr(train, name, chex.assert_max_traces(getattr(train, name), n=1))
        return train.jit_steps(RECIPE, make_mesh(BATCH, devices))
