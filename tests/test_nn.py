"""Layers: they hold parameters and call the functions."""

import dataclasses
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_shape
from flax import nnx
from jax.nn import initializers

import capsjax
import reference
from capsjax import Agreement
from capsjax.nn import Affine, Conv, Decoder, Dense, DenseCaps, Dropout, PrimaryCaps, as_routing


def apply(layer, *args):
    """Calls a layer jitted: op by op, it compiles every operation."""
    graphdef, params = nnx.split(layer)
    return jax.jit(lambda params, *args: nnx.merge(graphdef, params)(*args))(params, *args)


def draw(rng, *shape):
    return jnp.asarray(rng.uniform(size=shape), jnp.float32)


@pytest.mark.parametrize("grouping", ["channels", "flat"])
def test_primary_caps_agrees_with_its_function(grouping, rng):
    options = {"strides": 1, "grouping": grouping, "coupling": 0.5}
    layer = PrimaryCaps(2, 8, 4, kernel_size=2, rngs=nnx.Rngs(0), **options)
    x = draw(rng, 3, 4, 5, 2)
    kernel, bias = layer.conv.kernel[...], layer.conv.bias[...]
    u = apply(layer, x)
    assert_shape(u, (3, 3 * 4 * 2, 4))
    expected = reference.primary_capsules(*map(np.asarray, (x, kernel, bias)), dim=4, **options)
    np.testing.assert_allclose(u, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("use_bias", "stop_gradient"), [(False, True), (True, False)])
def test_dense_caps_agrees_with_its_functions(use_bias, stop_gradient, rng):
    routing = Agreement(2, bias=use_bias, stop_gradient=stop_gradient)
    layer = DenseCaps(5, 2, 3, 4, routing, rngs=nnx.Rngs(0))
    weight, u = layer.weight[...], 100 * rng.uniform(size=(2, 5, 2)).astype(np.float32)
    bias = jnp.full((3, 4), 0.1) if use_bias else None
    assert (layer.bias is not None) == use_bias

    def composed(u):
        u_hat = capsjax.predictions(u, weight)
        return capsjax.routing(u_hat, 2, bias=bias, stop_gradient=stop_gradient)

    def value_and_gradient(function):
        return jax.jit(jax.value_and_grad(lambda u: jnp.sum(function(u)[..., 0])))(u)

    assert_shape(jax.eval_shape(layer, u), (2, 3, 4))
    chex.assert_trees_all_close(
        value_and_gradient(layer), value_and_gradient(composed), rtol=1e-5, atol=1e-7
    )


@dataclasses.dataclass(frozen=True)
class WeightedMean:
    """A routing of one's own: the mean of the votes, weighted by a bias [j, i]."""

    name: ClassVar[str] = "weighted mean"

    def initial_bias(self, j, i, d):
        return jnp.full((j, i), 0.1)

    def __call__(self, u, weight, bias=None):
        return jnp.einsum("...ik,jidk,ji->...jd", u, weight, bias)


def test_dense_caps_takes_any_routing_and_owns_the_bias_that_it_asks_for(rng):
    layer: Any = DenseCaps(5, 2, 3, 4, WeightedMean(), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer.bias[...], np.full((3, 5), 0.1, np.float32))
    layer.bias[...] = draw(rng, 3, 5)
    u = draw(rng, 2, 5, 2)
    votes = reference.predictions(np.asarray(u), np.asarray(layer.weight[...]))
    expected = np.einsum("bjid,ji->bjd", votes, layer.bias[...])
    np.testing.assert_allclose(apply(layer, u), expected, rtol=1e-5, atol=1e-7)


def test_dense_caps_begins_with_small_normal_weights_or_those_that_are_asked_for():
    weight = DenseCaps(50, 8, 10, 16, rngs=nnx.Rngs(0)).weight[...]
    assert_shape(weight, (10, 50, 16, 8))
    assert np.std(weight) == pytest.approx(0.01, rel=0.02)
    layer = DenseCaps(5, 8, 3, 4, weight_init=initializers.constant(2.0), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer.weight[...], np.full((3, 5, 4, 8), 2.0))


def test_a_number_of_iterations_stands_for_routing_by_agreement():
    assert as_routing(2) == Agreement(2)
    assert as_routing(WeightedMean()) == WeightedMean()
    assert DenseCaps(5, 2, 3, 4, rngs=nnx.Rngs(0)).routing == Agreement(3)


@pytest.mark.parametrize("routings", [0, -1, 1.5, 3.0, True, None, "uniform", np.int64(3)])
def test_what_is_neither_a_number_of_iterations_nor_a_routing_is_refused(routings):
    words = (
        "iterations is an int of 1 or more, got |a number of iterations or a routing, .*'uniform'"
    )
    with pytest.raises(ValueError, match=words):
        DenseCaps(5, 2, 3, 4, routings, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("strides", [1, 2])
def test_conv_agrees_with_the_paper(strides, rng):
    uniform = initializers.uniform(1.0)
    layer = Conv((3, 2, 2, 5), uniform, uniform, strides=strides, rngs=nnx.Rngs(0))
    x = draw(rng, 3, 6, 7, 2)
    kernel, bias = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])
    expected = reference.conv(np.asarray(x), kernel, strides) + bias
    np.testing.assert_allclose(apply(layer, x), expected, rtol=1e-5)


