"""The contract of networks: what the library promises of every network, also of one's own."""

import dataclasses
import math
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import capsjax
from capsjax import train, weights
from capsjax._trees import fill, named_leaves
from capsjax.checkpoint import Checkpoints
from capsjax.networks import NETWORKS
from capsjax.sharding import make_mesh, replicated
from capsjax.tasks import Classification
from tiny import place_data

IMAGE_SHAPE, NUM_CLASSES, BATCH = (8, 8, 1), 5, 16
KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class OwnConfig:
    """A network of the user's own: no decoder, batch normalisation, a routing of its own."""

    name: ClassVar[str] = "own"
    dim: int = 4
    routing: capsjax.Routing = capsjax.Agreement(iterations=2)  # noqa: RUF009  frozen

    def build(self, image_shape, num_classes, *, rngs):
        return OwnNetwork(self, image_shape, num_classes, rngs=rngs)


class OwnNetwork(capsjax.Network):
    def __init__(self, config, image_shape, num_classes, *, rngs):
        super().__init__(config, image_shape, num_classes)
        self.norm = nnx.BatchNorm(math.prod(image_shape), rngs=rngs)
        self.caps = capsjax.nn.DenseCaps(
            math.prod(image_shape) // 8, 8, num_classes, config.dim, config.routing, rngs=rngs
        )

    def __call__(self, images, labels=None):
        x = self.norm(images.reshape(*images.shape[:-3], -1))
        capsules = self.caps(x.reshape(*x.shape[:-1], -1, 8))
        return capsjax.Output(capsjax.length(capsules), capsules, None)


SMALL = {  # sizes that train in a moment; a network that is not named here has its own defaults
    "capsnet": {"channels": 4, "kernel_size": 2, "types": 2, "hidden": (8,)},
    "efficient": {
        "channels": (4, 8),
        "kernel_sizes": (3, 2),
        "strides": (1, 2),
        "dim_primary": 4,
        "hidden": (8,),
    },
    "matrix": {
        "channels": 4,
        "types": (2, 3),
        "kernel_sizes": (3, 2),
        "strides": (2, 1),
        "side": 2,
        "routing": 2,
    },
    "cnn": {"channels": (4, 8), "kernel_sizes": (3, 3), "hidden": (8,)},
}


# Each network is built, and its step compiled, once for all tests.
@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[] if name in ("capsnet", "cnn", "own") else pytest.mark.slow)
        for name in (*NETWORKS, OwnConfig.name)
    ],
)
def config(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, OwnConfig.name, OwnConfig)
        yield NETWORKS[request.param](**SMALL.get(request.param, {}))


@pytest.fixture(scope="module")
def model(config):
    # One compilation instead of one for each array; not `nnx.jit`, which the library avoids.
    build = lambda: nnx.split(config.build(IMAGE_SHAPE, NUM_CLASSES, rngs=nnx.Rngs(0)))  # noqa: E731
    return nnx.merge(*jax.jit(build)())


@pytest.fixture(scope="module")
def trainer(model):
    return Trainer(model)


@pytest.fixture(scope="module")
def trained(trainer):
    return train.merge(trainer.graphdef, trainer.train(BATCHES))


IMAGES = np.random.default_rng(0).integers(0, 256, (20, *IMAGE_SHAPE), np.uint8)
LABELS = np.arange(20, dtype=np.int32) % NUM_CLASSES
BATCHES = np.stack([np.arange(BATCH), np.arange(20 - BATCH, 20)]).astype(np.int32)


class Trainer:
    """A network, its steps, and the state they begin with."""

    def __init__(self, model, devices=1):
        task, optimizer = Classification(lam_recon=0.5, shift_pixels=1), optax.adam(0.01)
        self.mesh = make_mesh(BATCH, devices)
        self.graphdef, self.state = train.create(model, optimizer, task, average=0.9)
        setup = train.Setup(self.graphdef, optimizer, task, average=0.9)
        self.step, self.evaluate = train.jit_steps(setup, self.mesh)
        self.data = place_data(self.mesh, IMAGES, LABELS)

    def train(self, batches, state=None):
        """Steps from a state; the arrays of it are copied, since a step deletes its input."""
        state = jax.tree.map(jnp.array, self.state if state is None else state)
        state = jax.device_put(state, replicated(self.mesh))
        for batch in batches:
            state, _ = self.step(state, KEY, *self.data, batch[None])
        return jax.device_get(state)


