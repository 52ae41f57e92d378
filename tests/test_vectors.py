"""Length and squash: values and gradients at any length."""

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

# Compiled once a shape, because there are many examples.
squash, squash_exp = jax.jit(capsjax.squash), jax.jit(capsjax.squash_exp)
GRADIENTS = {
    function: (jax.jit(jax.jacrev(function)), jax.jit(jax.jacfwd(function)))
    for function in (capsjax.length, capsjax.squash, capsjax.squash_exp)
}

TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-8}  # a few ulp; one rounding of the result
LENGTHS = [0.0, 1e-30, 1e-20, 1e-10, 1e-3, 0.5, 1.0, 30.0, 1e4, 1e9, 1e10, 1e14, 1e18]


def draw_vectors(max_length: float = 1e18):
    """Draws vectors of up to 4 numbers and `max_length` long, alone or in batches."""
    shapes = st.sampled_from([(1,), (4,), (3, 2), (2, 1, 3)])  # few: each is compiled
    largest = float(np.float32(max_length / 2))
    return hnp.arrays(np.float32, shapes, elements=st.floats(-largest, largest, width=32))


def float64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def make_vector(length: float, dtype) -> jax.Array:
    """Makes a vector of four numbers, about as long as `length`."""
    return jnp.asarray(length * np.array([0.5, -0.7, 0.1, 0.5]), dtype)


@pytest.mark.parametrize("name", ["length", "squash", "squash_exp"])
def test_equals_the_paper(name, rng, lead, dtype, call):
    s = jnp.asarray(rng.normal(size=(*lead, 3, 4)), dtype)
    result = call(getattr(capsjax, name), s)
    expected = getattr(reference, name)(float64(s))
    assert_shape(result, expected.shape)
    assert result.dtype == dtype
    np.testing.assert_allclose(float64(result), expected, rtol=TOLERANCE[dtype.__name__])


@pytest.mark.parametrize("axis", [0, 1, -2])
def test_the_axis_may_be_any(axis, rng):
    s = rng.normal(size=(2, 3, 4)).astype(np.float32)
    last = np.moveaxis(s, axis, -1)
    squashed = np.moveaxis(jax.jit(capsjax.squash, static_argnums=1)(s, axis), axis, -1)
    np.testing.assert_allclose(squashed, reference.squash(last), rtol=2e-6)
    length = jax.jit(capsjax.length, static_argnums=1)(s, axis)
    np.testing.assert_allclose(length, reference.length(last), rtol=2e-6)


def test_keepdims_keeps_the_axis_of_the_components():
    x = jnp.ones((2, 3, 4))
    assert_shape(capsjax.length(x, 1, keepdims=True), (2, 1, 4))
    assert_shape(capsjax.length(x, 1), (2, 4))


@pytest.mark.parametrize("function", [capsjax.length, capsjax.squash, capsjax.squash_exp])
@pytest.mark.parametrize("axis", [2, -3])
@pytest.mark.parametrize("jit", [False, True])
def test_an_axis_that_is_not_there_is_an_error_in_words(function, axis, jit):
    def call(x):
        return function(x, axis)

    with pytest.raises(ValueError, match=rf"axis {axis} of an array of shape \[3, 5\]"):
        (jax.jit(call) if jit else call)(jnp.ones((3, 5)))


def test_integers_give_float32():
    np.testing.assert_allclose(capsjax.squash(jnp.array([3, 0])), [0.9, 0], rtol=1e-6)
    assert capsjax.length(jnp.array([3, 4])).dtype == jnp.float32


@given(draw_vectors())
@settings(max_examples=200)
def test_squashed_vectors_are_no_longer_than_one(s):
    for function in (squash, squash_exp):
        for dtype in (jnp.bfloat16, jnp.float32):
            v = function(jnp.asarray(s, dtype))
            assert reference.length(float64(v)).max() <= 1 + float(jnp.finfo(dtype).eps)


