"""Routings of poses and activations: their papers' loops, what they recover, their memory."""

import itertools
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import capsjax
import reference_poses as reference

J, N, D, K = 3, 5, 4, 2  # output and input capsules, and their dimensions
FLOOR = 1e-4


def float64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def route_by_em(votes, activations, routings=3):
    beta = jnp.linspace(-0.5, 0.5, votes.shape[-3])
    options = {"routings": routings, "inverse_temperature": 0.05}
    return capsjax.em_routing(votes, activations, beta_u=beta, beta_a=2 * beta, **options)


def loop_em(votes, activations, routings=3):
    *_, j, i, _ = votes.shape
    beta = np.linspace(-0.5, 0.5, j)
    return reference.em_routing(
        votes, activations, beta, 2 * beta, routings, 0.05, FLOOR, 100 * j / i
    )


def route_by_self(votes, activations):
    return capsjax.self_routing(votes, activations, jnp.broadcast_to(LOGITS, votes.shape[:-1]))


def loop_self(votes, activations):
    return reference.self_routing(votes, activations, np.broadcast_to(LOGITS, votes.shape[:-1]))


LOGITS = np.sin(np.arange(J * N, dtype=np.float32)).reshape(J, N)
# Functions of votes and activations, and their loops.
FAMILY: dict[str, tuple[Any, Any]] = {
    "em": (route_by_em, loop_em),
    "variational": (
        capsjax.variational_routing,
        lambda votes, activations: reference.variational_routing(votes, activations, 3, 1, 1, 1),
    ),
    "self": (route_by_self, loop_self),
    "attention": (
        lambda votes, activations: (
            capsjax.attention_routing(
                votes, 3, scale=jnp.arange(1.0, D + 1), offset=jnp.ones(D) / 2
            ),
        ),
        lambda votes, activations: (
            reference.attention_routing(votes, np.arange(1.0, D + 1), np.ones(D) / 2, 3),
        ),
    ),
}


@pytest.fixture(params=FAMILY)
def name(request):
    return request.param


def draw(rng, *lead, dtype: Any = jnp.float32):
    """Draws votes and activations."""
    votes = jnp.asarray(rng.normal(size=(*lead, J, N, D)), dtype)
    return votes, jnp.asarray(rng.uniform(0.1, 1, size=(*lead, N)), dtype)


