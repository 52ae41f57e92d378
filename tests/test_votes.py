"""The votes: what each input capsule predicts of each output capsule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_shape
from hypothesis import given, settings
from hypothesis import strategies as st

import capsjax
import reference

J, N, D, K = 3, 5, 4, 2  # output and input capsules, and their dimensions


def float64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def test_predictions_equal_the_paper(rng, lead, dtype, call):
    weight = jnp.asarray(rng.normal(size=(J, N, D, K)), dtype)
    u = jnp.asarray(rng.normal(size=(*lead, N, K)), dtype)
    u_hat = call(lambda u: capsjax.predictions(u, weight), u)
    assert_shape(u_hat, (*lead, J, N, D))
    assert u_hat.dtype == dtype
    expected = reference.predictions(float64(u), float64(weight))
    tolerance = {"float32": 1e-6, "bfloat16": 2**-8}[dtype.__name__]
    np.testing.assert_allclose(float64(u_hat), expected, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("u", "weight", "message"),
    [
        ((N, K), (J, N, D), r"weight \[j, i, d, k\], got \[3, 5, 4\]"),
        ((N, K), (J, N + 1, D, K), r"6, 2\] for a weight of shape \[3, 6, 4, 2\], got \[5, 2\]"),
        ((N, K), (J, N, D, K + 1), r"5, 3\] for a weight of shape \[3, 5, 4, 3\], got \[5, 2\]"),
        ((K,), (J, N, D, K), r"\[\.\.\., 5, 2\].*got \[2\]"),
    ],
)
def test_what_cannot_predict_is_an_error_in_words(u, weight, message, jit):
    call = jax.jit(capsjax.predictions) if jit else capsjax.predictions
    with pytest.raises(ValueError, match=message):
        call(jnp.ones(u), jnp.ones(weight))


@given(
    st.sampled_from([(1, 1), (2, 3)]),
    st.sampled_from([(1, 1), (3, 2)]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=80)
def test_predictions_equal_the_paper_at_any_shape(inputs, outputs, seed):
    rng = np.random.default_rng(seed)
    u = rng.normal(size=inputs).astype(np.float32)
    weight = rng.normal(size=(outputs[0], inputs[0], outputs[1], inputs[1])).astype(np.float32)
    u_hat = jax.jit(capsjax.predictions)(u, weight)
    np.testing.assert_allclose(u_hat, reference.predictions(u, weight), rtol=1e-5, atol=1e-6)
