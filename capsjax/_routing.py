"""Predictions, and routing by agreement.

Letters: `...` leading axes, j output capsule, i input capsule, d output and k input dimension.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from capsjax._vectors import at_least_float32, float_dtype, squash


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
    bias = jnp.float32(0) if bias is None else jnp.asarray(bias)
    _check_routing(u_hat, routings, bias)
    u = at_least_float32(u_hat)
    bias = jnp.broadcast_to(at_least_float32(bias), (*u.shape[:-2], u.shape[-1]))
    inner_u, inner_bias = lax.stop_gradient((u, bias)) if stop_gradient else (u, bias)

    classes = u.shape[-3]
    # The first couplings are known: a softmax of zeros would be folded for seconds at compile time.
    logits = jnp.zeros(u.shape[:-1], u.dtype)
    couplings = jnp.full_like(logits, 1 / classes)
    for _ in range(routings - 1):
        v = squash(jnp.sum(couplings[..., None] * inner_u, -2) + inner_bias)
        logits += jnp.sum(inner_u * v[..., None, :], -1)
        couplings = jax.nn.softmax(logits, axis=-2)
    v = squash(jnp.sum(couplings[..., None] * u, -2) + bias)
    return RoutingState(logits, couplings, v.astype(float_dtype(u_hat)))


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


def _check_routing(u_hat: jax.Array, routings: int, bias: jax.Array) -> None:
    if not isinstance(routings, int) or isinstance(routings, bool) or routings < 1:
        raise ValueError(f"routing: routings is an int of 1 or more, got {routings!r}")
    if u_hat.ndim < 3:
        raise ValueError(f"routing: expected predictions [..., j, i, d], got {list(u_hat.shape)}")
    j, _, d = u_hat.shape[-3:]
    if bias.shape not in ((), (j, d)):
        raise ValueError(f"routing: expected a bias [j, d] = [{j}, {d}], got {list(bias.shape)}")
