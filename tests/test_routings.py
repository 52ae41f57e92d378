"""What every routing keeps: the paper's loops, votes that are never made, symmetries, gradients."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_shape
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import PartitionSpec
from jax.test_util import check_grads

import capsjax
import reference
from capsjax import nn, weights
from capsjax.sharding import make_mesh

J, N, D, K = 3, 5, 4, 2  # output and input capsules, and their dimensions
KEY = jax.random.key(3)
LOGITS = np.asarray(jax.random.normal(KEY, (J, N)), np.float64)
COUPLINGS = np.exp(LOGITS) / np.exp(LOGITS).sum(0)  # of random routing


def route_uniformly(u_hat, bias):
    couplings = np.full(u_hat.shape[:-1], 1 / u_hat.shape[-3])
    return reference.squash(reference.sum_of_votes(u_hat, couplings) + bias)


def route_randomly(u_hat, bias):
    return reference.squash(reference.sum_of_votes(u_hat, COUPLINGS) + bias)


# A routing, its loops in NumPy, and the shape of its bias.
FAMILY: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "agreement": (
        partial(capsjax.routing, routings=2),
        lambda u_hat, bias: reference.routing_state(u_hat, 2, bias)[2],
        (J, D),
    ),
    "leaky agreement": (
        partial(capsjax.routing, leak=True, stop_gradient=False),
        lambda u_hat, bias: reference.routing_state(u_hat, 3, bias, leak=True)[2],
        (J, D),
    ),
    "uniform": (capsjax.uniform_routing, route_uniformly, (J, D)),
    "random": (partial(capsjax.random_routing, KEY), route_randomly, (J, D)),
    "self-attention": (
        capsjax.self_attention_routing,
        reference.self_attention_routing,
        (J, N),
    ),
}
SMOOTH = [name for name in FAMILY if name != "agreement"]  # no gradient is stopped in them


@pytest.fixture(params=FAMILY)
def name(request):
    return request.param


def float64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def draw(rng, *shape, dtype: Any = jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def draw_votes(rng, *lead) -> capsjax.DenseVotes:
    return capsjax.DenseVotes(draw(rng, *lead, N, K), draw(rng, J, N, D, K))


def test_a_routing_equals_its_paper(name, rng, lead, dtype, call):
    routing, loops, bias_shape = FAMILY[name]
    u_hat, bias = draw(rng, *lead, J, N, D, dtype=dtype), draw(rng, *bias_shape, dtype=dtype)
    v = call(lambda u_hat: routing(u_hat, bias=bias), u_hat)
    assert_shape(v, (*lead, J, D))
    assert v.dtype == dtype
    tolerance = {"float32": 2e-5, "bfloat16": 2**-8}[dtype.__name__]
    expected = loops(float64(u_hat), float64(bias))
    np.testing.assert_allclose(float64(v), expected, rtol=tolerance, atol=2e-6)


def test_votes_that_are_never_made_give_the_same_capsules_and_gradients(name, rng):
    routing, _, bias_shape = FAMILY[name]
    votes, bias, cotangent = draw_votes(rng, 2), draw(rng, *bias_shape), draw(rng, 2, J, D)

    def total(u, weight, bias, make):
        v = routing(make(u, weight), bias=bias)
        return jnp.vdot(v, cotangent), v

    results = [
        jax.jit(jax.grad(partial(total, make=make), (0, 1, 2), has_aux=True))(
            votes.u, votes.weight, bias
        )
        for make in (capsjax.DenseVotes, capsjax.predictions)
    ]
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("lead", "dtype"), [((), jnp.float32), ((3, 2), jnp.float32), ((3, 2), jnp.bfloat16)]
)
def test_the_votes_of_a_layer_sum_and_multiply_as_those_in_an_array(rng, lead, dtype):
    votes = draw_votes(rng, *lead)
    votes = capsjax.DenseVotes(votes.u.astype(dtype), votes.weight)
    assert votes.dtype == dtype
    u_hat = float64(jax.jit(jnp.asarray)(votes))
    np.testing.assert_allclose(float64(np.asarray(votes)), u_hat, rtol=1e-6, atol=1e-6)
    assert votes.shape == u_hat.shape == (*lead, J, N, D)
    couplings, v = draw(rng, *lead, J, N), draw(rng, *lead, J, D)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5 if dtype == "float32" else 0.1)
    results = jax.jit(
        lambda votes: (votes.weighted_sum(), votes.weighted_sum(couplings), votes.agreement(v))
    )(votes)
    equal, weighted, agreement = results
    close(equal, u_hat.sum(-2))
    close(weighted, reference.sum_of_votes(u_hat, float64(couplings)))
    close(agreement, np.einsum("...jid,...jd->...ji", u_hat, float64(v)))
    chex.assert_type(results, jnp.float32)


def test_votes_pass_through_transformations(rng):
    votes = draw_votes(rng, 2)
    chex.assert_trees_all_close(
        jax.jit(capsjax.routing)(votes), capsjax.routing(jax.lax.stop_gradient(votes)), rtol=1e-5
    )
    assert jax.eval_shape(lambda votes: votes, votes).shape == (2, J, N, D)


@given(
    st.sampled_from(list(FAMILY)),
    hnp.arrays(np.float32, (2, J, N, D), elements=st.floats(-8, 8, width=32)),
)
@settings(max_examples=100)
def test_a_routing_equals_its_paper_at_any_value(name, u_hat):
    routing, loops, bias_shape = FAMILY[name]
    v = jax.jit(routing)(u_hat)
    assert (reference.length(float64(v)) <= 1 + 1e-6).all()
    expected = loops(float64(u_hat), np.zeros(bias_shape))
    np.testing.assert_allclose(v, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "random"])
def test_the_order_of_capsules_does_not_matter(name, rng):
    routing, _, _ = FAMILY[name]
    u_hat, i, j = draw(rng, 2, J, N, D), rng.permutation(N), rng.permutation(J)
    v = routing(u_hat)
    np.testing.assert_allclose(routing(u_hat[:, :, i]), v, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(routing(u_hat[:, j]), v[:, j], rtol=1e-4, atol=1e-6)


def test_random_couplings_are_those_of_the_key_and_the_same_for_all_examples(rng):
    u_hat = jnp.broadcast_to(draw(rng, J, N, D), (4, J, N, D))
    v = capsjax.random_routing(KEY, u_hat)
    np.testing.assert_array_equal(v, np.broadcast_to(v[0], v.shape))
    assert np.abs(v - capsjax.random_routing(jax.random.key(4), u_hat)).max() > 1e-2


@pytest.mark.parametrize(
    ("inputs", "dtype"), [(1, jnp.float32), (N, jnp.float32), (N, jnp.bfloat16)]
)
def test_gradients_are_finite_at_zero_at_equal_votes_and_at_one_input(name, inputs, dtype):
    routing, _, _ = FAMILY[name]
    differentiate = jax.jit(jax.value_and_grad(lambda u_hat: routing(u_hat).sum()))
    for value in (0.0, 1.0, 1e4):
        v, gradient = differentiate(jnp.full((J, inputs, D), value, dtype))
        assert np.isfinite(float64(v))
        assert np.isfinite(float64(gradient)).all()


@pytest.mark.parametrize("name", SMOOTH)
def test_the_gradient_equals_finite_differences(name, rng):
    routing, _, bias_shape = FAMILY[name]
    with jax.enable_x64(True):
        u_hat, bias = (
            jnp.asarray(rng.normal(size=(J, N, D))),
            jnp.asarray(rng.normal(size=bias_shape)),
        )
        function = jax.jit(lambda u_hat, bias: routing(u_hat, bias=bias))
        assert function(u_hat, bias).dtype == jnp.float64
        check_grads(function, (u_hat, bias), order=1, modes=("fwd", "rev"))


def test_sums_over_many_inputs_in_bfloat16_run_in_float32(name):
    # A sum in bfloat16 would stop at 0.5; this one is 8.
    u_hat = jnp.full((1, 4096, 1), 2**-9, jnp.bfloat16)
    loops = {"random": route_uniformly}.get(name, FAMILY[name][1])  # one output takes all
    expected = loops(float64(u_hat), np.zeros((1, 4096 if name == "self-attention" else 1)))
    np.testing.assert_allclose(float64(FAMILY[name][0](u_hat)), expected, rtol=2**-8)


def test_every_device_may_route_its_part_of_the_batch(name, rng):
    routing, split = FAMILY[name][0], PartitionSpec("data")
    u_hat = draw(rng, 8, J, N, D)
    mapped = jax.shard_map(routing, mesh=make_mesh(8, 8), in_specs=split, out_specs=split)
    np.testing.assert_allclose(jax.jit(mapped)(u_hat), routing(u_hat), rtol=1e-5, atol=1e-6)


def test_self_attention_never_makes_the_votes():
    batch, classes, inputs, d, k = 32, 200, 500, 16, 2
    u = jax.ShapeDtypeStruct((batch, inputs, k), jnp.float32)
    weight = jax.ShapeDtypeStruct((classes, inputs, d, k), jnp.float32)
    layer = partial(capsjax.dense_capsules, routing=capsjax.self_attention_routing)
    step = jax.jit(jax.grad(lambda u, w: layer(u, w).sum(), (0, 1)))
    memory: Any = step.lower(u, weight).compile().memory_analysis()
    assert 0 < memory.temp_size_in_bytes < 4 * batch * classes * inputs * d / 2


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5])
def test_a_seed_that_is_no_key_of_its_own_is_refused(seed):
    with pytest.raises(ValueError, match=r"Random: seed is an int from 0 to 2\^32 - 1, got"):
        capsjax.Random(seed)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("name", "u_hat", "bias", "message"),
    [
        (
            "uniform",
            (N, D),
            None,
            r"uniform_routing: expected votes \[\.\.\., j, i, d\], got \[5, 4\]",
        ),
        ("random", (N, D), None, r"random_routing: expected votes"),
        ("random", (J, N, D), (J, N), r"a bias \[j, d\] = \[3, 4\], got \[3, 5\]"),
        ("self-attention", (N, D), None, r"self_attention_routing: expected votes"),
        ("self-attention", (J, N, D), (J, D), r"a bias \[j, i\] = \[3, 5\], got \[3, 4\]"),
    ],
)
def test_what_cannot_be_routed_is_an_error_in_words(name, u_hat, bias, message, jit):
    routing = partial(FAMILY[name][0], bias=None if bias is None else np.zeros(bias))
    with pytest.raises(ValueError, match=message):
        (jax.jit(routing) if jit else routing)(jnp.ones(u_hat))


VALUES = [
    (capsjax.Uniform(), capsjax.uniform_routing, None),
    (capsjax.Random(3), partial(capsjax.random_routing, KEY), None),
    (capsjax.SelfAttention(), capsjax.self_attention_routing, 0.0),
    (capsjax.Agreement(bias=True), capsjax.routing, 0.1),
    (capsjax.Agreement(leak=True), partial(capsjax.routing, leak=True), None),
]


@pytest.mark.parametrize(("value", "routing", "first"), VALUES, ids=lambda v: type(v).__name__)
def test_a_layer_takes_a_routing_as_a_value_and_begins_with_its_bias(rng, value, routing, first):
    layer: Any = nn.DenseCaps(N, K, J, D, value, rngs=nnx.Rngs(0))
    u, bias = draw(rng, 2, N, K), None
    if first is None:
        assert layer.bias is None
    else:
        assert (layer.bias[...] == np.float32(first)).all()
        bias = layer.bias[...] = draw(rng, *layer.bias.shape)
    expected = capsjax.dense_capsules(u, layer.weight[...], routing, bias=bias)
    np.testing.assert_allclose(layer(u), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("value", "routing", "first"), VALUES, ids=lambda v: type(v).__name__)
def test_a_network_with_any_routing_is_saved_and_loaded(value, routing, first, tmp_path):
    net = capsjax.CapsNet(
        (10, 10, 1), 3, value, channels=4, types=1, kernel_size=3, hidden=(4,), rngs=nnx.Rngs(0)
    )
    weights.save(net, tmp_path / "net.safetensors")
    loaded = weights.load(tmp_path / "net.safetensors")
    assert loaded.config.routing == value
    net.eval()
    assert nnx.graphdef(loaded) == nnx.graphdef(net)  # the layer routes by it, too
    chex.assert_trees_all_equal(weights.arrays_of(loaded), weights.arrays_of(net))