def test_two_steps_move_every_parameter_and_count_the_examples(trainer):
    before = jax.device_get(trainer.state)
    state = trainer.train(BATCHES)
    assert (state.step, state.sums.examples) == (2, 2 * BATCH)
    assert np.isfinite(list(state.sums.losses.values())).all()
    for name, leaf in named_leaves(state.params):
        assert np.any(leaf != dict(named_leaves(before.params))[name]), name
    chex.assert_trees_all_equal_shapes_and_dtypes(state, before)


@pytest.mark.slow
def test_eight_devices_train_and_evaluate_as_one(model, trainer):
    alone, together = trainer, Trainer(model, devices=8)
    states = [trainer.train(BATCHES) for trainer in (alone, together)]
    chex.assert_trees_all_close(*(state.sums for state in states), rtol=1e-4)
    leaves = [jax.tree.leaves((state.params, state.statistics)) for state in states]
    ours, theirs = (
        np.concatenate([leaf.ravel() for leaf in each if leaf.dtype == np.float32])
        for each in leaves
    )
    assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)
    for one, other in zip(*leaves, strict=True):  # the seed of a dropout
        assert one.dtype == np.float32 or one == other
    counted = np.arange(BATCH) < 11
    (sums, predicted), (same_sums, same) = (
        trainer.evaluate(
            jax.device_put(states[0], replicated(trainer.mesh)), *data, BATCHES[0], counted
        )
        for trainer, data in ((alone, alone.data), (together, together.data))
    )
    np.testing.assert_array_equal(predicted, same)
    chex.assert_trees_all_close(jax.device_get(sums), jax.device_get(same_sums), rtol=1e-4)


def test_a_run_that_is_resumed_ends_in_the_same_bits(trainer, tmp_path):
    whole = trainer.train(BATCHES)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(trainer.train(BATCHES[:1]), {})
    with Checkpoints(tmp_path) as checkpoints:
        state = fill(trainer.state, checkpoints.last().arrays)
    chex.assert_trees_all_equal(trainer.train(BATCHES[1:], state), whole)


def test_a_file_alone_rebuilds_the_trained_network_to_the_bit(trained, tmp_path):
    weights.save(trained, tmp_path / "net.safetensors")
    loaded = weights.load(tmp_path / "net.safetensors")
    assert (loaded.config, loaded.image_shape, loaded.num_classes) == (
        *(trained.config, IMAGE_SHAPE, NUM_CLASSES),
    )
    expected, actual = (capsjax.predict(net, IMAGES) for net in (trained, loaded))
    chex.assert_trees_all_equal(jax.device_get(actual), jax.device_get(expected))


def test_an_exported_network_predicts_the_same(model, tmp_path):
    weights.export(model, tmp_path / "net.jax", platforms=("cpu",))
    function = jax.export.deserialize(bytearray((tmp_path / "net.jax").read_bytes()))
    pixels = jnp.asarray(IMAGES[:3], jnp.float32) / 255
    expected = capsjax.predict(model, pixels)
    for ours, theirs in zip(function.call(pixels), expected, strict=True):
        if theirs is not None:
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_prediction_of_an_image_does_not_depend_on_the_others(trained):
    together, alone = capsjax.predict(trained, IMAGES[:6]), capsjax.predict(trained, IMAGES[2])
    assert together.predicted.shape == (6,)
    assert together.scores.shape == (6, NUM_CLASSES)
    np.testing.assert_allclose(together.scores[2], alone.scores, rtol=1e-4, atol=1e-6)


def test_a_network_is_compiled_once_for_equal_configs(config):
    build = lambda: config.build(IMAGE_SHAPE, NUM_CLASSES, rngs=nnx.Rngs(0))  # noqa: E731
    graphs = [nnx.graphdef(nnx.eval_shape(build)) for _ in range(2)]
    assert graphs[0] == graphs[1]
    assert hash(graphs[0]) == hash(graphs[1])
