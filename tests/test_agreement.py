"""Routing by agreement: procedure 1, its gradients, and what it refuses."""

from functools import partial
from itertools import pairwise

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_shape
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

import capsjax
import reference

J, N, D = 3, 5, 4  # output and input capsules, and the dimension of the output

# Compiled once for each number of iterations.
routing = jax.jit(capsjax.routing, static_argnames=("routings", "stop_gradient"))
routing_state = jax.jit(capsjax.routing_state, static_argnames=("routings", "leak"))


def float64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


@pytest.fixture
def u_hat(rng):
    """Predictions of a batch of two, large enough for couplings to differ."""
    return jnp.asarray(2 * rng.normal(size=(2, J, N, D)), jnp.float32)


@pytest.fixture
def bias(rng):
    return jnp.asarray(rng.normal(size=(J, D)), jnp.float32)


def test_routing_state_with_a_bias_equals_the_paper(rng, lead, dtype, call):
    u_hat = jnp.asarray(rng.normal(size=(*lead, J, N, D)), dtype)
    bias = jnp.asarray(rng.normal(size=(J, D)), dtype)
    state = call(lambda u_hat: capsjax.routing_state(u_hat, 2, bias=bias), u_hat)
    expected = reference.routing_state(float64(u_hat), 2, float64(bias))
    chex.assert_shape([state.logits, state.couplings], (*lead, J, N))
    assert_shape(state.capsules, (*lead, J, D))
    assert state.logits.dtype == state.couplings.dtype == jnp.float32
    assert state.capsules.dtype == dtype
    for result, paper in zip(state[:2], expected[:2], strict=True):  # float32 inside, always
        np.testing.assert_allclose(result, paper, rtol=2e-5, atol=2e-6)
    tolerance = {"float32": 2e-5, "bfloat16": 2**-8}[dtype.__name__]
    np.testing.assert_allclose(float64(state.capsules), expected[2], rtol=tolerance, atol=2e-6)


def test_routing_gives_the_capsules_of_routing_state(u_hat, bias):
    v = routing(u_hat, routings=2, bias=bias)
    chex.assert_trees_all_equal(v, routing_state(u_hat, routings=2, bias=bias).capsules)


