"""Uniform routing: all couplings are equal. Any other routing must beat it."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from capsjax._routing._dense_votes import DenseVotes
from capsjax._routing._votes import Votes, as_bias, as_votes
from capsjax._vectors import squash


def uniform_routing(votes: ArrayLike | Votes, *, bias: ArrayLike | None = None) -> jax.Array:
    """Routes with equal couplings, as routing by agreement does in a single iteration.

    v_j = squash(Σ_i û_ji / J)

    Args:
      votes: û [..., j, i, d], as in `routing`.
      bias: [j, d], added to the sum.

    Returns:
      v: output capsules [..., j, d] in the dtype of the votes.

    Raises:
      ValueError: if a shape does not fit.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> capsjax.uniform_routing(jnp.ones((128, 10, 1152, 16))).shape
      (128, 10, 16)

    References:
      The control of Paik, Kwak, Kim, "Capsule Networks Need an Improved Routing Algorithm", 2019,
      arXiv:1907.13327.
    """
    votes = as_votes("uniform_routing", votes)
    *lead, j, _, d = votes.shape
    bias = as_bias("uniform_routing", bias, "[j, d]", (j, d), len(lead) + 2)
    return squash(votes.weighted_sum() / j + bias).astype(votes.dtype)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Uniform routing as a value that a capsule layer takes.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, capsjax
      >>> layer = capsjax.nn.DenseCaps(1152, 8, 10, 16, capsjax.Uniform(), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 1152, 8))).shape
      (2, 10, 16)

    References:
      As `capsjax.uniform_routing`.
    """

    name: ClassVar[str] = "uniform"

    def initial_bias(self, j: int, i: int, d: int) -> None:
        """Returns None: there is no bias."""

    def __call__(self, u: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None) -> jax.Array:
        """Routes [..., i, k] by W [j, i, d, k] to [..., j, d]."""
        return uniform_routing(DenseVotes(u, weight), bias=bias)

    def couplings(
        self, u: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None
    ) -> jax.Array:
        """Returns 1/J [..., j, i]."""
        j, i = jnp.shape(weight)[:2]
        return jnp.full((*jnp.shape(u)[:-2], j, i), 1 / j, jnp.float32)
