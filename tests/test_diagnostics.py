"""Diagnostics: what they say of arrays whose answer is known, and of networks."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import capsjax
import reference
from capsjax import diagnostics
from capsjax.diagnostics import _diagnosis
from tiny import IMAGE, NUM_CLASSES, draw_arrays, make_capsnet, make_images, make_normalised
from tiny import N as N_IMAGES

N, J, INPUTS = 12, 4, 5
# Of equal sizes, since each is compiled.
COUPLINGS = arrays.arrays(np.float32, (N, J, INPUTS), elements=st.floats(0, 1, width=32))
STATISTICS = ("coupling_entropy", "bonding", "dynamics")


def as_shares(couplings):
    """Scales couplings to shares over j; where all are 0, they are equal."""
    c = np.float64(couplings) + 1e-3
    return np.float32(c / c.sum(-2, keepdims=True))


def entropy_by_loops(couplings):
    entropies = np.zeros((len(couplings), INPUTS))
    for n, i in np.ndindex(entropies.shape):
        for c in couplings[n, :, i].astype(np.float64):
            entropies[n, i] -= c * math.log(c) / math.log(J)
    return entropies


def bonding_by_loops(couplings):
    largest = [max(couplings[n, :, i]) for n, i in np.ndindex(len(couplings), INPUTS)]
    of_active = [c for c in largest if c > 1.5 / J]
    return sum(of_active) / len(of_active) if of_active else 0.0


def dynamics_by_loops(couplings):
    """Weighs the dynamics of each input capsule with the number of examples that bind it."""
    weighted, total = 0.0, 0
    for i in range(INPUTS):
        bound = [c for c in couplings[:, :, i].astype(np.float64) if max(c) > 1.5 / J]
        if bound:
            kept = np.array([[value if value > 1.5 / J else 0.0 for value in c] for c in bound])
            deviations = [np.std(kept[:, j]) for j in range(J)]
            weighted += len(bound) * np.mean(deviations) / kept.max()
            total += len(bound)
    return weighted / total / math.sqrt(1 / J * (1 - 1 / J)) if total else 0.0


@jax.jit
def compute_statistics(couplings):
    return [getattr(diagnostics, name)(couplings) for name in STATISTICS]


@given(COUPLINGS)
def test_entropy_bonding_and_dynamics_are_what_loops_find(drawn):
    # Far from equal, since rounding decides what is above 1.5 / J.
    c = as_shares(np.square(drawn))
    c = np.where(np.abs(c - 1.5 / J) < 1e-5, np.float32(1.5 / J - 1e-4), c)
    entropy, bonding, dynamics = compute_statistics(c)
    np.testing.assert_allclose(entropy, entropy_by_loops(c), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bonding, bonding_by_loops(c), rtol=1e-5)
    np.testing.assert_allclose(dynamics, dynamics_by_loops(c), rtol=1e-4, atol=1e-6)


def test_equal_couplings_have_entropy_one_and_neither_bonding_nor_dynamics():
    c = jnp.full((N, J, INPUTS), 1 / J)
    assert not diagnostics.active(c).any()
    np.testing.assert_allclose(diagnostics.coupling_entropy(c), np.ones((N, INPUTS)), rtol=1e-6)
    assert float(diagnostics.bonding(c)) == 0
    assert float(diagnostics.dynamics(c)) == 0


def test_couplings_of_one_output_alone_that_never_change_are_bound_and_static():
    c = jnp.zeros((N, J, INPUTS)).at[:, 2].set(1)
    np.testing.assert_array_equal(diagnostics.coupling_entropy(c), np.zeros((N, INPUTS)))
    assert float(diagnostics.bonding(c)) == 1
    assert float(diagnostics.dynamics(c)) == 0


def test_couplings_that_turn_to_each_output_equally_often_have_dynamics_one():
    turns = (np.arange(N)[:, None] + np.arange(INPUTS)) % J  # each input begins with another output
    c = np.moveaxis(np.eye(J)[turns], -1, 1)
    np.testing.assert_allclose(diagnostics.dynamics(c), 1, rtol=1e-6)
    assert float(diagnostics.bonding(c)) == 1


def test_an_input_that_is_never_bound_does_not_count_in_bonding_and_dynamics():
    turns = np.moveaxis(np.eye(J)[(np.arange(N)[:, None] + np.arange(INPUTS)) % J], -1, 1)
    c = np.concatenate([turns, np.full((N, J, 3), 1 / J)], -1)
    for function in (diagnostics.bonding, diagnostics.dynamics):
        np.testing.assert_allclose(function(c), function(turns), rtol=1e-6)


def test_what_leaks_to_no_output_does_not_change_the_entropy(rng):
    c = as_shares(rng.uniform(size=(N, J, INPUTS)))
    expected = diagnostics.coupling_entropy(c)
    np.testing.assert_allclose(diagnostics.coupling_entropy(0.3 * c), expected, rtol=1e-5)


def test_statistics_work_under_jit_on_any_axes_and_are_float32(rng, dtype):
    c = jnp.asarray(as_shares(rng.uniform(size=(3, 2, J, INPUTS)) ** 4), dtype)
    entropy, *scalars = compute_statistics(c)
    assert {x.dtype for x in (entropy, *scalars)} == {jnp.dtype("float32")}
    flat = c.astype(jnp.float32)
    np.testing.assert_allclose(entropy, diagnostics.coupling_entropy(flat), rtol=1e-6)
    np.testing.assert_allclose(
        scalars[0], bonding_by_loops(np.asarray(flat).reshape(6, J, INPUTS)), rtol=1e-5
    )
    side_by_side = flat.swapaxes(1, 2).reshape(3, J, 2 * INPUTS)  # the axis is one more of inputs
    np.testing.assert_allclose(scalars[1], diagnostics.dynamics(side_by_side), rtol=1e-5)


@pytest.mark.parametrize("name", [*STATISTICS, "active"])
@pytest.mark.parametrize("shape", [(J,), (N, 1, INPUTS)])
def test_what_is_no_coupling_is_refused_in_words(name, shape):
    with pytest.raises(ValueError, match=rf"{name}: expected couplings \[\.\.\., j, i\] of 2"):
        getattr(diagnostics, name)(jnp.zeros(shape))


@pytest.mark.parametrize("shape", [(J, INPUTS), (0, J, INPUTS)])
def test_dynamics_need_examples(shape):
    with pytest.raises(ValueError, match=r"dynamics: expected couplings \[N, \.\.\., j, i\], N"):
        diagnostics.dynamics(jnp.zeros(shape))


def test_dead_is_who_is_short_in_every_example():
    lengths = np.zeros((200, 5))
    lengths[:, 1] = 0.009  # always short
    lengths[:, 2] = 0.011  # always a little longer
    lengths[0, 3] = 1.0  # awake once, which the mean of 0.005 hides
    lengths[::2, 4] = 0.5
    expected = [True, True, False, False, False]
    assert diagnostics.dead(lengths).tolist() == expected
    assert jax.jit(diagnostics.dead)(lengths.reshape(200, 1, 5)).tolist() == [expected]
    assert diagnostics.dead(lengths, threshold=0.05).tolist()[:3] == [True] * 3


@pytest.mark.parametrize("shape", [(), (0, 3)])
def test_dead_needs_examples(shape):
    with pytest.raises(ValueError, match=r"dead: expected activations \[N, \.\.\.\], N ≥ 1, got"):
        diagnostics.dead(jnp.zeros(shape))


@pytest.mark.parametrize("k_hot", [False, True])
def test_a_histogram_counts_each_score_once_by_class_and_presence(rng, k_hot):
    scores = rng.uniform(-0.2, 1.2, (30, J)).astype(np.float32)
    labels = rng.integers(0, J, 30)
    shown = rng.uniform(size=(30, J)) < 0.5 if k_hot else np.eye(J, dtype=bool)[labels]
    found = diagnostics.score_histogram(scores, shown if k_hot else labels, bins=7)
    edges = np.linspace(0, 1, 8)
    for counts, chosen in ((found.present, shown), (found.absent, ~shown)):
        for j in range(J):
            inside = np.clip(scores[chosen[:, j], j], 0, 1)
            assert np.asarray(counts)[j].tolist() == np.histogram(inside, edges)[0].tolist()


@pytest.mark.parametrize(("scores", "labels", "bins"), [((), (), 5), ((3, J), (3,), 0)])
def test_a_histogram_without_classes_or_bins_is_refused(scores, labels, bins):
    with pytest.raises(ValueError, match=r"score_histogram: expected scores \[\.\.\., j\] and 1"):
        diagnostics.score_histogram(np.zeros(scores), np.zeros(labels, int), bins=bins)


@dataclasses.dataclass(frozen=True)
class Untold:
    """A routing that does not tell its couplings."""

    name = "untold"

    def initial_bias(self, j, i, d):
        return None

    def __call__(self, u, weight, bias=None):
        return capsjax.uniform_routing(capsjax.DenseVotes(u, weight))


ROUTINGS = [
    capsjax.Agreement(3, bias=True),
    capsjax.Agreement(2, leak=True),
    capsjax.Uniform(),
    capsjax.Random(seed=1),
    capsjax.SelfAttention(),
]


@pytest.mark.parametrize("routing", ROUTINGS, ids=lambda routing: routing.name)
def test_the_couplings_that_a_routing_tells_are_those_of_its_output(routing, rng):
    u = rng.normal(size=(3, INPUTS, 2)).astype(np.float32)
    weight = rng.normal(size=(J, INPUTS, 6, 2)).astype(np.float32)
    bias = routing.initial_bias(J, INPUTS, 6)
    if bias is not None:
        bias = rng.normal(size=bias.shape).astype(np.float32)
    couplings = np.asarray(routing.couplings(u, weight, bias))
    assert couplings.shape == (3, J, INPUTS)
    u_hat = np.asarray(capsjax.predictions(u, weight))
    if routing.name == "self_attention":
        expected = reference.squash_exp(reference.sum_of_votes(u_hat, couplings + bias))
    else:
        added = 0 if bias is None else bias
        expected = reference.squash(reference.sum_of_votes(u_hat, couplings) + added)
    np.testing.assert_allclose(routing(u, weight, bias), expected, rtol=1e-4, atol=1e-5)


def test_observing_a_network_shows_the_state_of_procedure_1_after_each_iteration():
    net, (x, _) = make_capsnet(), make_images()
    output, layers = diagnostics.observe(net, x)
    (name,) = layers
    inputs, outputs, couplings = layers[name]
    assert name == "class_caps"
    u = jax.jit(lambda x: net.primary(jax.nn.relu(net.conv1(x))))(np.float32(x / 255))
    np.testing.assert_allclose(inputs, u, rtol=1e-4, atol=1e-6)
    u_hat = np.asarray(capsjax.predictions(inputs, net.class_caps.weight[...]))
    for number in (1, 2, 3):
        _, c, v = reference.routing_state(u_hat, number)
        np.testing.assert_allclose(couplings[number - 1], c, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(outputs[number - 1], v, rtol=1e-4, atol=1e-6)
    assert len(couplings) == len(outputs) == 3
    np.testing.assert_array_equal(output.capsules, outputs[-1])
    np.testing.assert_allclose(output.scores, capsjax.predict(net, x).scores, rtol=1e-5)


def test_observing_leaves_the_network_as_it_is():
    net, (x, _) = make_capsnet(), make_images()
    before = nnx.graphdef(net)
    diagnostics.observe(net, x)
    assert nnx.graphdef(net) == before


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"expected images \[\.\.\., 8, 8, 1\]"):
        diagnostics.observe(make_capsnet(), np.zeros((2, 9, 9, 1)))


class Stack(capsjax.Network):
    """Two capsule layers, one on the other, of the pixels as they are."""

    def __init__(self, config, image_shape, num_classes, rngs):
        super().__init__(config, image_shape, num_classes)
        pixels = math.prod(image_shape)
        layer = capsjax.nn.DenseCaps
        self.lower = layer(pixels // 4, 4, 6, 4, rngs=rngs)
        self.heads = nnx.List([layer(6, 4, num_classes, 3, 2, rngs=rngs)])

    def __call__(self, images, labels=None):
        v = self.heads[0](self.lower(images.reshape(*images.shape[:-3], -1, 4)))
        return capsjax.Output(capsjax.length(v), v, None)


def make_stack():
    return draw_arrays(lambda: Stack(None, IMAGE, NUM_CLASSES, nnx.Rngs(0)), scale=1)


def test_a_diagnosis_finds_the_dead_capsules_of_a_stack():
    net, (x, y) = make_stack(), make_images()
    net.lower.weight[...] = net.lower.weight[...].at[4].set(0)
    found = diagnostics.diagnose(net, x, y)
    assert list(found.layers) == ["primary", "lower", "heads.0"]
    assert found.layers["lower"].dead.tolist() == [False, False, False, False, True, False]
    assert found.layers["lower"].mean[4] == 0
    assert not found.layers["primary"].dead.any()
    assert len(found.couplings) == 2  # of the last layer


def measure(couplings):
    """Measures couplings by the functions of arrays, in the order of the fields."""
    numbers = (
        diagnostics.coupling_entropy(couplings).mean(),
        diagnostics.active(couplings).any(-2).mean(),
        diagnostics.bonding(couplings),
        diagnostics.dynamics(couplings),
    )
    return tuple(map(float, numbers))


@pytest.mark.parametrize("batch_size", [N_IMAGES, N_IMAGES // 2])
def test_a_diagnosis_is_made_of_the_functions_whatever_the_size_of_its_pieces(batch_size):
    net, (x, y) = make_stack(), make_images()
    found = diagnostics.diagnose(net, x, y, batch_size=batch_size)
    assert found.images == len(x)
    _, outputs, couplings = diagnostics.observe(net, x).layers["heads.0"]
    for scores, statistics, v, c in zip(
        found.scores, found.couplings, outputs, couplings, strict=True
    ):
        lengths = np.asarray(capsjax.length(v))
        assert scores.error == pytest.approx(np.mean(lengths.argmax(-1) != y))
        expected = diagnostics.score_histogram(lengths, y)
        np.testing.assert_array_equal(scores.histogram.present, expected.present)
        np.testing.assert_array_equal(scores.histogram.absent, expected.absent)
        assert statistics == pytest.approx(measure(c), rel=1e-5)
    assert found.couplings[-1].active > 0.1  # or the other numbers would be 0


def test_a_network_in_bfloat16_is_measured_in_float32():
    net, (x, y) = make_stack(), make_images()
    found = diagnostics.diagnose(net, jnp.asarray(x / 255, jnp.bfloat16), y)
    lengths = capsjax.length(diagnostics.observe(net, x).layers["lower"].inputs)
    assert found.layers["primary"].mean.dtype == np.float32
    np.testing.assert_allclose(found.layers["primary"].mean, lengths.mean(0), rtol=1e-2)


@pytest.mark.parametrize("kept", [N_IMAGES // 2 + 3, 1])
def test_of_more_couplings_than_memory_shall_hold_those_of_the_first_images_count(
    kept, monkeypatch
):
    net, (x, y) = make_stack(), make_images()
    an_image = 2 * NUM_CLASSES * 6
    monkeypatch.setattr(_diagnosis, "_MOST_COUPLINGS", kept * an_image if kept > 1 else 0)
    found = diagnostics.diagnose(net, x, y, batch_size=N_IMAGES // 2)
    _, _, couplings = diagnostics.observe(net, x).layers["heads.0"]
    for statistics, c in zip(found.couplings, couplings, strict=True):
        assert statistics == pytest.approx(measure(c[:kept]), rel=1e-5)


@pytest.mark.parametrize(
    ("routing", "told"), [(capsjax.Uniform(), 1), (capsjax.SelfAttention(), 1), (Untold(), 0)]
)
def test_a_routing_without_iterations_is_measured_once_if_it_tells_its_couplings(routing, told):
    found = diagnostics.diagnose(make_capsnet(routing=routing), *make_images())
    assert (len(found.scores), len(found.couplings)) == (1, told)


class Pixels(capsjax.Network):
    """Scores the classes by a few pixels: no capsule layer."""

    def __call__(self, images, labels=None):
        capsules = images[..., : self.num_classes, :4, 0]
        return capsjax.Output(capsjax.length(capsules), self.config and capsules, None)


@pytest.mark.parametrize("capsules", [True, False])
def test_without_a_capsule_layer_only_the_scores_of_capsules_are_measured(capsules):
    found = diagnostics.diagnose(Pixels(capsules or None, IMAGE, NUM_CLASSES), *make_images())
    assert (len(found.scores), found.couplings, found.layers) == (int(capsules), (), {})


def test_scores_that_are_no_lengths_are_those_of_the_network():
    class Doubled(type(make_normalised())):
        def __call__(self, images, labels=None):
            output = super().__call__(images)
            return output._replace(scores=output.scores / 2)

    net = draw_arrays(
        lambda: Doubled(make_normalised().config, IMAGE, NUM_CLASSES, rngs=nnx.Rngs(0))
    )
    x, y = make_images()
    found = diagnostics.diagnose(net, x, y)
    expected = diagnostics.score_histogram(capsjax.predict(net, x).scores, y)
    (scores,) = found.scores
    np.testing.assert_array_equal(scores.histogram.present, expected.present)
    assert len(found.couplings) == 3


@pytest.mark.parametrize(
    ("images", "labels"), [((3, 8, 8), 3), ((0, 8, 8, 1), 0), ((3, 8, 8, 1), 2)]
)
def test_a_diagnosis_of_no_images_or_other_labels_is_refused(images, labels):
    with pytest.raises(ValueError, match=r"diagnose: expected images \[N, H, W, C\] and labels"):
        diagnostics.diagnose(make_capsnet(), np.zeros(images), np.zeros(labels, int))
