"""Votes of pose matrices, made for one output capsule after the other.

Letters: j output capsule, i input capsule, d numbers of a pose; t and b as in `_tiles.py`.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from capsjax._routing._tiles import from_tiles, map_made_votes, to_tiles
from capsjax._vectors import at_least_float32, float_dtype


@jax.tree_util.register_pytree_node_class
class MatrixVotes:
    """The votes of capsules whose poses are square matrices, of which only some are ever made.

    V_ji = M_i W_ji

    A pose is the vector of a matrix, column by column: of a 4×4 matrix, the last four numbers are
    its right-hand column. The votes of an output capsule are made when it is its turn, and anew for
    the gradient; `jnp.asarray` makes all of them.

    Args:
      poses: M [..., i, d], where d is a square number; of any float dtype, computed in float32.
      weight: W [j, i, √d, √d].
      offset: [i, d], is added to the votes; None: 0.

    Raises:
      ValueError: if the shapes do not fit each other.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> votes = capsjax.MatrixVotes(jnp.ones((128, 144, 16)), jnp.ones((10, 144, 4, 4)))
      >>> votes.shape, votes.weighted_sum().shape
      ((128, 10, 144, 16), (128, 10, 16))

    References:
      Hinton, Sabour, Frosst, "Matrix capsules with EM routing", 2018, §2.
    """

    def __init__(self, poses: ArrayLike, weight: ArrayLike, offset: ArrayLike | None = None):
        self.poses, self.weight = jnp.asarray(poses), jnp.asarray(weight)
        self.offset = None if offset is None else jnp.asarray(offset)
        self._check()

    def _check(self) -> None:
        i, d = (0, *self.poses.shape)[-2:]
        side = math.isqrt(d)
        if self.poses.ndim < 2 or side * side != d:
            raise ValueError(
                "MatrixVotes: expected poses [..., i, d], d being a square number, got "
                f"{list(self.poses.shape)}"
            )
        if self.weight.ndim != 4 or self.weight.shape[1:] != (i, side, side):
            raise ValueError(
                f"MatrixVotes: expected weight [j, i, √d, √d] = [j, {i}, {side}, {side}] for poses "
                f"{list(self.poses.shape)}, got {list(self.weight.shape)}"
            )
        if self.offset is not None and self.offset.shape != (i, d):
            raise ValueError(
                f"MatrixVotes: expected offset [i, d] = [{i}, {d}], got {list(self.offset.shape)}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., j, i, d]."""
        return (*self.poses.shape[:-2], self.weight.shape[0], *self.poses.shape[-2:])

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the poses."""
        return float_dtype(self.poses)

    def weighted_sum(self, couplings: jax.Array | None = None) -> jax.Array:
        """Returns s_j = Σ_i c_ji V_ji, [..., j, d], for couplings [..., j, i]; None: all are 1."""
        if couplings is None:
            couplings = jnp.ones(self.shape[:-1])
        s = self.map_outputs(
            lambda votes, c: jnp.sum(c[:, None] * votes, 0), to_tiles(couplings, 2)
        )
        return from_tiles(s, self.poses.shape[:-2])

    def agreement(self, vectors: jax.Array) -> jax.Array:
        """Returns V_ji · v_j, [..., j, i], for vectors [..., j, d]."""
        agreement = self.map_outputs(
            lambda votes, v: jnp.sum(votes * v[None], 1), to_tiles(vectors, 2)
        )
        return from_tiles(agreement, self.poses.shape[:-2])

    def map_outputs(self, function: Callable, *arrays: jax.Array) -> Any:
        """Applies a function to the votes of one output capsule after the other, tile by tile.

        function(votes [i, d, b] in float32, *an element of each array [t, j, ...])

        Only the votes of one are ever in memory; the gradient computes them anew. Returns its
        results, stacked along two first axes t and j.
        """
        weight, poses = at_least_float32(self.weight), at_least_float32(self.poses)
        return map_made_votes(self._make, weight, poses, function, *arrays)

    def _make(self, weight: jax.Array, poses: jax.Array) -> jax.Array:
        """Makes the votes [i, d, b] of one output capsule for the poses [i, d, b] of a tile."""
        # Columns of M W are the columns of M, weighted by a column of W.
        columns = poses.reshape(len(poses), weight.shape[-1], -1)  # [i, column, row and example]
        votes = _multiply(weight, columns).reshape(poses.shape)
        # On a CPU the sums that follow, and both products of the gradient, are slow if XLA makes
        # their operands within them.
        votes = lax.optimization_barrier(votes)
        return votes if self.offset is None else votes + at_least_float32(self.offset)[..., None]

    def __jax_array__(self) -> jax.Array:
        return from_tiles(self.map_outputs(lambda votes: votes), self.poses.shape[:-2])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.__jax_array__(), dtype)

    def tree_flatten(self) -> tuple[tuple[jax.Array, jax.Array, jax.Array | None], None]:
        """Returns the arrays."""
        return (self.poses, self.weight, self.offset), None

    @classmethod
    def tree_unflatten(cls, _: None, arrays: tuple[Any, Any, Any]) -> "MatrixVotes":
        """Returns the votes of arrays, or of whatever else a transformation puts in their place."""
        votes = object.__new__(cls)
        votes.poses, votes.weight, votes.offset = arrays
        return votes


@jax.custom_vjp
def _multiply(weight: jax.Array, columns: jax.Array) -> jax.Array:
    """Returns the matrix products [i, c, x] of weight [i, m, c] and columns [i, m, x]."""
    # Written out, since XLA's products of small matrices take three times as long on a CPU.
    terms = (weight[:, m, :, None] * columns[:, m, None] for m in range(weight.shape[1]))
    return functools.reduce(operator.add, terms)


def _multiply_fwd(weight, columns):
    return _multiply(weight, columns), (weight, columns)


def _multiply_bwd(residuals, gradient):
    weight, columns = residuals
    g_weight = jnp.einsum("imx,icx->imc", columns, gradient)
    return g_weight, jnp.einsum("imc,icx->imx", weight, gradient)


_multiply.defvjp(_multiply_fwd, _multiply_bwd)