def test_a_decoder_agrees_with_its_function(rng):
    uniform = initializers.uniform(1.0)
    sizes = [(6, 5), (5, 7), (7, 4)]
    decoder = Decoder(Affine(shape, uniform, uniform, rngs=nnx.Rngs(0)) for shape in sizes)
    x = draw(rng, 2, 6)
    layers = [(np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])) for layer in decoder]
    np.testing.assert_allclose(apply(decoder, x), reference.decode(layers, x), rtol=1e-5)


def test_dense_is_a_product_and_a_sum(rng):
    layer = Dense((6, 5), rngs=nnx.Rngs(0))
    x = draw(rng, 2, 3, 6)
    expected = np.asarray(x) @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
    np.testing.assert_allclose(apply(layer, x), expected, rtol=1e-5, atol=1e-6)
    integers = np.round(10 * x).astype(int)
    np.testing.assert_array_equal(apply(layer, integers), apply(layer, jnp.float32(integers)))


def test_dropout_sets_its_share_to_zero_and_keeps_the_mean(dtype):
    dropped = Dropout(0.25, rngs=nnx.Rngs(0))(jnp.full((1000, 100), 3, dtype))
    assert dropped.dtype == dtype
    y = np.asarray(dropped, np.float32)
    assert set(np.unique(y).tolist()) == {0, 4}
    assert np.mean(y == 0) == pytest.approx(0.25, abs=0.005)
    for axis in (0, 1):  # neither rows nor columns are dropped together
        assert y.mean(axis).std() < 0.25


def test_dropout_in_evaluation_returns_what_it_got_and_draws_nothing():
    layer = Dropout(0.5, rngs=nnx.Rngs(0))
    before, x = int(layer.seed[...]), jnp.ones(100)
    layer.eval()
    assert layer(x) is x
    assert int(layer.seed[...]) == before
    layer.train()
    assert not layer(x).all()


def test_a_dropout_of_rate_0_drops_nothing():
    x = jnp.ones(100)
    assert Dropout(0, rngs=nnx.Rngs(0))(x) is x


def test_each_call_of_dropout_drops_others_and_the_same_seed_the_same():
    layer, x = Dropout(0.5, rngs=nnx.Rngs(0)), jnp.ones(1000)
    layer.seed[...] = jnp.uint32(2**32 - 2)  # the one after the next is 0
    graphdef, state = nnx.split(layer)

    @jax.jit
    def call_thrice(state):
        layer = nnx.merge(graphdef, state)
        return [layer(x) for _ in range(3)], nnx.state(layer)

    masks, after = call_thrice(state)
    chex.assert_trees_all_equal(call_thrice(state)[0], masks)
    for one, other in zip(masks, [*masks[1:], call_thrice(after)[0][0]], strict=True):
        assert 0.4 < np.mean(one != other) < 0.6  # as of independent masks
    assert after["seed"][...] == 1


def test_two_dropouts_of_a_network_have_seeds_of_their_own():
    rngs = nnx.Rngs(0)
    assert Dropout(0.5, rngs=rngs).seed[...] != Dropout(0.5, rngs=rngs).seed[...]


@pytest.mark.parametrize("rate", [-0.1, 1, np.nan])
def test_a_dropout_of_all_or_less_than_nothing_is_refused(rate):
    with pytest.raises(ValueError, match=f"rate is at least 0 and below 1, got {rate}"):
        Dropout(rate, rngs=nnx.Rngs(0))


class Loose:
    """A routing that is no frozen dataclass."""

    name = "loose"

    def initial_bias(self, j, i, d):
        return None

    def __call__(self, u, weight, bias=None):
        return capsjax.dense_capsules(u, weight)


@dataclasses.dataclass(frozen=True)
class Nameless:
    initial_bias, __call__ = Loose.initial_bias, Loose.__call__


@pytest.mark.parametrize(
    "routing",
    [Agreement, Loose(), dataclasses.dataclass(Loose)(), Nameless(), lambda u, weight, bias: u],
    ids=["a class", "no dataclass", "not frozen", "no name", "a function"],
)
def test_what_is_no_routing_is_refused_when_the_layer_is_made(routing):
    with pytest.raises(ValueError, match="an instance of a frozen dataclass with name"):
        DenseCaps(5, 2, 3, 4, routing, rngs=nnx.Rngs(0))


def test_an_affine_layer_begins_as_in_pytorch_unless_told_otherwise():
    layer = Affine((3, 3, 4, 50), rngs=nnx.Rngs(0))
    for values in (layer.kernel[...], layer.bias[...]):
        assert 0.9 / 6 < np.abs(values).max() <= 1 / 6  # a fan-in of 36
