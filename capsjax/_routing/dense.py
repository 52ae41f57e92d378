"""Routing by agreement without the votes: the capsule layer as matrix products.

Letters: b all examples, j output capsule, i input capsule, d output and k input dimension.
"""

import functools
import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from capsjax._routing._votes import (
    broadcast_bias,
    check_capsule_layer,
    check_iterations,
    check_votes_and_bias,
)
from capsjax._vectors import float_dtype, squash

# The most numbers an example that all classes may hold at once; MNIST has 92,160.
_MAX_NUMBERS_AT_ONCE = 2**17


def dense_capsules(
    u: ArrayLike,
    weight: ArrayLike,
    routings: int = 3,
    *,
    bias: ArrayLike | None = None,
    stop_gradient: bool = True,
) -> jax.Array:
    """Computes `routing(predictions(u, weight))`, the whole capsule layer, without making û.

    s_jd = Σ_ik (c_ji u_ik) W_jidk,   û_ji · v_j = Σ_k u_ik (Σ_d W_jidk v_jd)

    Both sums are matrix products, with k in place of the d numbers that û has for each i and j.

    Args:
      u: input capsules [..., i, k], of any float dtype; sums run in float32.
      weight: W [j, i, d, k].
      routings: as in `routing`.
      bias: [j, d], as in `routing`.
      stop_gradient: as in `routing`.

    Returns:
      v: output capsules [..., j, d] in the dtype of `u`.

    Raises:
      ValueError: under the same conditions as `predictions` and `routing`.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> u, weight = jnp.ones((128, 1152, 8)), jnp.ones((10, 1152, 16, 8))
      >>> capsjax.dense_capsules(u, weight, routings=3).shape
      (128, 10, 16)

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, eq. 2 and procedure 1.
    """
    u, weight = jnp.asarray(u), jnp.asarray(weight)
    check_capsule_layer("dense_capsules", u, weight)
    j, i, d, k = weight.shape
    check_iterations(routings)
    check_votes_and_bias(jax.ShapeDtypeStruct((j, i, d), u.dtype), bias)
    lead, dtype = u.shape[:-2], float_dtype(u)
    # i last: the sums over k then run along whole rows, which a CPU vectorises.
    rows = u.astype(dtype).swapaxes(-1, -2).reshape(math.prod(lead), k, i)
    matrices = weight.astype(dtype).transpose(0, 2, 3, 1)
    inputs = rows, matrices, broadcast_bias(bias, (1, j, d))

    b = jnp.zeros((rows.shape[0], j, i))
    for iteration in range(routings):
        last = iteration == routings - 1
        x, w, beta = inputs if last or not stop_gradient else lax.stop_gradient(inputs)
        # softmax(0) is 1/J: a plain sum, without weights, is a third of the work.
        s = _sum_uniformly(x, w) if iteration == 0 else _sum_weighted(jax.nn.softmax(b, -2), x, w)
        v = squash(s + beta)
        if not last:
            b += _measure_agreement(v, x, w)
    return v.reshape(*lead, j, d).astype(dtype)


def _sum_uniformly(rows: jax.Array, matrices: jax.Array) -> jax.Array:
    """Returns s [b, j, d] for couplings of 1/J; rows are [b, k, i], matrices [j, d, k, i]."""
    return _dot(rows, matrices, ((1, 2), (2, 3))) / len(matrices)


def _sum_weighted(couplings: jax.Array, rows: jax.Array, matrices: jax.Array) -> jax.Array:
    """Returns s [b, j, d] for couplings [b, j, i]."""

    def sum_of_class(c: jax.Array, w: jax.Array) -> jax.Array:  # c [b, i], w [d, k, i] -> s [b, d]
        weighted = (c[:, None, :] * rows).astype(rows.dtype)
        return _dot(weighted, w, ((1, 2), (1, 2)))

    return _map_classes(rows, matrices)(sum_of_class)(couplings, matrices)


def _measure_agreement(v: jax.Array, rows: jax.Array, matrices: jax.Array) -> jax.Array:
    """Returns û · v [b, j, i] for output capsules v [b, j, d]."""

    def agreement_of_class(v: jax.Array, w: jax.Array) -> jax.Array:  # v [b, d] -> û·v [b, i]
        # [b, k, i], rounded, since an accelerator writes them to memory for all classes.
        values = _dot(v.astype(rows.dtype), w, ((1,), (0,))).astype(rows.dtype)
        # Written out, since XLA's sum over an inner axis takes ten times as long on a CPU.
        terms = (values[:, n].astype(jnp.float32) * rows[:, n] for n in range(rows.shape[1]))
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


def _dot(x: jax.Array, w: jax.Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """Sums over some axes of x and of w, in float32."""
    return lax.dot_general(x, w, (axes, ((), ())), preferred_element_type=jnp.float32)
