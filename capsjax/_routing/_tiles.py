"""The examples of a routing in tiles, so small that on a CPU the votes of one stay in the cache.

A tile t is one row of positions, or whatever the last leading axis but one counts; its examples b
are all other leading axes in one. They come last, so that a CPU works on whole rows of them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax


def to_tiles(x: jax.Array, ndim: int) -> jax.Array:
    """Returns [..., *rest] as [t, *rest, b], where the rest has `ndim` axes."""
    lead, rest = x.shape[: x.ndim - ndim], x.shape[x.ndim - ndim :]
    outer, tiles, last = _split(lead)
    x = x.reshape(outer, tiles, last, *rest)
    x = x.transpose(1, *range(3, x.ndim), 0, 2)
    return x.reshape(tiles, *rest, outer * last)


def from_tiles(x: jax.Array, lead: Sequence[int]) -> jax.Array:
    """Returns [t, *rest, b] as [*lead, *rest]."""
    outer, tiles, last = _split(lead)
    rest = x.shape[1:-1]
    x = x.reshape(tiles, *rest, outer, last)
    x = x.transpose(x.ndim - 2, 0, x.ndim - 1, *range(1, x.ndim - 2))
    return x.reshape(*lead, *rest)


def map_tiles(function: Callable, *arrays: jax.Array) -> Any:
    """Maps a function over the tiles of arrays [t, ...]: in turn on a CPU, elsewhere together."""
    in_turn = lambda *arrays: lax.map(lambda tile: function(*tile), arrays)  # noqa: E731
    return lax.platform_dependent(*arrays, cpu=in_turn, default=jax.vmap(function))


def map_made_votes(
    make: Callable, weight: jax.Array, inputs: jax.Array, function: Callable, *arrays: jax.Array
) -> Any:
    """Makes the votes of one output capsule after the other, and applies a function to each.

    Only the votes of one are ever in memory; the gradient computes them anew.

    Args:
      make: of a weight and the inputs of a tile; returns votes [i, d, b].
      weight: [j, ...].
      inputs: [..., i, k], of all examples.
      function: of votes and an element of each array.
      *arrays: [t, j, ...].

    Returns:
      Its results, stacked along two first axes t and j.
    """

    def of_tile(inputs: jax.Array, *tile: jax.Array) -> Any:
        @jax.checkpoint
        def of_output(weight: jax.Array, *elements: jax.Array) -> Any:
            return function(make(weight, inputs), *elements)

        return lax.map(lambda elements: of_output(*elements), (weight, *tile))

    return map_tiles(of_tile, to_tiles(inputs, 2), *arrays)


def _split(lead: Sequence[int]) -> tuple[int, int, int]:
    """Splits leading axes into those before the tiles, the tiles, and the one after them."""
    *outer, tiles, last = (1, 1, *lead)
    return math.prod(outer), tiles, last
