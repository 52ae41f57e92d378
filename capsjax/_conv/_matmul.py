"""Matrix products whose sums run in float32."""

import jax.numpy as jnp
from jax import Array, lax

_Dimensions = tuple[tuple[int, ...], tuple[int, ...]]


def contract(
    left: Array, right: Array, contracted: _Dimensions, batch: _Dimensions = ((), ())
) -> Array:
    """Multiplies two arrays and sums over the contracted dimensions, in float32 or wider."""
    sums = jnp.promote_types(left.dtype, jnp.float32)
    return lax.dot_general(left, right, (contracted, batch), preferred_element_type=sums)
