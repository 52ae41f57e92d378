"""Networks, images and a setup so small that the steps compile in seconds."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.nn import initializers
from jax.sharding import Mesh
from jax.typing import ArrayLike

from capsjax import CapsNet, Network, Output, length, train
from capsjax.nn import DenseCaps
from capsjax.sharding import PlacedImages, make_mesh, replicate, replicate_images
from capsjax.tasks import Classification
from capsjax.train import Setup, TrainState

IMAGE = (8, 8, 1)
NUM_CLASSES = 5
N = 20  # images
BATCH = 16  # divisible by 1, 2, 4 and 8 devices


def draw_arrays(build: Callable[[], Any], *, scale: float = 0.2, seed: int = 0) -> Any:
    """Builds a network with arrays that NumPy draws: jax compiles an initializer for each shape."""
    graphdef, shapes = nnx.split(nnx.eval_shape(build))
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if jnp.issubdtype(leaf.dtype, jnp.integer):  # the seed of a dropout
            return rng.integers(0, 2**31, leaf.shape, leaf.dtype)
        return rng.normal(0, scale, leaf.shape).astype(leaf.dtype)

    arrays = jax.tree.map(draw, shapes)
    return nnx.merge(graphdef, jax.device_put(arrays))


def make_capsnet(seed: int = 0, **sizes: Any) -> CapsNet:
    """Makes a CapsNet with a decoder."""
    sizes = {"channels": 4, "kernel_size": 2, "types": 2, "hidden": (8,), **sizes}
    return draw_arrays(lambda: CapsNet(IMAGE, NUM_CLASSES, **sizes, rngs=nnx.Rngs(0)), seed=seed)


@dataclasses.dataclass(frozen=True)
class NormalisedConfig:
    """The sizes of a `NormalisedNetwork`."""

    name: ClassVar[str] = "normalised"
    dim_class: int = 2
    momentum: float = 0.9

    def build(
        self, image_shape: tuple[int, int, int], num_classes: int, *, rngs: nnx.Rngs
    ) -> "NormalisedNetwork":
        """Builds the network."""
        return NormalisedNetwork(self, image_shape, num_classes, rngs=rngs)


class NormalisedNetwork(Network):
    """Batch normalisation of the pixels, then class capsules: statistics, and no decoder."""

    def __init__(
        self,
        config: NormalisedConfig,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, image_shape, num_classes)
        channels = image_shape[-1]
        self.norm = nnx.BatchNorm(channels, momentum=config.momentum, rngs=rngs)
        self.class_caps = DenseCaps(
            math.prod(image_shape[:2]),
            channels,
            num_classes,
            config.dim_class,
            weight_init=initializers.normal(0.1),
            rngs=rngs,
        )

    def __call__(self, images: jax.Array, labels: ArrayLike | None = None) -> Output:
        self.check_images(images)
        pixels = self.norm(images).reshape(*images.shape[:-3], -1, images.shape[-1])
        capsules = self.class_caps(pixels)
        return Output(length(capsules), capsules, None)


def make_normalised() -> NormalisedNetwork:
    """Makes a network with batch normalisation, its statistics 0 and 1."""
    return NormalisedConfig().build(IMAGE, NUM_CLASSES, rngs=nnx.Rngs(0))


SCHEDULE = optax.exponential_decay(0.01, 2, 0.98, staircase=True)
OPTIMIZER = optax.adam(SCHEDULE)
TASK = Classification(lam_recon=0.5, shift_pixels=1)
SETUP = Setup(train.create(make_capsnet(), OPTIMIZER, TASK)[0], OPTIMIZER, TASK)


def make_state(seed: int = 0) -> TrainState:
    """Makes the state of step 0, of new arrays in every call."""
    return train.create(make_capsnet(seed), OPTIMIZER, TASK)[1]


def make_images() -> tuple[np.ndarray, np.ndarray]:
    """Makes N noisy images, uint8, of one pattern a class, and their labels."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 200, (NUM_CLASSES, *IMAGE))
    labels = np.arange(N, dtype=np.int32) % NUM_CLASSES
    return (patterns[labels] + rng.integers(0, 56, (N, *IMAGE))).astype(np.uint8), labels


def place_data(
    mesh: Mesh, images: np.ndarray, labels: np.ndarray
) -> tuple[PlacedImages, jax.Array]:
    """Places a data set as a run does."""
    return replicate_images(mesh, images), replicate(mesh, labels)


def draw_batches(steps: int) -> np.ndarray:
    """Draws the indices of batches [steps, B], each without repetition."""
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(N)[:BATCH] for _ in range(steps)]).astype(np.int32)


@functools.cache
def jit_steps(devices: int = 1) -> tuple[Callable, Callable]:
    """Compiles both steps of SETUP once for all tests; on one device a second trace fails."""
    with pytest.MonkeyPatch.context() as patch:
        if devices == 1:  # chex counts all that share a source as one
            chex.clear_trace_counter()
            for name in ("train_step", "eval_step"):
                patch.setattr(train, name, chex.assert_max_traces(getattr(train, name), n=1))
        return train.jit_steps(SETUP, make_mesh(BATCH, devices))
