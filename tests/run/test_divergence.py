"""How a run stops when a number is no longer finite: in words, and with a sound checkpoint."""

import dataclasses
import re
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from capsjax import weights
from capsjax.run import loop
from capsjax.train import jit_steps
from hooks import after_step, stand_in
from tiny_run import STEPS, list_steps, read_arrays, read_rows, run_command

pytestmark = pytest.mark.slow


def spoil_step(number, spoil):
    """Patches the steps: one, and no other, gets its state and images from `spoil`."""

    def jit_spoiled_steps(setup, mesh):
        train, evaluate = jit_steps(setup, mesh)

        def train_spoiled(state, key, images, labels, order):
            if state.step + 1 == number:
                state, images = spoil(state, images, order[state.step % len(order)])
            return train(state, key, images, labels, order)

        return stand_in(train, train_spoiled), evaluate

    return mock.patch.object(loop, "jit_steps", jit_spoiled_steps)


def put_nan_into_a_parameter(state, images, batch):
    bias = state.params["primary"]["conv"]["bias"].at[3].set(jnp.nan)
    conv = state.params["primary"]["conv"] | {"bias": bias}
    return state._replace(params=state.params | {"primary": {"conv": conv}}), images


def put_nan_into_an_image(state, images, batch):
    pixels = images.pixels.astype(jnp.float32).at[batch[0], 5, 5].set(jnp.nan)
    return state, dataclasses.replace(images, pixels=pixels)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (put_nan_into_a_parameter, "the margin loss is nan;"),
        (put_nan_into_an_image, "the mean of its pixels is nan;"),
    ],
    ids=["parameter", "image"],
)
def test_a_nan_stops_the_run_at_the_step_that_meets_it_and_keeps_the_checkpoint_before(
    start, spoil, words
):
    with spoil_step(STEPS + 2, spoil):
        outcome = start(checkpoint_steps=2, shift_pixels=0)
    assert outcome.status == 1
    assert outcome.err.startswith(f"error: step {STEPS + 2}: {words}")
    assert str(outcome.folder) in outcome.err
    assert outcome.err.count("\n") == 1
    assert list_steps(outcome.folder) == [4, STEPS]
    assert all(np.isfinite(array).all() for array in read_arrays(outcome.folder).values())


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ({"margin": np.nan, "loss": np.nan}, "the margin loss is nan"),
        ({"reconstruction": np.inf, "loss": np.inf}, "the reconstruction loss is inf"),
        ({"loss": np.inf}, "the total loss is inf"),
    ],
    ids=["margin", "reconstruction", "total"],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_the_first_is_named(start, losses, words):
    def spoil(state, diagnostics):
        sums = diagnostics.sums._replace(losses=diagnostics.sums.losses | losses)
        return state, diagnostics._replace(sums=sums)

    assert_stopped_after(spoil, words, start)


def test_a_gradient_that_is_not_finite_stops_the_run(start):
    def spoil(state, diagnostics):
        norms = np.full(diagnostics.gradient_norms.shape, np.nan)
        return state, diagnostics._replace(gradient_norms=norms)

    words = "not finite: gradient of class_caps.weight, conv1.bias, conv1.kernel"
    assert_stopped_after(spoil, words, start)


def assert_stopped_after(spoil, words, start):
    with after_step(STEPS + 2, spoil):
        outcome = start(checkpoint_steps=2)
    assert outcome.status == 1
    assert outcome.err.startswith(f"error: step {STEPS + 2}: {words}")
    assert list_steps(outcome.folder) == [4, STEPS]


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("lr", [1e30, 1e39])
def test_a_learning_rate_far_too_large_stops_the_run_for_real(start, lr):
    outcome = start(lr=lr, checkpoint_steps=1)
    assert outcome.status == 1
    match = re.match(r"error: step (\d+): (the (margin|reconst)|not finite)", outcome.err)
    assert match
    assert list_steps(outcome.folder) == list(range(1, int(match[1])))[-2:]
    if int(match[1]) > 1:
        assert all(np.isfinite(array).all() for array in read_arrays(outcome.folder).values())


@pytest.mark.filterwarnings("ignore:overflow")
def test_weights_that_overflow_are_no_result(plain, base, tmp_path):
    net = weights.load(plain.folder / "weights.safetensors")
    net.conv1.kernel[...] = net.conv1.kernel[...] + 3e38
    weights.save(net, tmp_path / "huge.safetensors")
    outcome = run_command(
        weights=tmp_path / "huge.safetensors",
        testing=True,
        data_dir=base["data_dir"],
        save_dir=tmp_path,
    )
    assert outcome.status == 1
    assert re.match(r"error: step 0: the test \w+ loss is (nan|inf)", outcome.err)
    assert "test error" not in outcome.out


@pytest.mark.parametrize("split", ["validation", "test"])
def test_an_evaluation_that_is_not_finite_stops_the_run_before_its_checkpoint(start, split):
    evaluate, calls = loop.Runner.evaluate, []

    def evaluate_spoiled(self, state, train_indices=None):
        calls.append("test" if train_indices is None else "validation")
        if calls[-1] == split and calls.count(split) == 2:
            step = self._evaluate

            def spoiled_step(*args):
                sums, predicted = step(*args)
                return sums._replace(losses=sums.losses | {"margin": np.nan}), predicted

            self._evaluate = stand_in(step, spoiled_step)
        return evaluate(self, state, train_indices)

    with mock.patch.object(loop.Runner, "evaluate", evaluate_spoiled):
        outcome = start(validation=10)
    assert outcome.status == 1
    assert outcome.err.startswith(f"error: step 10: the {split} margin loss is nan")
    assert list_steps(outcome.folder) == [5]
    assert len(read_rows(outcome.folder)) == 1
