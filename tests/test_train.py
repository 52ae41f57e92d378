"""The two steps on one device."""

import dataclasses
import re
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import capsjax
import platforms
import reference
import tiny
from capsjax import sharding, train
from capsjax.data import shift
from capsjax.tasks import Classification
from capsjax.train import Diagnostics, Sums, TrainState, eval_step, jit_steps, train_step

N = tiny.N
KEY = jax.random.key(7)
IMAGES, LABELS = tiny.make_images()
BATCHES = tiny.draw_batches(60)
MESH = sharding.make_mesh(tiny.BATCH, 1)
WHOLE = sharding.replicated(MESH)
DATA = tiny.place_data(MESH, IMAGES, LABELS)


@pytest.fixture(scope="module")
def steps():
    """Both steps; tracing one of them a second time fails."""
    return tiny.jit_steps()


def first_state(**changes) -> TrainState:
    return jax.device_put(tiny.make_state()._replace(**changes), WHOLE)


def run(step, batches, state=None, key=KEY) -> tuple[TrainState, list[Diagnostics]]:
    """Steps from `state`, by default the first."""
    state, diagnostics = state or first_state(), []
    for batch in batches:
        state, last = step(state, key, *DATA, batch[None])
        diagnostics.append(last)
    return jax.device_get((state, diagnostics))


def evaluate(step, state, indices, size=tiny.BATCH, labels=LABELS) -> tuple[Sums, np.ndarray]:
    """Evaluates in batches of `size`, the last one filled up."""
    state, labels = jax.device_put((state, labels), WHOLE)
    filled = np.pad(indices, (0, -len(indices) % size)).astype(np.int32)
    counted = np.arange(filled.size) < len(indices)
    batches = zip(filled.reshape(-1, size), counted.reshape(-1, size), strict=True)
    results = [step(state, DATA[0], labels, *batch) for batch in batches]
    sums, predicted = zip(*results, strict=True)
    total = jax.tree.map(lambda *values: sum(values), *sums)
    return total, np.concatenate(predicted)[: len(indices)]


def test_a_run_traces_each_step_once(steps):
    step, evaluation = steps
    state = first_state()
    for _ in range(2):  # epochs
        state, _ = run(step, BATCHES[:3], jax.device_put(state, WHOLE))
        evaluate(evaluation, state, np.arange(N))
        state = state._replace(sums=jax.tree.map(np.zeros_like, state.sums))
    assert state.step == 6


@pytest.mark.slow
def test_the_batches_of_an_epoch_take_turns(steps):
    order, state, step = BATCHES[:3], first_state(), jit_steps(tiny.SETUP, MESH)[0]
    for _ in range(4):  # the fourth step is the first of the second epoch
        state, _ = step(state, KEY, *DATA, order)
    expected, _ = run(steps[0], order[[0, 1, 2, 0]])
    chex.assert_trees_all_equal(jax.device_get(state), expected)


def assert_are_sums(sums: Sums) -> None:
    """Asserts that the sums of CapsNet have their names, and each its shape and dtype."""
    assert list(sums.losses) == ["loss", "margin", "reconstruction"]
    chex.assert_shape(jax.tree.leaves(sums), ())
    chex.assert_type(jax.tree.leaves(sums), [np.float32] * 3 + [np.int32] * 2)


def test_every_output_has_its_shape_and_dtype(steps):
    before = first_state()
    expected = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), before)
    state, (diagnostics,) = run(steps[0], BATCHES[:1], before)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, expected)
    assert_are_sums(train.zero_sums(train.loss_names(tiny.make_capsnet(), tiny.TASK)))
    assert_are_sums(diagnostics.sums)
    assert_are_sums(state.sums)
    chex.assert_shape([diagnostics.step, diagnostics.pixel_mean], ())
    chex.assert_shape(diagnostics.gradient_norms, (len(jax.tree.leaves(state.params)),))
    chex.assert_type(diagnostics[:2], [np.int32, np.float32])
    chex.assert_type(diagnostics.gradient_norms, np.float32)
    sums, predicted = evaluate(steps[1], state, np.arange(tiny.BATCH))
    assert_are_sums(sums)
    chex.assert_shape(predicted, (tiny.BATCH,))
    chex.assert_type(predicted, np.int32)