@pytest.mark.slow
@given(
    hnp.arrays(
        np.float32,
        st.sampled_from([(1, 1, 1), (3, 2, 4), (2, 5, 1)]),
        elements=st.floats(-8, 8, width=32),
    ),
    st.integers(1, 3),
    st.booleans(),
)
@settings(max_examples=150)
def test_routing_equals_the_paper_at_any_value(u_hat, routings, leak):
    state = routing_state(u_hat, routings=routings, leak=leak)
    _, couplings, capsules = reference.routing_state(float64(u_hat), routings, leak=leak)
    # Logits of tens turn a float32 rounding of theirs into one of the couplings.
    np.testing.assert_allclose(state.couplings, couplings, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(state.capsules, capsules, rtol=1e-3, atol=1e-5)


@given(
    hnp.arrays(np.float32, (2, 3, 4, 2), elements=st.floats(-(2**20), 2**20, width=32)),
    st.integers(1, 3),
)
@settings(max_examples=150)
def test_each_input_capsule_shares_itself_out_whole(u_hat, routings):
    couplings = routing_state(u_hat, routings=routings).couplings
    assert (couplings >= 0).all()
    np.testing.assert_allclose(couplings.sum(-2), 1, rtol=1e-6)


@given(hnp.arrays(np.float32, (2, 3, 4, 2), elements=st.floats(-(2**20), 2**20, width=32)))
@settings(max_examples=60)
def test_what_leaks_is_the_share_of_a_logit_of_zero(u_hat):
    logits, couplings, _ = routing_state(u_hat, routings=2, leak=True)
    highest = np.maximum(float64(logits).max(-2), 0)
    left = np.exp(-highest) / (
        np.exp(float64(logits) - highest[..., None, :]).sum(-2) + np.exp(-highest)
    )
    np.testing.assert_allclose(1 - float64(couplings).sum(-2), left, atol=1e-5)


@given(hnp.arrays(np.float32, (3, 3, 4, 2), elements=st.floats(-8, 8, width=32)))
@settings(max_examples=60)
def test_an_example_is_routed_as_if_it_were_alone(u_hat):
    v = routing(u_hat, routings=3)
    for row in range(len(u_hat)):
        alone = routing(u_hat[row : row + 1], routings=3)
        np.testing.assert_allclose(alone[0], v[row], rtol=1e-4, atol=1e-6)


def test_one_iteration_couples_uniformly(u_hat):
    state = routing_state(u_hat, routings=1)
    np.testing.assert_allclose(state.couplings, np.full((2, J, N), 1 / J), rtol=1e-6)
    assert not state.logits.any()
    np.testing.assert_allclose(
        state.capsules, reference.squash(float64(u_hat).mean(-2) * N / J), rtol=1e-5
    )


def test_three_iterations_are_the_default(u_hat):
    chex.assert_trees_all_equal(routing_state(u_hat), routing_state(u_hat, routings=3))
    chex.assert_trees_all_equal(routing(u_hat), routing(u_hat, routings=3))


def test_every_iteration_changes_the_result(u_hat):
    results = [float64(routing(u_hat, routings=routings)) for routings in (1, 2, 3, 4)]
    for before, after in pairwise(results):
        assert np.abs(after - before).max() > 1e-3


def test_inputs_go_where_they_agree():
    u_hat = np.zeros((2, 3, 2), np.float32)
    u_hat[0] = [[1, 0], [1, 0], [1, 0]]  # all three predict the same of the first capsule
    u_hat[1] = [[1, 0], [-1, 0], [0, 1]]
    state = routing_state(u_hat, routings=3)
    assert (state.couplings[0] > 0.6).all()
    assert capsjax.length(state.capsules)[0] > capsjax.length(state.capsules)[1]


def test_the_bias_is_added_in_every_iteration(rng, u_hat, bias):
    two = routing_state(u_hat, routings=2, bias=bias)
    first = reference.squash(float64(u_hat).sum(-2) / J + float64(bias))
    logits = np.einsum("bjid,bjd->bji", float64(u_hat), first)
    np.testing.assert_allclose(two.logits, logits, rtol=1e-5, atol=1e-5)
    s = np.einsum("bji,bjid->bjd", float64(two.couplings), float64(u_hat)) + float64(bias)
    np.testing.assert_allclose(two.capsules, reference.squash(s), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("routings", [1, 3])
def test_the_gradient_is_that_at_frozen_couplings(routings, u_hat, bias):
    couplings = routing_state(u_hat, routings=routings, bias=bias).couplings

    def frozen(u_hat, bias):
        s = jnp.sum(couplings[..., None] * u_hat, -2)
        return jnp.sum(jnp.sin(capsjax.squash(s + jnp.broadcast_to(bias, s.shape))))

    def routed(u_hat, bias):
        return jnp.sum(jnp.sin(capsjax.routing(u_hat, routings, bias=bias)))

    expected = jax.jit(jax.grad(frozen, (0, 1)))(u_hat, bias)
    gradient = jax.jit(jax.grad(routed, (0, 1)))(u_hat, bias)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_through_every_iteration_equals_finite_differences(rng):
    with jax.enable_x64(True):
        u_hat = jnp.asarray(rng.normal(size=(J, N, D)))
        bias = jnp.asarray(rng.normal(size=(J, D)))

        @jax.jit
        def through(u_hat, bias):
            return capsjax.routing(u_hat, 2, bias=bias, stop_gradient=False)

        assert through(u_hat, bias).dtype == jnp.float64
        check_grads(through, (u_hat, bias), order=1, modes=("fwd", "rev"))


def test_stopping_the_gradient_changes_the_gradient_and_not_the_result(u_hat):
    def total(u_hat, routings, stop_gradient):
        v = capsjax.routing(u_hat, routings, stop_gradient=stop_gradient)
        return jnp.sum(v[..., 0])

    value_and_grad = jax.jit(jax.value_and_grad(total), static_argnums=(1, 2))
    for routings, same in ((1, True), (2, False)):
        stopped, gradient = value_and_grad(u_hat, routings, True)
        through, full_gradient = value_and_grad(u_hat, routings, False)
        np.testing.assert_allclose(stopped, through, rtol=1e-6)
        assert np.allclose(gradient, full_gradient, rtol=1e-3, atol=1e-5) == same


def test_a_loop_of_the_compiler_may_route(u_hat):
    _, v = jax.lax.scan(lambda carry, u_hat: (carry, capsjax.routing(u_hat, 2)), 0, u_hat)
    np.testing.assert_allclose(v, routing(u_hat, routings=2), rtol=1e-5, atol=1e-6)


def test_calls_of_one_shape_are_traced_once(u_hat):
    once = jax.jit(chex.assert_max_traces(capsjax.routing, n=1))
    for scale in (1, 2, 3):
        once(scale * u_hat)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("function", [capsjax.routing, capsjax.routing_state])
@pytest.mark.parametrize(
    ("u_hat", "options", "message"),
    [
        ((N, D), {}, r"votes \[\.\.\., j, i, d\], got \[5, 4\]"),
        ((J, N, D), {"bias": np.zeros(D)}, r"bias \[j, d\] = \[3, 4\], got \[4\]"),
        ((2, J, N, D), {"bias": np.zeros((2, J, D))}, r"\[3, 4\], got \[2, 3, 4\]"),
        ((J, N, D), {"routings": 0}, "int of 1 or more, got 0"),
        ((J, N, D), {"routings": -1}, "int of 1 or more, got -1"),
        ((J, N, D), {"routings": 3.0}, r"int of 1 or more, got 3\.0"),
        ((J, N, D), {"routings": True}, "int of 1 or more, got True"),
        ((J, N, D), {"routings": None}, "int of 1 or more, got None"),
    ],
)
def test_what_cannot_be_routed_is_an_error_in_words(function, u_hat, options, message, jit):
    call = partial(function, **options)
    with pytest.raises(ValueError, match=message):
        (jax.jit(call) if jit else call)(jnp.ones(u_hat))
