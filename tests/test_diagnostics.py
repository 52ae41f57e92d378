"""Diagnostics of arrays: what loops find, and what is known of extremes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from capsjax import diagnostics

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
