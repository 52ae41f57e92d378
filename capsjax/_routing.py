"""Predictions, and routing by agreement.

Letters: `...` leading axes, j output capsule, i input capsule, d output and k input dimension.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from capsjax._vectors import at_least_float32, float_dtype, squash

# Numbers an example that the capsule layer may hold at once: MNIST has 92,160.
_TOGETHER = 2**17


class RoutingState(NamedTuple):
    """What routing by agreement ends with."""

    logits: jax.Array  # b [..., j, i]: how well each prediction agreed, before the softmax
    couplings: jax.Array  # c [..., j, i]: softmax of b over j; the shares of each input capsule
    capsules: jax.Array  # v [..., j, d]: the output capsules


def predictions(u: ArrayLike, weight: ArrayLike) -> jax.Array:
    """What each input capsule predicts of each output capsule (eq. 2).

    û_ji = W_ji u_i

    Args:
      u: input capsules [..., i, k], of any float dtype.
      weight: W [j, i, d, k].

    Returns:
      û: [..., j, i, d] in the dtype of `u`; sums run in float32.

    Raises:
      ValueError: if the shapes do not fit each other.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> capsjax.predictions(jnp.ones((128, 1152, 8)), jnp.ones((10, 1152, 16, 8))).shape
      (128, 10, 1152, 16)

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, eq. 2.
    """
    u, weight = jnp.asarray(u), jnp.asarray(weight)
    check_capsule_layer("predictions", u, weight)
    u_hat = jnp.einsum("...ik,jidk->...jid", u, weight, preferred_element_type=jnp.float32)
    return u_hat.astype(float_dtype(u))


def routing(
    u_hat: ArrayLike,
    routings: int = 3,
    *,
    bias: ArrayLike | None = None,
    stop_gradient: bool = True,
) -> jax.Array:
    """Routing by agreement (procedure 1): each output capsule from the predictions of all inputs.

    b = 0; repeat: c = softmax_j(b), s_j = Σ_i c_ji û_ji, v_j = squash(s_j), b_ji += û_ji · v_j

    Args:
      u_hat: predictions û [..., j, i, d], of any float dtype; sums run in float32.
      routings: the number of iterations, a Python int of 1 or more. With 1 all couplings are 1/J.
      bias: [j, d], added to s in every iteration, as in the authors' released code.
      stop_gradient: lets the gradient flow through the last iteration only, as if the couplings
        were constants. False: through every iteration, as the authors' released code has it.

    Returns:
      v: output capsules [..., j, d] in the dtype of `u_hat`.

    Raises:
      ValueError: if a shape does not fit or `routings` is not an int of 1 or more.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> capsjax.routing(jnp.ones((128, 10, 1152, 16)), routings=3).shape
      (128, 10, 16)

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, procedure 1; the stopped gradient:
      XifengGuo/CapsNet-Pytorch; the bias: Sarasra/models, research/capsules.
    """
    return routing_state(u_hat, routings, bias=bias, stop_gradient=stop_gradient).capsules


def routing_state(
    u_hat: ArrayLike,
    routings: int = 3,
    *,
    bias: ArrayLike | None = None,
    stop_gradient: bool = True,
) -> RoutingState:
    """The same as `routing`, with the logits and the couplings of the last iteration.

    c = softmax_j(b), Σ_j c_ji = 1

    Args:
      u_hat: predictions û [..., j, i, d].
      routings: as in `routing`.
      bias: as in `routing`.
      stop_gradient: as in `routing`.

    Returns:
      `RoutingState`: logits b [..., j, i] and couplings c [..., j, i] in float32, capsules v
      [..., j, d] in the dtype of `u_hat`.

    Raises:
      ValueError: as `routing`.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> state = capsjax.routing_state(jnp.ones((10, 1152, 16)))
      >>> state.couplings.shape, round(float(state.couplings[:, 0].sum()), 4)
      ((10, 1152), 1.0)

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, procedure 1.
    """
    u_hat = jnp.asarray(u_hat)
    _check_routing(u_hat, routings, bias)

    def plain_sum(u_hat: jax.Array) -> jax.Array:
        return jnp.sum(u_hat, -2)  # [..., j, d]

    def weighted_sum(couplings: jax.Array, u_hat: jax.Array) -> jax.Array:
        return jnp.sum(couplings[..., None] * u_hat, -2)  # s [..., j, d]

    def agreement(v: jax.Array, u_hat: jax.Array) -> jax.Array:
        return jnp.sum(u_hat * v[..., None, :], -1)  # û·v [..., j, i]

    state = _route(
        plain_sum,
        weighted_sum,
        agreement,
        at_least_float32(u_hat),
        u_hat.shape[:-1],
        _lift(bias, (*(1,) * (u_hat.ndim - 3), u_hat.shape[-3], u_hat.shape[-1])),
        routings=routings,
        stop_gradient=stop_gradient,
    )
    return state._replace(capsules=state.capsules.astype(float_dtype(u_hat)))


def dense_capsules(
    u: ArrayLike,
    weight: ArrayLike,
    routings: int = 3,
    *,
    bias: ArrayLike | None = None,
    stop_gradient: bool = True,
) -> jax.Array:
    """The capsule layer as one function: `routing(predictions(u, weight))`, but û is never made.

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
      ValueError: as `predictions` and `routing`.

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
    _check_routing(jax.ShapeDtypeStruct((j, i, d), u.dtype), routings, bias)
    lead, dtype = u.shape[:-2], float_dtype(u)
    # i last: the sums over k then run along whole rows, which a CPU does many at a time.
    rows = u.astype(dtype).swapaxes(-1, -2).reshape(math.prod(lead), k, i)  # [b, k, i]
    maps = weight.astype(dtype).transpose(0, 2, 3, 1).reshape(j, d, k * i)
    over_classes = _as_the_platform_likes if j * i * k <= _TOGETHER else _one_by_one

    def plain_sum(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, maps = inputs
        sums = _dot(rows.reshape(-1, k * i), maps.reshape(j * d, k * i), 1)
        return sums.reshape(-1, j, d)

    def weighted_sum(couplings: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, maps = inputs

        def one(c: jax.Array, w: jax.Array) -> jax.Array:  # c [b, i], w [d, k·i] -> s [b, d]
            weighted = (c[:, None, :] * rows).astype(dtype)
            return _dot(weighted.reshape(-1, k * i), w, 1)

        return over_classes(jax.checkpoint(one))(couplings, maps)

    def agreement(v: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, maps = inputs

        def one(v: jax.Array, w: jax.Array) -> jax.Array:  # v [b, d], w [d, k·i] -> û·v [b, i]
            values = _dot(v.astype(dtype), w, 0).reshape(-1, k, i)
            # Written out, for XLA's sum over an inner axis takes ten times as long on a CPU.
            return sum((values[:, n] * rows[:, n] for n in range(1, k)), values[:, 0] * rows[:, 0])

        return over_classes(jax.checkpoint(one))(v, maps)

    state = _route(
        plain_sum,
        weighted_sum,
        agreement,
        (rows, maps),
        (rows.shape[0], j, i),
        _lift(bias, (1, j, d)),
        routings=routings,
        stop_gradient=stop_gradient,
    )
    return state.capsules.reshape(*lead, j, d).astype(dtype)


def _route(
    plain_sum: Callable[[Any], jax.Array],
    weighted_sum: Callable[[jax.Array, Any], jax.Array],
    agreement: Callable[[jax.Array, Any], jax.Array],
    inputs: Any,
    shape: tuple[int, ...],
    bias: jax.Array,
    *,
    routings: int,
    stop_gradient: bool,
) -> RoutingState:
    """Procedure 1, whatever it is that the couplings of `shape` [..., j, i] weigh."""
    inner, inner_bias = lax.stop_gradient((inputs, bias)) if stop_gradient else (inputs, bias)
    logits, couplings = jnp.zeros(shape), jnp.full(shape, 1 / shape[-2])
    # The first couplings are all the same: a sum without weights is a third of the work.
    s = plain_sum(inner if routings > 1 else inputs) / shape[-2]
    for iteration in range(2, routings + 1):
        v = squash(s + inner_bias)
        logits += agreement(v, inner)
        couplings = jax.nn.softmax(logits, -2)
        s = weighted_sum(couplings, inner if iteration < routings else inputs)
    return RoutingState(logits, couplings, squash(s + bias))


def _lift(bias: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array:
    """A bias [j, d] with axes of size 1 to match the sums that it is added to; None is 0."""
    return jnp.zeros(()) if bias is None else at_least_float32(jnp.asarray(bias)).reshape(shape)


def _dot(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    """Sums over the last axis of x and one of w, in float32."""
    return lax.dot_general(x, w, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def _as_the_platform_likes(function: Callable) -> Callable:
    """Makes a function of one class, [b, n] and w -> [b, m], one of all: [b, j, n], W -> [b, j, m].

    On a CPU one by one, for what a class needs stays in its cache; elsewhere all at once.
    """
    cpu, default = _one_by_one(function), _at_once(function)
    return lambda x, w: lax.platform_dependent(x, w, cpu=cpu, default=default)


def _at_once(function: Callable) -> Callable:
    return jax.vmap(function, (1, 0), 1)


def _one_by_one(function: Callable) -> Callable:
    """With the memory of one class."""

    def over_classes(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.map(lambda one: function(*one), (x.swapaxes(0, 1), w)).swapaxes(0, 1)

    return over_classes


def check_capsule_layer(function: str, u: jax.Array, weight: jax.Array) -> None:
    """Raises ValueError unless u is [..., i, k] and weight [j, i, d, k]."""
    if weight.ndim != 4:
        raise ValueError(f"{function}: expected weight [j, i, d, k], got {list(weight.shape)}")
    _, i, _, k = weight.shape
    if u.shape[-2:] != (i, k):
        raise ValueError(
            f"{function}: expected input capsules [..., i, k] = [..., {i}, {k}] for a weight of "
            f"shape {list(weight.shape)}, got {list(u.shape)}"
        )


def check_routings(routings: int) -> None:
    """Raises ValueError unless routings is an int of 1 or more."""
    if not isinstance(routings, int) or isinstance(routings, bool) or routings < 1:
        raise ValueError(f"routing: routings is an int of 1 or more, got {routings!r}")


def _check_routing(u_hat: Any, routings: int, bias: ArrayLike | None) -> None:
    check_routings(routings)
    if u_hat.ndim < 3 or not u_hat.shape[-3]:
        raise ValueError(f"routing: expected predictions [..., j, i, d], got {list(u_hat.shape)}")
    j, _, d = u_hat.shape[-3:]
    if bias is not None and jnp.shape(bias) != (j, d):
        raise ValueError(f"routing: expected a bias [j, d] = [{j}, {d}], got {[*jnp.shape(bias)]}")
