"""Self-attention routing: in one pass, votes attend to their sum (Efficient-CapsNet)."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from capsjax._routing._dense_votes import DenseVotes
from capsjax._routing._votes import Votes, as_bias, as_votes
from capsjax._vectors import squash_exp


def self_attention_routing(votes: ArrayLike | Votes, *, bias: ArrayLike | None = None) -> jax.Array:
    """Routes in one pass: a vote counts by how well it agrees with the sum of all votes.

    S_j = Σ_i û_ji, c = softmax_j(û · S / √d), v_j = squash_exp(Σ_i (c_ji + B_ji) û_ji)

    The gradient flows through all of it. With B the couplings may be negative, and their sum over j
    is not 1.

    Args:
      votes: û [..., j, i, d], as in `routing`.
      bias: B [j, i], added to the couplings after the softmax.

    Returns:
      v: output capsules [..., j, d] in the dtype of the votes.

    Raises:
      ValueError: if a shape does not fit.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> capsjax.self_attention_routing(jnp.ones((128, 10, 16, 16))).shape
      (128, 10, 16)

    References:
      Mazzia, Salvetti, Chiaberge, "Efficient-CapsNet: Capsule Network with Self-Attention Routing",
      2021, arXiv:2101.12491; EscVM/Efficient-CapsNet.
    """
    votes = as_votes("self_attention_routing", votes)
    *lead, j, i, _ = votes.shape
    bias = as_bias("self_attention_routing", bias, "[j, i]", (j, i), len(lead) + 2)
    return squash_exp(votes.weighted_sum(_attend(votes) + bias)).astype(votes.dtype)


def _attend(votes: Votes) -> jax.Array:
    """Returns c = softmax_j(û · S / √d), [..., j, i]."""
    return jax.nn.softmax(votes.agreement(votes.weighted_sum()) / math.sqrt(votes.shape[-1]), -2)


@dataclasses.dataclass(frozen=True)
class SelfAttention:
    """Self-attention routing as a value that a capsule layer takes; the layer owns B, 0 at first.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, capsjax
      >>> layer = capsjax.nn.DenseCaps(16, 8, 10, 16, capsjax.SelfAttention(), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 16, 8))).shape, layer.bias.shape
      ((2, 10, 16), (10, 16))

    References:
      As `capsjax.self_attention_routing`.
    """

    name: ClassVar[str] = "self_attention"

    def initial_bias(self, j: int, i: int, d: int) -> jax.Array:
        """Returns 0 [j, i]."""
        return jnp.zeros((j, i), jnp.float32)

    def __call__(self, u: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None) -> jax.Array:
        """Routes [..., i, k] by W [j, i, d, k] to [..., j, d]."""
        return self_attention_routing(DenseVotes(u, weight), bias=bias)

    def couplings(
        self, u: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None
    ) -> jax.Array:
        """Returns the couplings c [..., j, i] without B, which may be negative."""
        return _attend(DenseVotes(u, weight))
