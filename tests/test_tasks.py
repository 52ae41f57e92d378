"""Tasks: batches, losses, right answers, and tasks of one's own in a train step."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import capsjax
import reference
import tiny
from capsjax import sharding, train
from capsjax.data import shift, warp
from capsjax.networks import Output
from capsjax.tasks import Batch, Classification, batch_shape, example_batch

J = tiny.NUM_CLASSES
KEY = jax.random.key(3)
IMAGES, LABELS = tiny.make_images()
MESH = sharding.make_mesh(tiny.BATCH, 1)
K_HOT = np.eye(J, dtype=np.int32)[[LABELS, (LABELS + 2) % J]].sum(0, np.int32)  # two each
INDICES = np.array([3, 0, 19, 3], np.int32)  # in any order, and twice the same


@pytest.mark.parametrize("labels", [LABELS, K_HOT], ids=["numbers", "k-hot"])
def test_a_batch_for_evaluation_is_the_examples_with_pixels_from_0_to_1(labels):
    data = jnp.asarray(IMAGES), jnp.asarray(labels)
    batch = Classification(0.5, shift_pixels=2).test_batch(*data, INDICES)
    np.testing.assert_allclose(batch.images, IMAGES[INDICES].astype(np.float32) / 255, rtol=1e-6)
    np.testing.assert_array_equal(batch.targets, batch.images)
    np.testing.assert_array_equal(batch.labels, labels[INDICES])
    assert batch.images.dtype == jnp.float32
    assert batch.labels.dtype == labels.dtype


@pytest.mark.parametrize("labels", [LABELS, K_HOT], ids=["numbers", "k-hot"])
@pytest.mark.parametrize("pixels", [0, 2])
def test_a_training_batch_is_the_examples_shifted_by_the_key(labels, pixels):
    data = jnp.asarray(IMAGES), jnp.asarray(labels)
    batch = Classification(0.5, pixels).train_batch(KEY, *data, INDICES)
    shifted = shift(KEY, jnp.asarray(IMAGES[INDICES]), pixels)
    np.testing.assert_allclose(batch.images, np.asarray(shifted, np.float32) / 255, rtol=1e-6)
    np.testing.assert_array_equal(batch.targets, batch.images)
    np.testing.assert_array_equal(batch.labels, labels[INDICES])
    other = Classification(0.5, pixels).train_batch(jax.random.key(4), *data, INDICES)
    assert np.any(np.asarray(other.images) != np.asarray(batch.images)) == (pixels > 0)


@pytest.mark.parametrize(
    "limits",
    [{"rotation": 20}, {"shear": 20}, {"zoom": 0.3}, {"elastic": 1}, {"shift_pixels": 0.5}],
    ids=lambda limits: next(iter(limits)),
)
def test_what_is_no_whole_shift_is_one_warp_by_the_key(limits):
    data = jnp.asarray(IMAGES), jnp.asarray(LABELS)
    batch = Classification(0.5, **limits).train_batch(KEY, *data, INDICES)
    pixels = jnp.asarray(IMAGES[INDICES], jnp.float32) / 255
    named = {"shift" if n == "shift_pixels" else n: limit for n, limit in limits.items()}
    np.testing.assert_allclose(batch.images, warp(KEY, pixels, **named), atol=1e-6)
    assert np.abs(batch.images - pixels).max() > 0.01
    np.testing.assert_array_equal(batch.targets, batch.images)


def make_output(rng, *, decoder: bool) -> tuple[Output, Batch]:
    """Draws an output of three examples and the batch that it answers."""
    scores, x, drawn = (rng.uniform(size=(3, *s)).astype("f") for s in ((J,), (4, 4, 2), (4, 4, 2)))
    output = Output(jnp.asarray(scores), jnp.zeros((3, J, 2)), drawn if decoder else None)
    return output, Batch(np.zeros_like(x), LABELS[:3], x)


SCORE_LOSSES = {
    "margin": lambda scores, present: reference.margin_loss(scores, present, 0.9, 0.1, 0.5),
    "spread": lambda scores, present: reference.spread_loss(scores, present, 0.2),
    "cross_entropy": reference.cross_entropy,
}


@pytest.mark.parametrize("name", SCORE_LOSSES)
def test_the_losses_are_that_of_the_scores_and_reconstruction_and_their_weighted_sum(rng, name):
    output, batch = make_output(rng, decoder=True)
    losses = Classification(0.392, loss=name).losses(output, batch, jnp.int32(0))
    of_scores = SCORE_LOSSES[name](output.scores, np.eye(J)[batch.labels])
    drawn = reference.reconstruction_loss(output.reconstruction, batch.targets)
    expected = {"loss": of_scores + 0.392 * drawn, name: of_scores, "reconstruction": drawn}
    assert list(losses) == ["loss", name, "reconstruction"]
    chex.assert_trees_all_close(losses, expected, rtol=1e-5)
    chex.assert_type(list(losses.values()), np.float32)


@pytest.mark.parametrize("name", SCORE_LOSSES)
def test_without_a_decoder_the_loss_is_that_of_the_scores(rng, name):
    output, batch = make_output(rng, decoder=False)
    losses = Classification(0.392, loss=name).losses(output, batch, jnp.int32(0))
    expected = SCORE_LOSSES[name](output.scores, np.eye(J)[batch.labels])
    assert list(losses) == ["loss", name]
    chex.assert_trees_all_close(losses, {"loss": expected, name: expected}, rtol=1e-5)


def test_the_margin_of_the_spread_loss_rises_linearly_and_compiles_once(rng):
    output, batch = make_output(rng, decoder=False)
    task = Classification(0.392, loss="spread", margin_steps=14)
    losses = jax.jit(chex.assert_max_traces(task.losses, n=1))
    for step, margin in [(0, 0.2), (1, 0.25), (7, 0.55), (14, 0.9), (15, 0.9), (10**6, 0.9)]:
        expected = reference.spread_loss(output.scores, np.eye(J)[batch.labels], margin)
        spread = losses(output, batch, jnp.int32(step))["spread"]
        np.testing.assert_allclose(spread, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "hinge"}, "loss is one of .*'spread', 'cross_entropy'.*, got 'hinge'"),
        ({"margin_steps": 0}, "margin_steps is 1 or more, got 0"),
        ({"lam_recon": math.nan}, "lam_recon is a number of 0 or more, got nan"),
        ({"rotation": -1}, "rotation is a number of 0 or more, got -1"),
    ],
)
def test_a_classification_refuses_what_makes_no_loss(changes, message):
    with pytest.raises(ValueError, match=message):
        Classification(**{"lam_recon": 0.5, **changes})


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (tiny.make_capsnet, ("loss", "margin", "reconstruction")),
        (tiny.make_normalised, ("loss", "margin")),
    ],
)
def test_the_names_of_the_losses_follow_from_the_network(model, names):
    model = model()
    assert train.loss_names(model, tiny.TASK) == names
    _, state = train.create(model, tiny.OPTIMIZER, tiny.TASK)
    assert tuple(state.sums.losses) == names


class MeanLoss(Classification):
    def losses(self, output, batch, step):
        return jax.tree.map(jnp.mean, super().losses(output, batch, step))


class NoTotal(Classification):
    def losses(self, output, batch, step):
        return {"margin": super().losses(output, batch, step)["margin"]}


@pytest.mark.parametrize("kind", [MeanLoss, NoTotal])
def test_losses_that_are_not_one_number_an_example_or_lack_a_total_are_refused(kind):
    with pytest.raises(ValueError, match=rf'{kind.__name__}\.losses: .*the total under "loss"'):
        train.create(tiny.make_capsnet(), tiny.OPTIMIZER, kind(0.5))


def is_right(scores, present) -> bool:
    """Whether the k > 0 highest scores, of equal ones the first, are those of the k classes."""
    if not any(present):
        return False
    ranking = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    return set(ranking[: sum(present)]) == {j for j, there in enumerate(present) if there}


def correct(scores, labels) -> np.ndarray:
    output = Output(jnp.asarray(scores), jnp.zeros((*scores.shape, 2)), None)
    zeros = jnp.zeros((len(scores), 2, 2, 1))
    batch = Batch(zeros, jnp.asarray(labels), zeros)
    return np.asarray(Classification(0.5).correct(output, batch))


def draw_scores(examples: int):
    """Scores of which some are equal."""
    return hnp.arrays(np.float32, (examples, J), elements=st.integers(0, 7).map(lambda n: n / 8))


@given(draw_scores(6), hnp.arrays(np.int32, (6, J), elements=st.integers(0, 1)))
@settings(max_examples=200)
def test_an_answer_is_right_if_all_classes_of_the_label_have_the_highest_scores(scores, present):
    expected = [is_right(*example) for example in zip(scores, present, strict=True)]
    assert correct(scores, present).tolist() == expected


@given(draw_scores(6), hnp.arrays(np.int32, 6, elements=st.integers(0, J - 1)))
@settings(max_examples=100)
def test_class_numbers_and_one_hot_labels_are_right_alike(scores, numbers):
    one_hot = np.eye(J, dtype=np.int32)[numbers]
    expected = [is_right(*example) for example in zip(scores, one_hot, strict=True)]
    assert correct(scores, numbers).tolist() == expected
    assert correct(scores, one_hot).tolist() == expected


def test_a_pair_is_right_only_if_both_its_classes_have_the_two_highest_scores():
    scores = np.array([[0.9, 0.1, 0.8, 0.2, 0.3]] * 4, np.float32)
    pairs = np.eye(J, dtype=np.int32)[[[0, 2], [0, 4], [1, 2], [3, 4]]].sum(1)
    assert correct(scores, pairs).tolist() == [True, False, False, False]


@functools.cache
def compile_steps(task):
    """Compiles the steps of the tiny CapsNet for a task, and makes its first state."""
    graphdef, state = train.create(tiny.make_capsnet(), tiny.OPTIMIZER, task)
    setup = train.Setup(graphdef, tiny.OPTIMIZER, task)
    return *train.jit_steps(setup, MESH), jax.device_get(state)


def run(task, labels, *, steps, **changes):
    """Trains `steps` steps: the diagnostics, and the last state."""
    step, _, start = compile_steps(task)
    state = jax.device_put(start._replace(**changes), sharding.replicated(MESH))
    data = tiny.place_data(MESH, IMAGES, labels)
    diagnostics = []
    for batch in tiny.draw_batches(steps):
        state, last = step(state, KEY, *data, batch[None])
        diagnostics.append(jax.device_get(last))
    return diagnostics, state


def evaluate(task, state, labels):
    """Evaluates the first eleven images: the sums, and the predicted classes."""
    data = tiny.place_data(MESH, IMAGES, labels)
    indices = np.arange(tiny.BATCH, dtype=np.int32)
    sums, predicted = compile_steps(task)[1](state, *data, indices, indices < 11)
    return jax.device_get(sums), predicted[:11]


@dataclasses.dataclass(frozen=True)
class Annealed(Classification):
    """A classification whose loss grows with the step."""

    def losses(self, output, batch, step):
        losses = super().losses(output, batch, step)
        return {**losses, "loss": (1 + step) * losses["loss"], "step": 0 * losses["loss"] + step}


@pytest.mark.slow
def test_a_loss_may_depend_on_the_number_of_the_step():
    diagnostics, state = run(Annealed(0.5), LABELS, steps=3)
    for number, each in enumerate(diagnostics):
        losses = each.sums.losses
        assert losses["step"] == number * tiny.BATCH
        total = losses["margin"] + 0.5 * losses["reconstruction"]
        np.testing.assert_allclose(losses["loss"], (1 + number) * total, rtol=1e-5)
    assert state.sums.losses["step"] == (0 + 1 + 2) * tiny.BATCH
    sums, _ = evaluate(Annealed(0.5), state, LABELS)
    assert sums.losses["step"] == 3 * 11  # an evaluation after three steps


def test_the_gradient_is_that_of_the_loss_at_its_step():
    (plain,), _ = run(Classification(0.5), LABELS, steps=1)
    for number in (0, 6):
        (annealed,), _ = run(Annealed(0.5), LABELS, steps=1, step=np.int32(number))
        expected = (1 + number) * plain.gradient_norms
        np.testing.assert_allclose(annealed.gradient_norms, expected, rtol=1e-4)


@dataclasses.dataclass(frozen=True)
class Pairs(Classification):
    """Overlays each image with the next one: two classes, and the first image as the target."""

    def train_batch(self, key, images, labels, indices):
        return self.test_batch(images, labels, indices)

    def test_batch(self, images, labels, indices):
        others = (indices + 1) % len(images)
        first, second = images[indices] / 255, images[others] / 255
        labels = jax.nn.one_hot(labels[indices], J) + jax.nn.one_hot(labels[others], J)
        return Batch(jnp.maximum(first, second), labels, first)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "labels"), [(Classification(0.5), K_HOT), (Pairs(0.5), LABELS)], ids=["data", "task"]
)
def test_a_task_with_k_hot_labels_trains(task, labels):
    diagnostics, state = run(task, labels, steps=2)
    batch = task.test_batch(*map(jnp.asarray, (IMAGES, labels)), tiny.draw_batches(1)[0])
    assert_two_classes_each(batch.labels)
    graphdef, arrays = nnx.split(tiny.make_capsnet())
    draw_both = jax.jit(lambda arrays, *args: nnx.merge(graphdef, arrays)(*args))
    output = draw_both(arrays, batch.images, batch.labels)
    losses = task.losses(output, batch, jnp.int32(0))
    chex.assert_trees_all_close(
        diagnostics[0].sums.losses, jax.tree.map(jnp.sum, losses), rtol=1e-5
    )
    right = [is_right(*each) for each in zip(output.scores, integers(batch.labels), strict=True)]
    assert diagnostics[0].sums.correct == sum(right)
    assert state.step == 2
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), state.params, compile_steps(task)[2].params
    )
    assert min(jax.tree.leaves(moved)) > 0.01  # every array, by about two learning rates


def integers(labels) -> np.ndarray:
    return np.asarray(labels, np.int32)


def assert_two_classes_each(labels):
    np.testing.assert_array_equal(integers(labels).sum(-1), 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "labels"), [(Classification(0.5), K_HOT), (Pairs(0.5), LABELS)], ids=["data", "task"]
)
def test_evaluation_with_k_hot_labels_counts_the_pairs_that_are_right(task, labels):
    _, state = run(task, labels, steps=40)
    sums, predicted = evaluate(task, state, labels)
    batch = task.test_batch(*map(jnp.asarray, (IMAGES, labels)), np.arange(11))
    prediction = capsjax.predict(train.merge(tiny.SETUP.graphdef, state), batch.images)
    pairs = zip(prediction.scores, integers(batch.labels), strict=True)
    assert sums.correct == sum(is_right(*each) for each in pairs) > 0
    np.testing.assert_array_equal(predicted, prediction.predicted)
    assert sums.examples == 11


@dataclasses.dataclass(frozen=True)
class Padded(Classification):
    """A classification of padded images."""

    def test_batch(self, images, labels, indices):
        batch = super().test_batch(images, labels, indices)
        wide = jnp.pad(batch.images, ((0, 0), (2, 2), (1, 1), (0, 0)))
        return batch._replace(images=wide, targets=wide)


def test_the_shape_of_the_images_follows_from_the_task_and_makes_none():
    images = np.broadcast_to(np.uint8(0), (2**30, 6, 7, 3))
    labels = np.broadcast_to(np.int32(0), 2**30)
    assert batch_shape(Classification(0.5), images, labels) == (6, 7, 3)
    assert batch_shape(Padded(0.5), images, labels) == (10, 9, 3)


@dataclasses.dataclass(frozen=True)
class Twofold(Pairs):
    """Two images to reconstruct, [B, 2, H, W, C], and losses that read columns of the labels."""

    def test_batch(self, images, labels, indices):
        batch = super().test_batch(images, labels, indices)
        return batch._replace(targets=jnp.stack([batch.targets] * 2, 1))

    def losses(self, output, batch, step):
        first = capsjax.reconstruction_loss(output.reconstruction, batch.targets[:, 0])
        return {"loss": first + batch.labels[:, 0], "first": first}


def test_a_task_with_targets_of_its_own_shape_starts_from_an_example_of_its_batches():
    task, data = Twofold(0.5), (jnp.asarray(IMAGES), jnp.asarray(LABELS))
    example = example_batch(task, *data)
    batch = task.test_batch(*data, np.arange(1))
    chex.assert_trees_all_equal_shapes_and_dtypes(example, batch)
    model = tiny.make_capsnet()
    with pytest.raises(ValueError, match="expected two arrays of one shape"):
        train.create(model, tiny.OPTIMIZER, task)
    _, state = train.create(model, tiny.OPTIMIZER, task, example=example)
    assert set(state.sums.losses) == {"loss", "first"}
