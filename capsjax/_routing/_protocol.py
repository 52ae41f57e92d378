"""What a capsule layer asks of a routing."""

from typing import ClassVar, Protocol

import jax
from jax.typing import ArrayLike


class Routing(Protocol):
    """A routing as a value: a frozen dataclass whose fields are its hyper-parameters.

    Being frozen gives it equality and a hash, so that a network which holds it is compiled once.
    `initial_bias` lets the layer own one array that training adapts, of any shape.
    A saved network stores `name` and the fields, which JSON must hold; a process that loads it
    finds the class in `capsjax.ROUTINGS[name]`. `--routings` sets the field `iterations`, if any.
    A method `couplings`, if any, takes the arguments of `__call__` and returns c [..., j, i] for
    `capsjax.diagnostics`, which regards the first iteration as the layer without routing.

    Example:
      >>> import dataclasses
      >>> from typing import ClassVar
      >>> from flax import nnx
      >>> import jax.numpy as jnp, capsjax
      >>> @dataclasses.dataclass(frozen=True)
      ... class MeanRouting:
      ...     name: ClassVar[str] = "mean"
      ...
      ...     def initial_bias(self, j, i, d):
      ...         return None
      ...
      ...     def __call__(self, u, weight, bias=None):
      ...         return capsjax.squash(capsjax.DenseVotes(u, weight).weighted_sum() / u.shape[-2])
      >>> layer = capsjax.nn.DenseCaps(1152, 8, 10, 16, MeanRouting(), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 1152, 8))).shape
      (2, 10, 16)
    """

    name: ClassVar[str]

    def initial_bias(self, j: int, i: int, d: int) -> jax.Array | None:
        """Returns the bias with which the layer begins; None for no bias."""

    def __call__(self, u: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None) -> jax.Array:
        """Routes input capsules [..., i, k] by W [j, i, d, k] to output capsules [..., j, d]."""
