"""The whole capsule layer, by any routing, without making the votes."""

from collections.abc import Callable
from typing import Any

import jax
from jax.typing import ArrayLike

from capsjax._routing import agreement
from capsjax._routing._dense_votes import DenseVotes


def dense_capsules(
    u: ArrayLike, weight: ArrayLike, routing: Callable = agreement.routing, **options: Any
) -> jax.Array:
    """Computes `routing(predictions(u, weight))`, the whole capsule layer, without making û.

    v = routing(û),   û_ji = W_ji u_i

    Args:
      u: input capsules [..., i, k], of any float dtype; sums run in float32.
      weight: W [j, i, d, k].
      routing: a function of votes, such as `capsjax.routing` or `capsjax.self_attention_routing`.
      **options: of the routing.

    Returns:
      v: output capsules [..., j, d] in the dtype of `u`.

    Raises:
      ValueError: under the same conditions as `predictions` and the routing.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> u, weight = jnp.ones((128, 1152, 8)), jnp.ones((10, 1152, 16, 8))
      >>> capsjax.dense_capsules(u, weight, routings=3).shape
      (128, 10, 16)
      >>> capsjax.dense_capsules(u, weight, capsjax.self_attention_routing).shape
      (128, 10, 16)

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, eq. 2 and procedure 1.
    """
    if not callable(routing):
        raise ValueError(
            "dense_capsules: routing is a function of votes; its options have names, such as "
            f"routings=3; got {routing!r}"
        )
    return routing(DenseVotes(u, weight), **options)
