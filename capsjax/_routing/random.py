"""Random routing: couplings are drawn once, whatever is seen. Any other routing must beat it."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from capsjax._routing._dense_votes import DenseVotes
from capsjax._routing._votes import Votes, as_bias, as_votes
from capsjax._vectors import squash


def random_routing(
    key: jax.Array, votes: ArrayLike | Votes, *, bias: ArrayLike | None = None
) -> jax.Array:
    """Routes with random couplings, the same for every example.

    b_ji ~ N(0, 1), c = softmax_j(b), v_j = squash(Σ_i c_ji û_ji)

    Args:
      key: draws the logits b [j, i].
      votes: û [..., j, i, d], as in `routing`.
      bias: [j, d], added to the sum.

    Returns:
      v: output capsules [..., j, d] in the dtype of the votes.

    Raises:
      ValueError: if a shape does not fit.

    Example:
      >>> import jax, jax.numpy as jnp, capsjax
      >>> capsjax.random_routing(jax.random.key(0), jnp.ones((128, 10, 1152, 16))).shape
      (128, 10, 16)

    References:
      The control of Paik, Kwak, Kim, "Capsule Networks Need an Improved Routing Algorithm", 2019,
      arXiv:1907.13327; the distribution of b is ours.
    """
    votes = as_votes("random_routing", votes)
    *lead, j, i, d = votes.shape
    s = votes.weighted_sum(_draw_couplings(key, (*lead, j, i)))
    bias = as_bias("random_routing", bias, "[j, d]", (j, d), len(lead) + 2)
    return squash(s + bias).astype(votes.dtype)


def _draw_couplings(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws couplings [j, i] for all leading axes of a shape [..., j, i]."""
    return jnp.broadcast_to(jax.nn.softmax(jax.random.normal(key, shape[-2:]), 0), shape)


@dataclasses.dataclass(frozen=True)
class Random:
    """Random routing as a value that a capsule layer takes.

    Args:
      seed: of the couplings, which training does not change; an int from 0 to 2^32 − 1.

    Raises:
      ValueError: if `seed` is out of range.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, capsjax
      >>> layer = capsjax.nn.DenseCaps(1152, 8, 10, 16, capsjax.Random(seed=1), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 1152, 8))).shape
      (2, 10, 16)

    References:
      As `capsjax.random_routing`.
    """

    name: ClassVar[str] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:  # as many as keys
            raise ValueError(f"Random: seed is an int from 0 to 2^32 - 1, got {self.seed!r}")

    def initial_bias(self, j: int, i: int, d: int) -> None:
        """Returns None: there is no bias."""

    def __call__(self, u: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None) -> jax.Array:
        """Routes [..., i, k] by W [j, i, d, k] to [..., j, d]."""
        return random_routing(self._key, DenseVotes(u, weight), bias=bias)

    def couplings(
        self, u: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None
    ) -> jax.Array:
        """Returns the couplings c [..., j, i], the same along all leading axes."""
        shape = (*jnp.shape(u)[:-2], *jnp.shape(weight)[:2])
        return _draw_couplings(self._key, shape)

    @property
    def _key(self) -> jax.Array:
        # A saved network finds its couplings again, whichever generator JAX is set to.
        return jax.random.key(self.seed, impl="threefry2x32")
