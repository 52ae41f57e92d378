"""The two steps on one device."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import capsjax
import plan
import reference
import settings
import tiny
from capsjax import presets, sharding, train
from capsjax.data import shift
from capsjax.train import Metrics, Report, TrainState, eval_step, jit_steps, train_step

N = tiny.N
KEY = jax.random.key(7)
IMAGES, LABELS = tiny.images()
BATCHES = tiny.batches(60)
MESH = sharding.make_mesh(tiny.BATCH, 1)
WHOLE = sharding.replicated(MESH)
DATA = jax.device_put((IMAGES, LABELS), WHOLE)


@pytest.fixture(scope="module")
def steps():
    """Both steps; tracing one of them a second time fails."""
    return tiny.steps()


def first_state(**changes) -> TrainState:
    return jax.device_put(tiny.state()._replace(**changes), WHOLE)


def run(step, batches, state=None, key=KEY) -> tuple[TrainState, list[Report]]:
    """Steps from `state`, by default the first."""
    state, reports = state or first_state(), []
    for batch in batches:
        state, report = step(state, key, *DATA, batch)
        reports.append(report)
    return jax.device_get((state, reports))


def evaluate(step, params, indices, size=tiny.BATCH, labels=LABELS) -> tuple[Metrics, np.ndarray]:
    """Evaluates in batches of `size`, the last one filled up."""
    params, labels = jax.device_put((params, labels), WHOLE)
    filled = np.pad(indices, (0, -len(indices) % size)).astype(np.int32)
    counts = np.arange(filled.size) < len(indices)
    batches = zip(filled.reshape(-1, size), counts.reshape(-1, size), strict=True)
    results = [step(params, DATA[0], labels, *batch) for batch in batches]
    metrics, classes = zip(*results, strict=True)
    sums = jax.tree.map(lambda *values: sum(values), *metrics)
    return sums, np.concatenate(classes)[: len(indices)]


def test_a_run_traces_each_step_once(steps):
    step, evaluation = steps
    state = first_state()
    for _ in range(2):  # epochs
        state, _ = run(step, BATCHES[:3], jax.device_put(state, WHOLE))
        evaluate(evaluation, state.params, np.arange(N))
        state = state._replace(sums=jax.tree.map(np.zeros_like, state.sums))
    assert state.step == 6


def test_every_output_has_the_shape_and_dtype_that_it_should(steps):
    before = first_state()
    expected = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), before)
    state, (report,) = run(steps[0], BATCHES[:1], before)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, expected)
    for metrics in (Metrics.zeros(), report.metrics, state.sums):
        chex.assert_shape(metrics, ())
        chex.assert_type(metrics, [np.float32, np.float32, np.int32, np.int32])
    chex.assert_shape([report.step, report.pixels, report.metrics], ())
    arrays = len(jax.tree.leaves(state.params))
    chex.assert_shape([report.parameters, report.gradient], (arrays,))
    chex.assert_type(report[:3], [np.int32, np.float32, np.float32])
    chex.assert_type(report.gradient, np.float32)
    metrics, classes = evaluate(steps[1], state.params, np.arange(tiny.BATCH))
    chex.assert_shape(metrics, ())
    chex.assert_type(metrics, [np.float32, np.float32, np.int32, np.int32])
    chex.assert_shape(classes, (tiny.BATCH,))
    chex.assert_type(classes, np.int32)


@jax.jit
def loss_by_hand(params, x, labels, lam_recon):
    output = train.merge(tiny.RECIPE.graphdef, params)(x, labels)
    loss = capsjax.caps_loss(labels, output.lengths, x, output.reconstruction, lam_recon)
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


@pytest.mark.parametrize(("lam_recon", "shift_pixels"), [(0.5, 1), (20.0, 0)])
def test_three_steps_are_gather_shift_normalise_loss_and_adam(steps, lam_recon, shift_pixels):
    recipe = dataclasses.replace(tiny.RECIPE, lam_recon=lam_recon, shift_pixels=shift_pixels)
    step = steps[0] if recipe == tiny.RECIPE else jit_steps(recipe, MESH)[0]
    start = first_state(step=np.int32(5))
    first, gradients = jax.device_get(start.params), []
    sums = dict.fromkeys(Metrics._fields, 0.0)
    for number, batch in enumerate(BATCHES[:3], 5):
        params = jax.device_get(start.params)
        shifted = shift(jax.random.fold_in(KEY, number), jnp.asarray(IMAGES[batch]), shift_pixels)
        x, labels = np.asarray(shifted, np.float32) / 255, LABELS[batch]
        gradient, output = jax.device_get(gradient_by_hand(params, x, labels, lam_recon))
        gradients.append(gradient)

        state, (report,) = run(step, [batch], start)
        present = np.eye(tiny.CLASSES)[labels]
        expected = {
            "margin": reference.margin_loss(output.lengths, present, 0.9, 0.1, 0.5).sum(),
            "reconstruction": reference.reconstruction_loss(output.reconstruction, x).sum(),
            "correct": np.sum(output.lengths.argmax(-1) == labels),
            "examples": tiny.BATCH,
        }
        chex.assert_trees_all_close(report.metrics._asdict(), expected, rtol=1e-5)
        sums = {name: sums[name] + value for name, value in expected.items()}
        chex.assert_trees_all_close(state.sums._asdict(), sums, rtol=1e-5)
        assert report.step == state.step == number + 1
        np.testing.assert_allclose(report.pixels, x.mean(), rtol=1e-5)
        for lengths, arrays in ((report.parameters, params), (report.gradient, gradient)):
            expected = [np.linalg.norm(leaf.ravel()) for leaf in jax.tree.leaves(arrays)]
            np.testing.assert_allclose(lengths, expected, rtol=1e-5)

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
    eager, report = train_step(tiny.RECIPE, before, KEY, DATA[0], DATA[1], BATCHES[0])
    state, jitted = steps[0](first_state(), KEY, *DATA, BATCHES[0])
    chex.assert_trees_all_close(report, jitted, rtol=1e-5)
    chex.assert_trees_all_close(eager.opt_state, state.opt_state, rtol=1e-4, atol=1e-7)
    chex.assert_trees_all_close(eager.params, state.params, atol=1e-4)


def test_a_step_uses_up_its_state_and_nothing_else(steps):
    state = first_state()
    next_state, report = steps[0](state, KEY, *DATA, BATCHES[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in (KEY, *DATA))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((next_state, report)))
    steps[1](next_state.params, *DATA, BATCHES[0], np.ones(tiny.BATCH, bool))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(next_state))


def test_the_same_state_key_and_indices_give_the_same_bits(steps):
    chex.assert_trees_all_equal(run(steps[0], BATCHES[:5]), run(steps[0], BATCHES[:5]))


def test_the_key_the_step_and_the_indices_each_change_what_is_seen(steps):
    def seen(step=0, key=KEY, batch=BATCHES[0]):
        _, (report,) = run(steps[0], [batch], first_state(step=np.int32(step)), key)
        return float(report.metrics.reconstruction)

    other = [seen(), seen(step=1), seen(key=jax.random.key(8)), seen(batch=BATCHES[1])]
    assert len(set(other)) == 4


def test_bfloat16_keeps_parameters_and_metrics_in_float32_and_is_near_float32(steps):
    step, _ = jit_steps(dataclasses.replace(tiny.RECIPE, dtype="bfloat16"), MESH)
    exact, reports = run(steps[0], BATCHES[:3])
    state, rounded = run(step, BATCHES[:3])
    chex.assert_trees_all_equal_shapes_and_dtypes((state, rounded), (exact, reports))
    for ours, theirs in zip(rounded, reports, strict=True):
        assert ours.metrics.margin != theirs.metrics.margin
        np.testing.assert_allclose(ours.metrics.margin, theirs.metrics.margin, rtol=0.02)
        np.testing.assert_allclose(
            ours.metrics.reconstruction, theirs.metrics.reconstruction, rtol=0.02
        )
        np.testing.assert_allclose(ours.gradient, theirs.gradient, rtol=0.05)
    apart = jax.tree.map(lambda a, b: np.mean(np.abs(a - b)), state.params, exact.params)
    assert 0 < max(jax.tree.leaves(apart)) < 0.01


@pytest.mark.parametrize("examples", [N, 15, 3])
def test_evaluation_counts_every_image_once_whatever_the_batch_size(steps, examples):
    params = first_state().params
    indices = np.random.default_rng(1).permutation(N)[:examples]
    sums, classes = evaluate(steps[1], params, indices)
    single = jax.jit(partial(eval_step, tiny.RECIPE))
    one_by_one, expected = evaluate(single, params, indices, 1)
    assert sums.examples == examples
    assert sums.correct == one_by_one.correct
    np.testing.assert_array_equal(classes, expected)
    np.testing.assert_allclose(sums.margin, one_by_one.margin, rtol=1e-5)
    np.testing.assert_allclose(sums.reconstruction, one_by_one.reconstruction, rtol=1e-5)


def test_evaluation_is_of_the_images_as_they_are_drawn_from_the_longest_capsule(steps):
    params = jax.tree.map(lambda leaf: 2 * leaf, first_state().params)  # less alike drawings
    batch = BATCHES[0]
    sums, classes = evaluate(steps[1], params, batch)
    x, labels = np.float32(IMAGES[batch]) / 255, LABELS[batch]
    model = train.merge(tiny.RECIPE.graphdef, params)
    prediction = capsjax.predict(model, IMAGES[batch])
    np.testing.assert_array_equal(classes, prediction.classes)
    assert sums.correct == np.sum(prediction.classes == labels)
    present = np.eye(tiny.CLASSES)[labels]
    margin = reference.margin_loss(prediction.lengths, present, 0.9, 0.1, 0.5)
    np.testing.assert_allclose(sums.margin, margin.sum(), rtol=1e-5)
    from_longest = reference.reconstruction_loss(prediction.reconstruction, x).sum()
    np.testing.assert_allclose(sums.reconstruction, from_longest, rtol=1e-5)
    from_label = reference.reconstruction_loss(
        loss_by_hand(params, x, labels, 0.0)[1].reconstruction, x
    ).sum()
    assert abs(from_label - from_longest) > 1e-3 * from_longest


def test_labels_do_not_leak_into_evaluation(steps):
    params = first_state().params
    right, classes = evaluate(steps[1], params, BATCHES[0])
    wrong, same = evaluate(steps[1], params, BATCHES[0], labels=(LABELS + 1) % tiny.CLASSES)
    np.testing.assert_array_equal(classes, same)
    assert right.reconstruction == wrong.reconstruction
    assert right.margin != wrong.margin


def test_training_fits_twenty_images(steps):
    step, evaluation = steps
    before, _ = evaluate(evaluation, first_state().params, np.arange(N))
    assert before.correct <= N // 2
    state, reports = run(step, np.tile(BATCHES, (3, 1)))
    assert np.isfinite([report.metrics.margin for report in reports]).all()
    after, classes = evaluate(evaluation, state.params, np.arange(N))
    np.testing.assert_array_equal(classes, LABELS)
    assert after.margin < before.margin / 5


@pytest.fixture
def learning_rates(monkeypatch, tmp_path, rng):
    """The learning rates of a run of these settings: of all its steps, [epochs, steps]."""
    images, labels = rng.integers(0, 256, (53, *tiny.IMAGE), np.uint8), np.arange(53) % tiny.CLASSES
    np.savez(tmp_path / "images.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    monkeypatch.setattr(plan, "CapsNet", lambda *args, **kwargs: tiny.model())

    def rates(preset, **recipe):
        chosen = settings.Recipe(
            **{"lr": preset.lr, "lr_decay": preset.lr_decay, "batch_size": 10, **recipe}
        )
        images = settings.Images(data_dir=tmp_path / "images.npz")
        made, _ = plan.make_plan(settings.Settings(chosen, images), preset)
        assert made.steps == 5
        return np.asarray(made.schedule(np.arange(5 * chosen.epochs))).reshape(-1, 5)

    return rates


@pytest.mark.parametrize(("lr", "decay"), [(1e-3, 0.9), (0.02, 0.5), (1e-3, 1.0)])
def test_the_seeds_learning_rate_falls_once_an_epoch(learning_rates, lr, decay):
    rates = learning_rates(presets.SEED, epochs=6, lr=lr, lr_decay=decay)
    expected = lr * decay ** np.arange(6)
    np.testing.assert_allclose(rates, np.tile(expected[:, None], 5), rtol=1e-5)


@pytest.mark.parametrize("epochs", [1, 7, 640])
def test_the_papers_learning_rate_falls_by_the_same_factor_over_any_number_of_epochs(
    learning_rates, epochs
):
    rates = learning_rates(presets.PAPER, epochs=epochs).ravel()
    expected = 1e-3 * 0.96 ** (150 * np.arange(5 * epochs) / (5 * epochs))
    np.testing.assert_allclose(rates, expected, rtol=1e-4)


def test_the_papers_learning_rate_has_a_floor(learning_rates):
    rates = learning_rates(presets.PAPER, epochs=4, lr=1e-4).ravel()
    assert rates.min() == rates[-1] == np.float32(1e-6)
    assert rates[0] == np.float32(1e-4)