@given(draw_vectors())
@settings(max_examples=200)
def test_squash_equals_the_paper_at_any_value(s):
    expected = reference.squash(float64(s))
    np.testing.assert_allclose(squash(s), expected, rtol=2e-6, atol=1e-18)
    exponential = reference.squash_exp(float64(s))
    np.testing.assert_allclose(squash_exp(s), exponential, rtol=2e-6, atol=1.1e-19)


@given(draw_vectors(max_length=1e6))
@settings(max_examples=150)
def test_squash_keeps_the_direction(s):
    s = np.where(np.abs(s) < 1e-6, 0, s).astype(np.float32)
    v = float64(squash(s))
    along = reference.length(v)[..., None] * float64(s)
    np.testing.assert_allclose(v * reference.length(float64(s))[..., None], along, rtol=2e-6)


@given(draw_vectors(), st.integers(0, 2))
@settings(max_examples=100)
def test_length_equals_the_paper_at_any_value(x, axis):
    axis = axis % x.ndim
    expected = reference.length(np.moveaxis(float64(x), axis, -1))
    length = jax.jit(capsjax.length, static_argnums=1)(x, axis)
    np.testing.assert_allclose(length, expected, rtol=2e-6, atol=1.1e-19)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("function", [capsjax.length, capsjax.squash, capsjax.squash_exp])
def test_value_and_gradient_are_finite_at_every_length(function, length, dtype):
    s = make_vector(length, dtype)
    assert np.isfinite(float64(function(s))).all()
    for gradient in GRADIENTS[function]:
        assert np.isfinite(float64(gradient(s))).all()


@pytest.mark.parametrize("function", [capsjax.length, capsjax.squash])
def test_the_gradient_at_zero_is_zero(function, dtype):
    for gradient in GRADIENTS[function]:
        assert not float64(gradient(jnp.zeros(4, dtype))).any()


@pytest.mark.parametrize("name", ["squash", "squash_exp"])
@pytest.mark.parametrize("length", [0.0, *(value for value in LENGTHS if value >= 1e-10)])
def test_the_gradient_of_squash_is_the_jacobian(length, name, dtype):
    s = make_vector(length, dtype)
    expected = getattr(reference, f"{name}_jacobian")(float64(s))
    tolerance = {"float32": 2e-6, "bfloat16": 2**-7}[dtype.__name__] * np.abs(expected).max()
    for gradient in GRADIENTS[getattr(capsjax, name)]:
        error = float64(gradient(s)) - expected
        assert np.abs(error).max() <= tolerance


@pytest.mark.parametrize("length", [value for value in LENGTHS if value >= 1e-10])
def test_the_gradient_of_length_is_the_direction(length, dtype):
    x = make_vector(length, dtype)
    expected = float64(x) / reference.length(float64(x))
    for gradient in GRADIENTS[capsjax.length]:
        rtol = 2 * TOLERANCE[dtype.__name__]
        np.testing.assert_allclose(float64(gradient(x)), expected, rtol=rtol)


@pytest.mark.parametrize("function", [capsjax.length, capsjax.squash, capsjax.squash_exp])
def test_the_gradients_pass_check_grads(function, rng):
    with jax.enable_x64(True):
        s = jnp.asarray(rng.normal(size=(2, 3)))
        assert s.dtype == jnp.float64
        check_grads(jax.jit(function), (s,), order=1, modes=("fwd", "rev"))


@pytest.mark.parametrize("name", ["length", "squash", "squash_exp"])
def test_a_result_in_bfloat16_is_rounded_once(name, rng):
    s = jnp.asarray(rng.normal(size=(256, 16)), jnp.bfloat16)
    expected = jnp.asarray(getattr(reference, name)(float64(s)), jnp.bfloat16)
    np.testing.assert_array_equal(getattr(capsjax, name)(s), expected)


def test_nan_passes_through_length_and_squash():
    s = jnp.array([[3.0, jnp.nan], [3.0, 4.0]])
    np.testing.assert_array_equal(capsjax.length(s), [np.nan, 5])
    assert jnp.isnan(capsjax.squash(s[0])).all()
    assert jnp.isnan(capsjax.squash_exp(s[0])).all()