@jax.jit
def loss_by_hand(params, x, labels, lam_recon):
    output = nnx.merge(tiny.SETUP.graphdef, nnx.State(params))(x, labels)
    loss = capsjax.caps_loss(labels, output.scores, x, output.reconstruction, lam_recon)
    return loss, output


gradient_by_hand = jax.jit(jax.grad(loss_by_hand, has_aux=True))


def adam_by_hand(params, gradients, rates, b1=0.9, b2=0.999, eps=1e-8):
    """Kingma, Ba, 2015, algorithm 1, in float64: the parameters after these gradients."""
    m, v = np.zeros(params.shape), np.zeros(params.shape)
    params = params.astype(np.float64)
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        m = b1 * m + (1 - b1) * gradient
        v = b2 * v + (1 - b2) * np.square(gradient, dtype=np.float64)
        params = params - rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return params


def sums_by_hand(output, x, labels, lam_recon) -> Any:
    """Computes the sums over a batch by the paper's loops."""
    present = np.eye(tiny.NUM_CLASSES)[labels]
    margin = reference.margin_loss(output.scores, present, 0.9, 0.1, 0.5).sum()
    reconstruction = reference.reconstruction_loss(output.reconstruction, x).sum()
    loss = margin + lam_recon * reconstruction
    losses = {"loss": loss, "margin": margin, "reconstruction": reconstruction}
    correct = np.sum(output.scores.argmax(-1) == labels)
    return Sums(losses, correct, jnp.int32(len(labels)))


@pytest.mark.parametrize(
    ("lam_recon", "shift_pixels"), [(0.5, 1), pytest.param(20.0, 0, marks=pytest.mark.slow)]
)
def test_three_steps_are_gather_shift_normalise_loss_and_adam(steps, lam_recon, shift_pixels):
    setup = dataclasses.replace(tiny.SETUP, task=Classification(lam_recon, shift_pixels))
    step = steps[0] if setup == tiny.SETUP else jit_steps(setup, MESH)[0]
    start = first_state(step=np.int32(5))
    first, gradients = jax.device_get(start.params), []
    sums = jax.device_get(start.sums)
    for number, batch in enumerate(BATCHES[:3], 5):
        params = jax.device_get(start.params)
        shifted = shift(jax.random.fold_in(KEY, number), jnp.asarray(IMAGES[batch]), shift_pixels)
        x, labels = np.asarray(shifted, np.float32) / 255, LABELS[batch]
        gradient, output = jax.device_get(gradient_by_hand(params, x, labels, lam_recon))
        gradients.append(gradient)

        state, (diagnostics,) = run(step, [batch], start)
        expected = sums_by_hand(output, x, labels, lam_recon)
        chex.assert_trees_all_close(diagnostics.sums, expected, rtol=1e-5)
        sums = jax.tree.map(np.add, sums, expected)
        chex.assert_trees_all_close(state.sums, sums, rtol=1e-5)
        assert diagnostics.step == state.step == number + 1
        np.testing.assert_allclose(diagnostics.pixel_mean, x.mean(), rtol=1e-5)
        norms = [np.linalg.norm(leaf.ravel()) for leaf in jax.tree.leaves(gradient)]
        np.testing.assert_allclose(diagnostics.gradient_norms, norms, rtol=1e-5)

        rates = tiny.SCHEDULE(np.arange(len(gradients)))
        leaves = map(jax.tree.leaves, (state.params, first, *gradients))
        for leaf, begin, *past in zip(*leaves, strict=True):
            by_hand = adam_by_hand(begin, past, rates)
            # Adam divides by the gradient's size: where that is rounding, so is the update.
            certain = np.abs(past).min(0) > 1e-6
            np.testing.assert_allclose(leaf[certain], by_hand[certain], atol=2e-5)
        start = jax.device_put(state, WHOLE)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), jax.device_get(start.params), first)
    assert min(jax.tree.leaves(moved)) > 0.02  # every array, by about three learning rates


