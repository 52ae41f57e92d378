"""Votes that are never made: the capsule layer as matrix products.

Letters: b all examples, j output capsule, i input capsule, d output and k input dimension.
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

from capsjax._routing._tiles import map_made_votes
from capsjax._routing._votes import check_capsule_layer, predictions
from capsjax._vectors import float_dtype

# The most numbers of an example, over all classes, that may be in memory at once; MNIST has 92,160.
_MAX_NUMBERS_AT_ONCE = 2**17


@jax.tree_util.register_pytree_node_class
class DenseVotes:
    """The votes û = W u of a capsule layer, which a routing uses without making them.

    s_jd = Σ_ik (c_ji u_ik) W_jidk,   û_ji · v_j = Σ_k u_ik (Σ_d W_jidk v_jd)

    Both sums are matrix products, with k in place of the d numbers that û has for each i and j.
    `jnp.asarray` and `np.asarray` make û.

    Args:
      u: input capsules [..., i, k], of any float dtype; sums run in float32.
      weight: W [j, i, d, k].

    Raises:
      ValueError: if the shapes do not fit each other.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> votes = capsjax.DenseVotes(jnp.ones((128, 1152, 8)), jnp.ones((10, 1152, 16, 8)))
      >>> s = votes.weighted_sum()
      >>> votes.shape, s.shape, votes.agreement(s).shape
      ((128, 10, 1152, 16), (128, 10, 16), (128, 10, 1152))

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, eq. 2.
    """

    def __init__(self, u: ArrayLike, weight: ArrayLike):
        self.u, self.weight = jnp.asarray(u), jnp.asarray(weight)
        check_capsule_layer("DenseVotes", self.u, self.weight)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., j, i, d]."""
        return (*self.u.shape[:-2], *self.weight.shape[:3])

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of u."""
        return float_dtype(self.u)

    def weighted_sum(self, couplings: jax.Array | None = None) -> jax.Array:
        """Returns s_j = Σ_i c_ji û_ji, [..., j, d], for couplings [..., j, i]; None: all are 1."""
        rows, matrices = self._rows, self._matrices
        if couplings is None:  # a third of the work
            s = _sum_inputs(rows, matrices, ((1, 2), (2, 3)))
        else:
            s = _sum_weighted(_flatten(couplings, 2), rows, matrices)
        return s.reshape(*self.u.shape[:-2], *s.shape[1:])

    def agreement(self, vectors: jax.Array) -> jax.Array:
        """Returns û_ji · v_j, [..., j, i], for vectors [..., j, d]."""
        agreement = _measure_agreement(_flatten(vectors, 2), self._rows, self._matrices)
        return agreement.reshape(*self.u.shape[:-2], *agreement.shape[1:])

    def map_outputs(self, function: Callable, *arrays: jax.Array) -> Any:
        """Applies a function to the votes of one output capsule after the other, tile by tile.

        function(votes [i, d, b] in float32, *an element of each array [t, j, ...])

        Only the votes of one are ever in memory; the gradient computes them anew. Returns its
        results, stacked along two first axes t and j.
        """
        make = functools.partial(jnp.einsum, "idk,ikb->idb", preferred_element_type=jnp.float32)
        return map_made_votes(make, self.weight.astype(self.dtype), self.u, function, *arrays)

    def tree_flatten(self) -> tuple[tuple[jax.Array, jax.Array], None]:
        """Returns the arrays."""
        return (self.u, self.weight), None

    @classmethod
    def tree_unflatten(cls, _: None, arrays: tuple[jax.Array, jax.Array]) -> "DenseVotes":
        """Returns the votes of arrays, or of whatever else a transformation puts in their place."""
        votes = object.__new__(cls)
        votes.u, votes.weight = arrays
        return votes

    def __jax_array__(self) -> jax.Array:
        return predictions(self.u, self.weight)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(predictions(self.u, self.weight), dtype)

    @property
    def _rows(self) -> jax.Array:
        # [b, k, i]: the sums over k then run along whole rows, which a CPU vectorises.
        return _flatten(self.u.astype(self.dtype).swapaxes(-1, -2), 2)

    @property
    def _matrices(self) -> jax.Array:
        matrices = self.weight.astype(self.dtype).transpose(0, 2, 3, 1)  # [j, d, k, i]
        return _by_layout(self.dtype, _lay_out, lambda matrices: matrices)(matrices)


def _flatten(x: jax.Array, ndim: int) -> jax.Array:
    """Makes one axis of all but the last `ndim`."""
    return x.reshape(math.prod(x.shape[:-ndim]), *x.shape[-ndim:])


def _by_layout(dtype: jnp.dtype, laid_out: Callable, default: Callable) -> Callable:
    """Chooses a function: the first one where W has the layout of `_lay_out`, else the second.

    It has that on a GPU in 16 bits, where W is a copy, whose layout is free to choose.
    """
    if dtype.itemsize > 2:
        return default
    return lambda *arrays: lax.platform_dependent(*arrays, cuda=laid_out, default=default)


def _lay_out(matrices: jax.Array) -> jax.Array:
    """Has a GPU write the matrices [j, d, k, i] to memory once, k innermost as in u.

    So they suit all products, which then name i before k. Otherwise XLA would transpose them, or
    what a product returns, for almost every one.
    """
    j, d, k, i = matrices.shape
    rows = matrices.swapaxes(2, 3).reshape(j * d, i * k)
    return lax.optimization_barrier(rows).reshape(j, d, i, k).swapaxes(2, 3)


def _sum_weighted(couplings: jax.Array, rows: jax.Array, matrices: jax.Array) -> jax.Array:
    """Returns s [b, j, d] for couplings [b, j, i], rows [b, k, i] and matrices [j, d, k, i]."""

    def sum_of_class(c: jax.Array, w: jax.Array) -> jax.Array:  # c [b, i], w [d, k, i] -> s [b, d]
        weighted = c[:, None, :].astype(rows.dtype) * rows
        return _sum_inputs(weighted, w, ((1, 2), (1, 2)))

    return _map_classes(rows, matrices)(sum_of_class)(couplings, matrices)


def _measure_agreement(v: jax.Array, rows: jax.Array, matrices: jax.Array) -> jax.Array:
    """Returns û · v [b, j, i] for vectors v [b, j, d]."""

    def agreement_of_class(v: jax.Array, w: jax.Array) -> jax.Array:  # v [b, d] -> û·v [b, i]
        # [b, k, i], rounded, since an accelerator writes them to memory for all classes.
        values = _combine(v.astype(rows.dtype), w).astype(rows.dtype)
        # Written out, since XLA's sum over an inner axis takes ten times as long on a CPU.
        terms = ((values[:, n] * rows[:, n]).astype(jnp.float32) for n in range(rows.shape[1]))
        return functools.reduce(operator.add, terms)

    return _map_classes(rows, matrices)(agreement_of_class)(v, matrices)


def _map_classes(rows: jax.Array, matrices: jax.Array) -> Callable[[Callable], Callable]:
    """Chooses how a function of one class is applied to all: by size, then by platform."""
    numbers = matrices.shape[0] * math.prod(rows.shape[1:])
    return _map_by_platform if numbers <= _MAX_NUMBERS_AT_ONCE else _map_in_turn


def _map_by_platform(function: Callable) -> Callable:
    """Maps a function of one class, [b, n] and w -> [b, m], to all: [b, j, n] and W -> [b, j, m].

    On a CPU the classes take turns, so that one class's numbers stay in the cache; on other
    platforms they are computed together.
    """
    cpu, default = _map_in_turn(function), _map_together(function)
    return lambda x, w: lax.platform_dependent(x, w, cpu=cpu, default=default)


def _map_together(function: Callable) -> Callable:
    return jax.vmap(function, (1, 0), 1)


def _map_in_turn(function: Callable) -> Callable:
    """Maps with the memory of a single class; the gradient computes each class anew."""
    of_class = jax.checkpoint(function)

    def over_classes(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.map(lambda pair: of_class(*pair), (x.swapaxes(0, 1), w)).swapaxes(0, 1)

    return over_classes


def _sum_inputs(
    x: jax.Array, w: jax.Array, axes: tuple[tuple[int, int], tuple[int, int]]
) -> jax.Array:
    """Sums over the axes k and i of x and of w."""
    (k, i), (w_k, w_i) = axes

    def sum_laid_out(x: jax.Array, w: jax.Array) -> jax.Array:
        return _dot(x.swapaxes(k, i), w.swapaxes(w_k, w_i), axes)

    return _by_layout(w.dtype, sum_laid_out, lambda x, w: _dot(x, w, axes))(x, w)


def _combine(v: jax.Array, w: jax.Array) -> jax.Array:
    """Returns Σ_d v_d w_dki, [b, k, i], for v [b, d] and w [d, k, i]."""
    axes = (1,), (0,)

    def combine_laid_out(v: jax.Array, w: jax.Array) -> jax.Array:
        return _dot(v, w.swapaxes(1, 2), axes).swapaxes(1, 2)

    return _by_layout(w.dtype, combine_laid_out, lambda v, w: _dot(v, w, axes))(v, w)


def _dot(x: jax.Array, w: jax.Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """Sums over some axes of x and of w, in float32."""
    return lax.dot_general(x, w, (axes, ((), ())), preferred_element_type=jnp.float32)
