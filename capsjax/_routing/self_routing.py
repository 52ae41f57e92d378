"""Self-routing: each input capsule decides alone where it goes, as in a mixture of experts."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from capsjax._routing._votes import Capsules, Votes, as_activations, as_votes
from capsjax._vectors import at_least_float32

_LEAST = 1e-9  # is added to divisors, which are 0 if all input capsules are inactive


def self_routing(votes: ArrayLike | Votes, activations: ArrayLike, logits: ArrayLike) -> Capsules:
    """Routes without agreement: the logits come from the input capsules alone.

    r = softmax_j(logits), a_j = Σ_i a_i r_ji / Σ_i a_i, pose_j = Σ_i a_i r_ji û_ji / Σ_i a_i r_ji

    Args:
      votes: û [..., j, i, d], as in `routing`.
      activations: a [..., i] of the input capsules, from 0 to 1.
      logits: [..., j, i], such as a linear function of each input capsule.

    Returns:
      `Capsules`: poses [..., j, d] in the dtype of the votes and activations [..., j] in float32;
      both are 0 where all input capsules are inactive.

    Raises:
      ValueError: if a shape does not fit.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> votes, activations = jnp.ones((2, 10, 144, 16)), jnp.full((2, 144), 0.5)
      >>> capsules = capsjax.self_routing(votes, activations, jnp.zeros((2, 10, 144)))
      >>> capsules.poses.shape, round(float(capsules.activations[0, 0]), 4)
      ((2, 10, 16), 0.1)

    References:
      Hahn, Pyeon, Kim, "Self-Routing Capsule Networks", 2019; coder3000/SR-CapsNet.
    """
    votes = as_votes("self_routing", votes)
    a = as_activations("self_routing", activations, votes)
    if jnp.shape(logits) != votes.shape[:-1]:
        raise ValueError(
            f"self_routing: expected logits [..., j, i] = {list(votes.shape[:-1])}, "
            f"got {[*jnp.shape(logits)]}"
        )
    shares = a[..., None, :] * jax.nn.softmax(at_least_float32(jnp.asarray(logits)), -2)
    total = jnp.sum(shares, -1)
    poses = votes.weighted_sum(shares) / (total[..., None] + _LEAST)
    activations = total / (jnp.sum(a, -1, keepdims=True) + _LEAST)
    return Capsules(poses.astype(votes.dtype), activations)