@pytest.mark.slow  # op by op it compiles some hundred times
def test_without_jit_a_step_is_the_same_up_to_rounding(steps):
    before = jax.device_get(first_state())
    eager, diagnostics = train_step(tiny.SETUP, before, KEY, DATA[0], DATA[1], BATCHES[0])
    state, jitted = steps[0](first_state(), KEY, *DATA, BATCHES[:1])
    chex.assert_trees_all_close(diagnostics, jitted, rtol=1e-5)
    chex.assert_trees_all_close(eager.opt_state, state.opt_state, rtol=1e-4, atol=1e-7)
    chex.assert_trees_all_close(eager.params, state.params, atol=1e-4)


def test_a_step_uses_up_its_state_and_nothing_else(steps):
    state = first_state()
    next_state, diagnostics = steps[0](state, KEY, *DATA, BATCHES[:1])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((KEY, DATA)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((next_state, diagnostics)))
    steps[1](next_state, *DATA, BATCHES[0], np.ones(tiny.BATCH, bool))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(next_state))


def test_the_same_state_key_and_indices_give_the_same_bits(steps):
    chex.assert_trees_all_equal(run(steps[0], BATCHES[:5]), run(steps[0], BATCHES[:5]))


def test_the_key_the_step_and_the_indices_each_change_what_is_seen(steps):
    def seen(step=0, key=KEY, batch=BATCHES[0]):
        _, (diagnostics,) = run(steps[0], [batch], first_state(step=np.int32(step)), key)
        return float(diagnostics.sums.losses["reconstruction"])

    other = [seen(), seen(step=1), seen(key=jax.random.key(8)), seen(batch=BATCHES[1])]
    assert len(set(other)) == 4


@pytest.mark.slow
def test_bfloat16_keeps_parameters_and_sums_in_float32_and_is_near_float32(steps):
    step, _ = jit_steps(dataclasses.replace(tiny.SETUP, dtype="bfloat16"), MESH)
    exact, diagnostics = run(steps[0], BATCHES[:3])
    state, rounded = run(step, BATCHES[:3])
    chex.assert_trees_all_equal_shapes_and_dtypes((state, rounded), (exact, diagnostics))
    for ours, theirs in zip(rounded, diagnostics, strict=True):
        assert ours.sums.losses["margin"] != theirs.sums.losses["margin"]
        chex.assert_trees_all_close(ours.sums.losses, theirs.sums.losses, rtol=0.02)
        np.testing.assert_allclose(ours.gradient_norms, theirs.gradient_norms, rtol=0.05)
    apart = jax.tree.map(lambda a, b: np.mean(np.abs(a - b)), state.params, exact.params)
    assert 0 < max(jax.tree.leaves(apart)) < 0.01


@pytest.mark.parametrize("examples", [N, 15, 3])
def test_evaluation_counts_every_image_once_whatever_the_batch_size(steps, examples):
    state = first_state()
    indices = np.random.default_rng(1).permutation(N)[:examples]
    sums, predicted = evaluate(steps[1], state, indices)
    single = jax.jit(partial(eval_step, tiny.SETUP))
    one_by_one, expected = evaluate(single, state, indices, 1)
    assert sums.examples == examples
    assert sums.correct == one_by_one.correct
    np.testing.assert_array_equal(predicted, expected)
    chex.assert_trees_all_close(sums.losses, one_by_one.losses, rtol=1e-5)


