"""How input capsules share themselves out among the output capsules that compete for them."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from capsjax._routing._tiles import from_tiles, to_tiles

# Log-sums [..., i] of the output capsules at each position -> of those at all positions.
OverWindows = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Competition:
    """The softmax over all output capsules that an input capsule votes for.

    Args:
      lead: the leading axes of the votes.
      over_windows: as in `capsjax.em_routing`.
    """

    lead: Sequence[int]
    over_windows: OverWindows | None

    def begin(self, j: int, i: int) -> jax.Array:
        """Returns R [j, i, b] = 1 / (number of output capsules that i votes for)."""
        # Equal for all examples, so computed for the last two leading axes, the positions, alone.
        logs = self._add_up(jnp.full((*self.lead[-2:], i), math.log(j)))
        shares = to_tiles(jnp.broadcast_to(jnp.exp(-logs), (*self.lead, i)), 1)
        return jnp.repeat(shares[:, None], j, 1)

    def share(self, scores: jax.Array) -> jax.Array:
        """Returns R = e^scores / Σ e^scores for scores [j, i, b]."""
        logs = from_tiles(jax.nn.logsumexp(scores, 1), self.lead)
        return jnp.exp(scores - to_tiles(self._add_up(logs), 1)[:, None])

    def _add_up(self, logs: jax.Array) -> jax.Array:
        return logs if self.over_windows is None else self.over_windows(logs)
