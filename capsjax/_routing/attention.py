"""Inverted dot-product attention routing: output capsules compete for each input capsule."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from capsjax._routing._votes import Votes, as_votes, check_iterations
from capsjax._vectors import at_least_float32


def attention_routing(
    votes: ArrayLike | Votes,
    routings: int = 2,
    *,
    scale: ArrayLike | None = None,
    offset: ArrayLike | None = None,
) -> jax.Array:
    """Routes by attention, with a layer norm in place of a squash.

    v_j = LN(Σ_i û_ji / J); repeat: c = softmax_j(û · v / √d), v_j = LN(Σ_i c_ji û_ji)

    LN(s) = scale · (s − mean(s)) / √(var(s) + 1e-5) + offset, over the d numbers. The logits do not
    add up from iteration to iteration, and the gradient flows through all of them. The length of v
    says nothing: a class score is a linear function of v. In a deep network this is the sequential
    form, in which each layer ends its iterations before the next begins. The authors' dropout is
    left out.

    Args:
      votes: û [..., j, i, d], as in `routing`.
      routings: the number of passes, a Python int of 1 or more; the first one is uniform.
      scale: [d], of the layer norm; None: 1.
      offset: [d], of the layer norm; None: 0.

    Returns:
      v: output capsules [..., j, d] in the dtype of the votes.

    Raises:
      ValueError: if a shape does not fit or `routings` is not an int of 1 or more.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> votes = jnp.arange(8.0).reshape(2, 2, 2)
      >>> capsjax.attention_routing(votes).shape
      (2, 2)

    References:
      Tsai, Srivastava, Goh, Salakhutdinov, "Capsules with Inverted Dot-Product Attention Routing",
      2020, arXiv:2002.04764; apple/ml-capsules-inverted-attention-routing.
    """
    votes = as_votes("attention_routing", votes)
    check_iterations("attention_routing", routings)
    j, _, d = votes.shape[-3:]
    affine = _as_vector("scale", scale, 1, d), _as_vector("offset", offset, 0, d)
    v = _layer_norm(votes.weighted_sum() / j, *affine)
    for _ in range(routings - 1):
        couplings = jax.nn.softmax(votes.agreement(v) / math.sqrt(d), -2)
        v = _layer_norm(votes.weighted_sum(couplings), *affine)
    return v.astype(votes.dtype)


def _layer_norm(s: jax.Array, scale: jax.Array, offset: jax.Array) -> jax.Array:
    centred = s - jnp.mean(s, -1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), -1, keepdims=True)
    norm = centred / jnp.sqrt(variance + 1e-5)
    lead = range(s.ndim - 1)
    return jnp.expand_dims(scale, lead) * norm + jnp.expand_dims(offset, lead)


def _as_vector(name: str, vector: ArrayLike | None, default: float, d: int) -> jax.Array:
    if vector is None:
        return jnp.full(d, default, jnp.float32)
    if jnp.shape(vector) != (d,):
        raise ValueError(
            f"attention_routing: expected {name} [d] = [{d}], got {[*jnp.shape(vector)]}"
        )
    return at_least_float32(jnp.asarray(vector))
