"""Masks, perturbed capsules and the decoder."""

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

J, D = 3, 2


def float64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


@pytest.fixture
def layers(rng):
    """A decoder of 6 numbers into 4 pixels, with two hidden layers."""
    sizes = [(J * D, 5), (5, 7), (7, 4)]
    return [
        (jnp.asarray(rng.normal(size=(m, n)), jnp.float32), jnp.asarray(rng.normal(size=n)))
        for m, n in sizes
    ]


def test_mask_equals_the_paper_with_labels_in_every_form(rng, lead, dtype, call):
    v = jnp.asarray(rng.normal(size=(*lead, J, D)), dtype)
    numbers = np.asarray(rng.integers(J, size=lead))
    one_hot = np.eye(J, dtype=np.float32)[numbers]
    k_hot = rng.integers(2, size=(*lead, J))

    def masked(v, *labels):
        return [capsjax.mask(v)] + [capsjax.mask(v, form) for form in labels]

    results = call(masked, v, numbers, one_hot, k_hot, k_hot == 1)
    kept = [reference.longest(float64(v)), one_hot, one_hot, k_hot, k_hot]
    for x, capsules in zip(results, kept, strict=True):
        assert_shape(x, (*lead, J * D))
        assert x.dtype == dtype
        np.testing.assert_array_equal(float64(x), reference.mask(float64(v), float64(capsules)))


# A length whose square underflows counts as zero.
_NUMBERS = st.floats(-2, 2, width=32).filter(lambda x: x == 0 or abs(x) > 1e-18)


@given(hnp.arrays(np.float32, (4, J, D), elements=_NUMBERS))
@settings(max_examples=60)
def test_without_labels_the_longest_capsule_is_kept(v):
    kept = np.asarray(jax.jit(capsjax.mask)(v)).reshape(v.shape)
    longest = float64(capsjax.length(v)).max(-1)
    np.testing.assert_array_equal((reference.length(float64(kept)) > 0).sum(-1), longest > 0)
    np.testing.assert_allclose(reference.length(float64(kept)).max(-1), longest, rtol=1e-6)


def test_the_gradient_reaches_only_the_capsule_that_is_kept():
    gradient = jax.grad(lambda v: jnp.sum(capsjax.mask(v, 1)))(jnp.ones((J, D)))
    np.testing.assert_array_equal(gradient, [[0, 0], [1, 1], [0, 0]])


@given(
    hnp.arrays(np.float32, (J, D), elements=st.floats(-1, 1, width=32)),
    hnp.arrays(np.float32, 4, elements=st.floats(-1, 1, width=32)),
)
@settings(max_examples=60)
def test_perturb_moves_one_number_by_one_offset(v, offsets):
    x = jax.jit(capsjax.perturb)(v, offsets)
    assert_shape(x, (D, 4, J, D))
    np.testing.assert_allclose(x, reference.perturb(float64(v), offsets), rtol=1e-6, atol=1e-7)


def test_perturbed_capsules_keep_their_dtype(dtype):
    assert capsjax.perturb(jnp.ones((J, D), dtype), np.linspace(-0.25, 0.25, 11)).dtype == dtype


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("v", "offsets", "message"),
    [
        ((2, J, D), (11,), r"capsules \[j, d\] and offsets \[n\], got \[2, 3, 2\] and \[11\]"),
        ((J, D), (), r"got \[3, 2\] and \[\]"),
    ],
)
def test_what_cannot_be_perturbed_is_an_error_in_words(v, offsets, message, jit):
    call = jax.jit(capsjax.perturb) if jit else capsjax.perturb
    with pytest.raises(ValueError, match=message):
        call(jnp.ones(v), jnp.ones(offsets))


def test_decode_equals_the_paper(layers, rng, lead, dtype, call):
    layers = jax.tree.map(lambda p: p.astype(dtype), layers)
    x = jnp.asarray(rng.normal(size=(*lead, J * D)), dtype)
    pixels = call(lambda x: capsjax.decode(layers, x), x)
    expected = reference.decode(jax.tree.map(float64, layers), float64(x))
    assert_shape(pixels, (*lead, 4))
    assert pixels.dtype == dtype
    tolerance = {"float32": 1e-5, "bfloat16": 0.02}[dtype.__name__]  # rounded after each layer
    np.testing.assert_allclose(float64(pixels), expected, atol=tolerance)


def test_bfloat16_stays_bfloat16_with_parameters_in_float32(layers):
    assert capsjax.decode(layers, jnp.ones(J * D, jnp.bfloat16)).dtype == jnp.bfloat16


def test_one_layer_is_a_sigmoid_alone():
    x = jnp.array([-800.0, 0.0, 800.0])
    np.testing.assert_allclose(capsjax.decode([(jnp.eye(3), jnp.zeros(3))], x), [0, 0.5, 1])


def test_the_gradients_of_decode_pass_check_grads(layers, rng):
    x = jnp.asarray(rng.normal(size=J * D), jnp.float32)
    check_grads(jax.jit(capsjax.decode), (layers, x), order=1)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("shapes", "x", "message"),
    [
        ([], (6,), "at least one layer"),
        ([((6, 4), (4,)), ((5, 4), (4,))], (6,), r"layer 1.*\[4, out\].*got \[5, 4\] and \[4\]"),
        ([((6, 4), (4,))], (5,), r"layer 0 as kernel \[5, out\].*got \[6, 4\] and \[4\]"),
        ([((6, 4), (5,))], (6,), r"layer 0.*bias \[out\], got \[6, 4\] and \[5\]"),
        ([((6, 4, 1), (1,))], (6,), r"got \[6, 4, 1\] and \[1\]"),
        ([((6, 4), (4,))], (), r"kernel \[in, out\]"),
    ],
)
def test_layers_that_do_not_fit_are_an_error_in_words(shapes, x, message, jit):
    layers = [(jnp.ones(kernel), jnp.ones(bias)) for kernel, bias in shapes]
    call = jax.jit(capsjax.decode) if jit else capsjax.decode
    with pytest.raises(ValueError, match=message):
        call(layers, jnp.ones(x))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("v", "labels", "message"),
    [
        ((D,), 0, r"capsules \[\.\.\., j, d\], got \[2\]"),
        ((4, J, D), np.zeros(5, int), r"\[4\] or one-hot labels of shape \[4, 3\], got \[5\]"),
        ((4, J, D), np.zeros((4, 2)), r"\[4, 3\], got \[4, 2\]"),
        ((4, J, D), np.zeros(4, np.float32), "integers, got float32"),
    ],
)
def test_labels_that_do_not_fit_are_an_error_in_words(v, labels, message, jit):
    call = jax.jit(capsjax.mask) if jit else capsjax.mask
    with pytest.raises(ValueError, match=message):
        call(jnp.ones(v), labels)
