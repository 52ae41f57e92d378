"""The CNN: its sizes, its forward pass against loops, its dropout in training, what it refuses."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import capsjax
import reference
import tiny
from capsjax import train, weights
from capsjax.networks import CNNConfig
from capsjax.networks.cnn import MNIST_BASELINE, MULTI_MNIST_BASELINE
from capsjax.presets import BEST, CNN, CNN_PAPER, PAPER
from capsjax.tasks import Classification

SMALL: dict[str, Any] = {"channels": (3, 4), "kernel_sizes": (3, 2), "hidden": (5,)}


def make(image_shape=(6, 7, 2), num_classes=3, **sizes) -> capsjax.CNN:
    """Makes a small network of random arrays."""
    build = lambda: capsjax.CNN(image_shape, num_classes, rngs=nnx.Rngs(0), **SMALL | sizes)  # noqa: E731
    return tiny.draw_arrays(build)


@pytest.mark.parametrize(
    ("config", "image_shape", "count"),
    [
        (MNIST_BASELINE, (28, 28, 1), 35_445_522),  # "35.4M"
        (MULTI_MNIST_BASELINE, (36, 36, 1), 24_563_978),  # "24.56M"
        (CNNConfig(), (28, 28, 1), 390_922),
    ],
    ids=["mnist", "multi-mnist", "small"],
)
def test_the_baselines_have_as_many_parameters_as_the_papers(config, image_shape, count):
    net = nnx.eval_shape(lambda: config.build(image_shape, 10, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(net, nnx.Param))) == count


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("lead", [(), (2,)], ids=len)
def test_the_forward_pass_equals_loops(rng, lead, pool):
    net = make(pool=pool)  # 6×7 pixels: a row or column that fills no square is left out
    net.eval()
    arrays: Any = jax.device_get(nnx.to_pure_dict(nnx.state(net, nnx.Param)))
    images = rng.uniform(size=(*lead, 6, 7, 2)).astype(np.float32)
    x = images.astype(np.float64)
    for layer, around in zip(arrays["convs"].values(), [(1, 1), (0, 1)], strict=True):
        x = np.pad(x, (*[(0, 0)] * len(lead), around, around, (0, 0)))
        x = np.maximum(reference.conv(x, layer["kernel"], 1) + layer["bias"], 0)
        x = reference.max_pool(x, pool)
    x = x.reshape(*lead, -1)
    first, last = arrays["dense"].values()
    x = np.maximum(x @ first["kernel"] + first["bias"], 0) @ last["kernel"] + last["bias"]
    graphdef, state = nnx.split(net)
    output = jax.jit(lambda state, images: nnx.merge(graphdef, state)(images))(state, images)
    np.testing.assert_allclose(output.scores, x, rtol=1e-4, atol=1e-5)
    assert (output.capsules, output.reconstruction) == (None, None)


def test_a_network_in_bfloat16_stays_in_bfloat16():
    graphdef, params, rest = nnx.split(make(), nnx.Param, ...)

    def forward(params, rest, images):
        cast = lambda leaf: leaf.astype(jnp.bfloat16)  # noqa: E731
        return nnx.merge(graphdef, jax.tree.map(cast, params), rest)(cast(images)).scores

    assert jax.eval_shape(forward, params, rest, jnp.ones((2, 6, 7, 2))).dtype == jnp.bfloat16


def step_twice(dropout: float):
    """Does two steps that move nothing, on the same images: the losses, and the last state."""
    task, optimizer = Classification(0, loss="cross_entropy"), optax.sgd(0.0)
    graphdef, state = train.create(
        make(tiny.IMAGE, tiny.NUM_CLASSES, dropout=dropout), optimizer, task
    )
    step = jax.jit(train.train_step, static_argnums=0)
    setup, losses = train.Setup(graphdef, optimizer, task), []
    for _ in range(2):
        state, diagnostics = step(setup, state, jax.random.key(0), *IMAGES, np.arange(16))
        losses.append(diagnostics.sums.losses["cross_entropy"])
    return losses, train.merge(graphdef, state)


IMAGES = tuple(map(jnp.asarray, tiny.make_images()))


def test_each_step_drops_other_numbers():
    (first, second), _ = step_twice(dropout=0.5)
    assert first != second
    (first, second), _ = step_twice(dropout=0.0)
    assert first == second


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_file_of_weights_keeps_the_seed_of_the_dropout_to_the_bit(tmp_path, dtype):
    _, net = step_twice(dropout=0.5)
    net.dropout.seed[...] = jnp.uint32(2**32 - 3)  # no float holds it
    weights.save(net, tmp_path / "net.safetensors", dtype=dtype)
    loaded: Any = weights.load(tmp_path / "net.safetensors")
    chex.assert_trees_all_equal(loaded.dropout.seed[...], jnp.uint32(2**32 - 3))
    assert {array.dtype for array in weights.arrays_of(loaded).values()} == {
        np.dtype(np.float32),
        np.dtype(np.uint32),
    }


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"kernel_sizes": (3,)}, "one for each convolution"),
        ({"channels": (2.5, 4)}, r"sizes are integers of 1 or more, got channels = \(2\.5, 4\)"),
        ({"pool": 0}, "sizes are integers of 1 or more, got pool = 0"),
        ({"dropout": 1.0}, "dropout is at least 0 and below 1, got 1.0"),
        (
            {"image_shape": (3, 7, 2)},
            "images of 3×7×2 in 3 classes; pooling 2 times by 2×2 needs at least 4×4 pixels",
        ),
        ({"num_classes": 0}, "in 0 classes"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_words(sizes, message):
    with pytest.raises(ValueError, match=message):
        make(**sizes)


def test_images_of_another_size_are_refused_in_words():
    with pytest.raises(
        ValueError, match=r"expected images \[\.\.\., 6, 7, 2\], got \[2, 7, 6, 2\]"
    ):
        make()(jnp.zeros((2, 7, 6, 2)))


def test_the_presets_train_it_as_best_and_paper_train_capsnet():
    assert (CNN.network, CNN_PAPER.network) == (CNNConfig(), MNIST_BASELINE)
    for ours, theirs in ((CNN, BEST), (CNN_PAPER, PAPER)):
        training = dataclasses.replace(theirs.training, loss="cross_entropy")
        assert ours == dataclasses.replace(theirs, network=ours.network, training=training)
