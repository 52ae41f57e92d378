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


def list_readers(function) -> list[str]:
    """Lists the operations of value and gradient that read the input."""
    jaxpr = jax.make_jaxpr(lambda x, t: jax.jvp(function, (x,), (t,)))(1.0, 1.0).jaxpr
    return [eqn.primitive.name for eqn in jaxpr.eqns if jaxpr.invars[0] in eqn.invars]


def test_only_the_value_reads_the_input_and_the_gradient_does_not():
    assert len(list_readers(relu)) == 1
    assert len(list_readers(jax.nn.relu)) == 2


def test_nan_stays_nan():
    assert jnp.isnan(relu(jnp.asarray(jnp.nan)))
