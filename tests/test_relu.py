import jax
import jax.numpy as jnp
import numpy as np

from capsjax._relu import relu


def test_values_and_gradients_are_those_of_jax_also_at_zero(dtype):
    x = jnp.asarray([-jnp.inf, -2, -0.0, 0, 1e-30, 3, jnp.inf], dtype)
    ours, theirs = (jax.jvp(f, (x,), (jnp.full_like(x, 5),)) for f in (relu, jax.nn.relu))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        np.testing.assert_array_equal(a, b)


def test_the_input_is_not_kept_for_the_gradient():
    x = jnp.linspace(-1, 1, 8)
    kept = jax.tree.leaves(jax.vjp(relu, x)[1])
    assert kept
    assert not any(jnp.array_equal(array, x) for array in kept)


def test_a_number_that_is_none_stays_one():
    assert jnp.isnan(relu(jnp.asarray(jnp.nan)))