def test_a_routing_equals_its_paper(name, rng, lead, dtype, call):
    routing, loops = FAMILY[name]
    votes, activations = draw(rng, *lead, dtype=dtype)
    results = call(routing, votes, activations)
    expected = loops(float64(votes), float64(activations))
    assert len(results) == len(expected)
    for result, paper in zip(results, expected, strict=True):
        tolerance = 2e-4 if result.dtype == jnp.float32 else 2**-7
        np.testing.assert_allclose(float64(result), paper, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.slow
def test_votes_that_are_never_made_give_the_same_capsules_and_gradients(name, rng):
    routing, _ = FAMILY[name]
    u = jnp.asarray(rng.normal(size=(2, N, K)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(J, N, D, K)), jnp.float32)
    activations = jnp.asarray(rng.uniform(0.1, 1, size=(2, N)), jnp.float32)

    def total(u, weight, activations, make):
        results = routing(make(u, weight), activations)
        return sum(jnp.sum(jnp.sin(result)) for result in results), tuple(results)

    made, lazy = (
        jax.jit(jax.grad(partial(total, make=make), (0, 1, 2), has_aux=True))(
            u, weight, activations
        )
        for make in (capsjax.predictions, capsjax.DenseVotes)
    )
    chex.assert_trees_all_close(made, lazy, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_order_of_capsules_does_not_matter(rng):
    votes, activations = draw(rng, 2)
    i, j = rng.permutation(N), rng.permutation(J)
    routings = {
        "em": partial(capsjax.em_routing, beta_u=jnp.zeros(J), beta_a=jnp.zeros(J)),
        "variational": capsjax.variational_routing,
        "attention": lambda votes, activations: (capsjax.attention_routing(votes),),
    }
    for routing in routings.values():
        poses = routing(votes, activations)[0]
        mixed = routing(votes[:, :, i], activations[:, i])[0]
        np.testing.assert_allclose(mixed, poses, rtol=1e-3, atol=1e-5)
        mixed = routing(votes[:, j], activations)[0]
        np.testing.assert_allclose(mixed, poses[:, j], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [1, N])
def test_gradients_are_finite_at_equal_votes_one_input_and_extreme_activations(
    name, inputs, monkeypatch
):
    monkeypatch.setitem(globals(), "LOGITS", LOGITS[:, :inputs])
    routing, _ = FAMILY[name]

    @jax.jit
    def differentiate(votes, activations):
        return jax.value_and_grad(
            lambda *args: sum(jnp.sum(jnp.sin(result)) for result in routing(*args)), (0, 1)
        )(votes, activations)

    for value, active in itertools.product([0.0, 1.0, 1e3], [0.0, 1.0, 1e-30]):
        results = differentiate(jnp.full((J, inputs, D), value), jnp.full(inputs, active))
        for leaf in jax.tree.leaves(results):
            assert np.isfinite(leaf).all(), (value, active)


@pytest.mark.slow
def test_the_gradient_equals_finite_differences(name, rng):
    routing, _ = FAMILY[name]
    with jax.enable_x64(True):
        votes = jnp.asarray(rng.normal(size=(J, N, D)))
        activations = jnp.asarray(rng.uniform(0.1, 1, size=N))
        function = jax.jit(lambda *args: tuple(routing(*args)))
        assert function(votes, activations)[0].dtype == jnp.float64
        check_grads(function, (votes, activations), order=1, modes=("rev",), rtol=5e-3)


@given(st.sampled_from(["em", "variational"]), st.integers(0, 2**32 - 1), st.floats(0.1, 100))
@settings(max_examples=50)
def test_each_input_capsule_shares_itself_out_whole(name, seed, scale):
    votes, activations = draw(np.random.default_rng(seed), 2)
    state = jax.jit(FAMILY[name][0])(scale * votes, activations)
    np.testing.assert_allclose(state.responsibilities.sum(-2), 1, rtol=1e-5)


def test_one_m_step_fits_a_weighted_gaussian(rng):
    votes, activations = draw(rng)
    state = route_by_em(votes, activations, routings=1)
    for j in range(J):
        mean = np.average(np.asarray(votes[j]), 0, weights=activations)
        variance = np.average((np.asarray(votes[j]) - mean) ** 2, 0, weights=activations)
        np.testing.assert_allclose(state.poses[j], mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.variances[j], variance + FLOOR, rtol=1e-4)


def test_em_finds_the_vote_on_which_all_agree_and_is_sure_of_it(rng):
    votes = jnp.asarray(rng.normal(size=(J, N, D)), jnp.float32)
    votes = votes.at[1].set(jnp.asarray([3.0, -1.0, 0.5, 2.0]))
    state = capsjax.em_routing(
        votes, jnp.ones(N), beta_u=jnp.zeros(J), beta_a=jnp.zeros(J), inverse_temperature=0.1
    )
    np.testing.assert_allclose(state.poses[1], votes[1, 0], rtol=1e-5)
    assert state.activations[1] > 0.99
    assert (state.responsibilities[1] > 0.99).all()


def test_variational_routing_shrinks_a_pose_towards_the_prior_where_votes_are_few(rng):
    votes = jnp.full((1, 4, D), 3.0)
    for active in (0.25, 1.0):  # one or four votes in all, and one of the prior
        state = capsjax.variational_routing(votes, jnp.full(4, active), routings=1)
        np.testing.assert_allclose(state.poses, np.full((1, D), 3 * 4 * active / (4 * active + 1)))


def test_inactive_inputs_make_no_capsules():
    poses, activations = capsjax.self_routing(jnp.ones((J, N, D)), jnp.zeros(N), jnp.zeros((J, N)))
    assert not poses.any()
    assert not activations.any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["em", "variational"])
def test_memory_holds_the_votes_of_one_output_capsule(name):
    batch, classes, inputs, d, k = 32, 40, 500, 64, 4
    u = jax.ShapeDtypeStruct((batch, inputs, k), jnp.float32)
    weight = jax.ShapeDtypeStruct((classes, inputs, d, k), jnp.float32)
    activations = jax.ShapeDtypeStruct((batch, inputs), jnp.float32)

    def total(u, weight, activations):
        return FAMILY[name][0](capsjax.DenseVotes(u, weight), activations).poses.sum()

    step = jax.jit(jax.grad(total, (0, 1)))
    memory: Any = step.lower(u, weight, activations).compile().memory_analysis()
    votes = 4 * batch * classes * inputs * d  # as an array they take six times as much and more
    assert 0 < memory.temp_size_in_bytes < 0.7 * votes


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("em_routing", {"activations": (J,)}, r"activations \[\.\.\., i\] = \[5\] for votes"),
        ("em_routing", {"beta_u": (N,)}, r"beta_u \[j\] = \[3\], got \[5\]"),
        ("em_routing", {"beta_a": ()}, r"beta_a \[j\] = \[3\], got \[\]"),
        ("em_routing", {"routings": 0}, "em_routing: routings is an int of 1 or more, got 0"),
        (
            "em_routing",
            {"min_variance": 0.0},
            "min_variance is a number above 0 and finite",
        ),
        ("em_routing", {"votes": (N, D)}, r"em_routing: expected votes"),
        ("em_routing", {"mass": -1.0}, "mass is a number above 0 and finite, got -1.0"),
        ("em_routing", {"inverse_temperature": (2,)}, r"inverse_temperature is a scalar, .* \[2\]"),
        ("variational_routing", {"activations": (J,)}, r"\[5\] for votes \[3, 5, 4\], got \[3\]"),
        ("variational_routing", {"routings": 1.5}, r"int of 1 or more, got 1\.5"),
        (
            "variational_routing",
            {"prior_scale": 0.0},
            "prior_scale is a number above 0 and finite",
        ),
        ("variational_routing", {"prior_counts": -1.0}, "prior_counts is a number above 0"),
        ("self_routing", {"logits": (N, J)}, r"logits \[\.\.\., j, i\] = \[3, 5\], got \[5, 3\]"),
        ("attention_routing", {"scale": (J,)}, r"scale \[d\] = \[4\], got \[3\]"),
        ("attention_routing", {"offset": (J, D)}, r"offset \[d\] = \[4\], got \[3, 4\]"),
        ("attention_routing", {"routings": 0}, "int of 1 or more, got 0"),
    ],
)
def test_what_cannot_be_routed_is_an_error_in_words(function, options, message, jit):
    shapes: dict[str, Any] = {"votes": (J, N, D)}
    shapes |= {} if function == "attention_routing" else {"activations": (N,)}
    shapes |= {"beta_u": (J,), "beta_a": (J,)} if function == "em_routing" else {}
    shapes |= {"logits": (J, N)} if function == "self_routing" else {}
    shapes |= options
    static = {n: v for n, v in shapes.items() if not isinstance(v, tuple)}
    arrays = {n: jnp.ones(shape) for n, shape in shapes.items() if n not in static}
    call = partial(getattr(capsjax, function), **static)
    with pytest.raises(ValueError, match=message):
        (jax.jit(call) if jit else call)(**arrays)
