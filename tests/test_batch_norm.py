"""A network with batch normalisation: where its statistics change, and where they count."""

import chex
import jax
import numpy as np
import pytest

import capsjax
import tiny
from capsjax import train, weights
from capsjax.checkpoint import Checkpoints
from capsjax.sharding import make_mesh, replicate, replicated
from capsjax.train import Setup, TrainState

KEY = jax.random.key(5)
IMAGES, LABELS = tiny.make_images()
BATCHES = tiny.draw_batches(5)
COUNTED = np.ones(tiny.BATCH, bool)


def make_setup(dtype: str = "float32") -> tuple[Setup, TrainState]:
    """Makes setup and first state of the normalised network."""
    model = tiny.make_normalised()
    graphdef, state = train.create(model, tiny.OPTIMIZER, tiny.TASK)
    return Setup(graphdef, tiny.OPTIMIZER, tiny.TASK, dtype), state


def run(devices: int = 1, dtype: str = "float32"):
    """Trains five steps: the states, and the losses and the predictions of an evaluation."""
    setup, state = make_setup(dtype)
    mesh = make_mesh(tiny.BATCH, devices)
    data = [replicate(mesh, array) for array in (IMAGES, LABELS)]
    step, evaluation = train.jit_steps(setup, mesh)
    states = [jax.device_get(state)]
    for batch in BATCHES:
        state, _ = step(jax.device_put(state, replicated(mesh)), KEY, *data, batch[None])
        states.append(jax.device_get(state))
    return states, jax.device_get(evaluation(state, *data, BATCHES[0], COUNTED))


@pytest.fixture(scope="module")
def trained():
    """The states of a run on one device, and its evaluation."""
    return run()


@pytest.fixture
def model(trained):
    """The trained network, its statistics far from the first ones."""
    setup, _ = make_setup()
    return train.merge(setup.graphdef, jax.device_put(trained[0][-1]))


def test_statistics_move_in_training_towards_those_of_the_batches(trained):
    states, _ = trained
    means, variances = (
        np.array([state.statistics["norm"][name] for state in states]) for name in ("mean", "var")
    )
    mean, variance = 0.0, 1.0
    for t, batch in enumerate(BATCHES):
        images = tiny.TASK.train_batch(jax.random.fold_in(KEY, t), IMAGES, LABELS, batch).images
        pixels = np.asarray(images, np.float64)
        mean, variance = 0.9 * mean + 0.1 * pixels.mean(), 0.9 * variance + 0.1 * pixels.var()
        np.testing.assert_allclose(means[t + 1], [mean], rtol=1e-5)
        np.testing.assert_allclose(variances[t + 1], [variance], rtol=1e-5)


def test_statistics_stay_in_float32_in_a_bfloat16_run(trained):
    states, _ = run(dtype="bfloat16")
    chex.assert_trees_all_equal_shapes_and_dtypes(states[-1], trained[0][-1])
    chex.assert_trees_all_close(states[-1].statistics, trained[0][-1].statistics, rtol=1e-2)


def test_evaluation_takes_statistics_as_they_are_and_does_not_move_them(trained, model):
    _, (sums, predicted) = trained
    before = jax.tree.map(np.copy, weights.arrays_of(model))
    prediction = capsjax.predict(model, IMAGES[BATCHES[0]])
    chex.assert_trees_all_equal(weights.arrays_of(model), before)
    np.testing.assert_array_equal(predicted, prediction.predicted)
    assert sums.correct == np.sum(prediction.predicted == LABELS[BATCHES[0]])
    margin = capsjax.margin_loss(prediction.scores, LABELS[BATCHES[0]]).sum()
    np.testing.assert_allclose(sums.losses["margin"], margin, rtol=1e-5)


@pytest.mark.slow
def test_eight_devices_normalise_by_the_whole_batch_as_one_does(trained):
    alone, (sums, predicted) = trained
    together, (same_sums, same) = run(8)
    for ours, theirs in zip(together, alone, strict=True):
        chex.assert_trees_all_close(ours.statistics, theirs.statistics, rtol=1e-5)
        chex.assert_trees_all_close(ours.params, theirs.params, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(same, predicted)
    chex.assert_trees_all_close(same_sums, sums, rtol=1e-4)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_prediction_of_an_image_does_not_depend_on_the_others_of_the_batch(model, mode):
    getattr(model, mode)()
    images = IMAGES.astype(np.float32) / 255
    together = capsjax.predict(model, images)
    assert together.reconstruction is None
    for n in (0, 7):
        alone = capsjax.predict(model, images[n])
        np.testing.assert_allclose(alone.scores, together.scores[n], rtol=1e-4)
        others = capsjax.predict(model, np.stack([images[n], np.ones_like(images[n])]))
        np.testing.assert_allclose(others.scores[0], together.scores[n], rtol=1e-4)
    # In training mode the network does depend on them.
    model.train()
    mixed = model(np.stack([images[0], np.ones_like(images[0])])).scores[0]
    assert np.abs(mixed - together.scores[0]).max() > 1e-2


def test_a_file_of_weights_keeps_the_statistics_to_the_bit(tmp_path, monkeypatch, model):
    monkeypatch.setitem(capsjax.NETWORKS, "normalised", tiny.NormalisedConfig)
    weights.save(model, tmp_path / "net.safetensors")
    loaded = weights.load(tmp_path / "net.safetensors")
    assert isinstance(loaded, tiny.NormalisedNetwork)
    ours, theirs = weights.arrays_of(loaded), weights.arrays_of(model)
    assert {"norm.mean", "norm.var", "norm.scale", "norm.bias"} < ours.keys()
    chex.assert_trees_all_equal(ours, theirs)
    prediction = capsjax.predict(loaded, IMAGES)
    chex.assert_trees_all_equal(prediction, capsjax.predict(model, IMAGES))
    # It is in evaluation mode: a call gives the same scores and moves no statistics.
    scores = loaded(IMAGES.astype(np.float32) / 255).scores
    np.testing.assert_allclose(scores, prediction.scores, rtol=1e-5)
    chex.assert_trees_all_equal(weights.arrays_of(loaded), theirs)


def test_a_checkpoint_keeps_the_statistics_to_the_bit(tmp_path, trained):
    state = trained[0][-1]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        checkpoint = checkpoints.last()
    assert checkpoint is not None
    for name in ("mean", "var"):
        np.testing.assert_array_equal(
            checkpoint.arrays[f"statistics.norm.{name}"], state.statistics["norm"][name]
        )