def test_evaluation_is_of_the_images_as_they_are_drawn_from_the_longest_capsule(steps):
    state = first_state()
    # Larger parameters draw images that are less alike.
    state = state._replace(params=jax.tree.map(lambda leaf: 2 * leaf, state.params))
    batch = BATCHES[0]
    sums, predicted = evaluate(steps[1], state, batch)
    x, labels = np.float32(IMAGES[batch]) / 255, LABELS[batch]
    prediction = capsjax.predict(train.merge(tiny.SETUP.graphdef, state), IMAGES[batch])
    np.testing.assert_array_equal(predicted, prediction.predicted)
    expected = jax.device_get(sums_by_hand(prediction, x, labels, tiny.TASK.lam_recon))
    chex.assert_trees_all_close(sums, expected, rtol=1e-5)
    from_longest = expected.losses["reconstruction"]
    _, output = loss_by_hand(state.params, x, labels, 0.0)
    from_label = reference.reconstruction_loss(output.reconstruction, x).sum()
    assert abs(from_label - from_longest) > 1e-3 * from_longest


def test_labels_do_not_leak_into_evaluation(steps):
    state = first_state()
    right, predicted = evaluate(steps[1], state, BATCHES[0])
    others = (LABELS + 1) % tiny.NUM_CLASSES
    wrong, same = evaluate(steps[1], state, BATCHES[0], labels=others)
    np.testing.assert_array_equal(predicted, same)
    assert right.losses["reconstruction"] == wrong.losses["reconstruction"]
    assert right.losses["margin"] != wrong.losses["margin"]


def test_training_fits_twenty_images(steps):
    step, evaluation = steps
    before, _ = evaluate(evaluation, first_state(), np.arange(N))
    assert before.correct <= N // 2
    state, diagnostics = run(step, np.tile(BATCHES, (3, 1)))
    assert np.isfinite([each.sums.losses["margin"] for each in diagnostics]).all()
    after, predicted = evaluate(evaluation, state, np.arange(N))
    np.testing.assert_array_equal(predicted, LABELS)
    assert after.losses["margin"] < before.losses["margin"] / 5


class NoisyNetwork(tiny.NormalisedNetwork):
    """A network with a state that is neither parameters nor batch statistics."""

    def __init__(self, *args, rngs):
        super().__init__(*args, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def test_a_variable_that_is_neither_parameter_nor_statistic_is_refused_by_its_name():
    config = tiny.NormalisedConfig()
    model = NoisyNetwork(config, tiny.IMAGE, tiny.NUM_CLASSES, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'dropout', 'rngs', 'key'"):
        train.create(model, tiny.OPTIMIZER, tiny.TASK)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_an_average_of_the_state_alone_or_of_the_setup_alone_is_refused(decay):
    _, state = train.create(
        tiny.make_capsnet(), tiny.OPTIMIZER, tiny.TASK, average=None if decay else 0.9
    )
    setup = dataclasses.replace(tiny.SETUP, average=decay)
    with pytest.raises(ValueError, match="give `create` and `Setup` the same average"):
        jax.eval_shape(partial(train_step, setup), state, KEY, IMAGES, LABELS, BATCHES[0])


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_a_step_gathers_its_images_once_and_a_gpus_gradients_keep_their_layout(platform):
    state = first_state()
    traced = jax.jit(partial(train_step, tiny.SETUP)).trace(state, KEY, IMAGES, LABELS, BATCHES[0])
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert len(re.findall(r"optimization_barrier.*ui8", text)) == 1
    arrays = len(jax.tree.leaves(state.params))
    assert text.count("@LayoutConstraint") == (arrays if platform == "cuda" else 0)


def test_the_norms_are_the_same_whether_summed_in_parts_or_not(monkeypatch, rng):
    arrays = {"odd": rng.normal(size=(3, 5)), "large": 1e3 * rng.normal(size=(64, 80))}
    norms = [np.linalg.norm(array) for _, array in sorted(arrays.items())]
    tree = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), arrays)
    for platform in ("cuda", "tpu"):
        platforms.take_path(platform, monkeypatch)
        np.testing.assert_allclose(train._norms(tree), norms, rtol=1e-6)


def test_a_tpu_keeps_the_shape_of_each_gradient_while_it_sums():
    traced = jax.jit(train._norms).trace({"kernel": jnp.ones((64, 80)), "bias": jnp.ones(80)})
    texts = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cuda", "tpu")
    }
    assert [name for name, text in texts.items() if "-> tensor<1024x5xf32>" in text] == ["cuda"]
