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
from capsjax.nn import Affine, Conv, Decoder, DenseCaps, PrimaryCaps, as_routing


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


@pytest.mark.parametrize("routings", [0, -1, 1.5, 3.0, True, None, "3", np.int64(3)])
def test_what_is_neither_a_number_of_iterations_nor_a_routing_is_refused(routings):
    with pytest.raises(ValueError, match=r"routings is an int of 1 or more, got "):
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
