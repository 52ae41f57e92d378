"""Routing by agreement: procedure 1 as the paper has it.

Letters: `...` leading axes, j output capsule, i input capsule, d output and k input dimension.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from capsjax._vectors import at_least_float32, float_dtype, squash


class RoutingState(NamedTuple):
    """The final state of routing by agreement."""

    logits: jax.Array  # b [..., j, i]: how well each prediction agreed, before the softmax
    couplings: jax.Array  # c [..., j, i]: softmax of b over j; the shares of each input capsule
    capsules: jax.Array  # v [..., j, d]: the output capsules


def routing(
    u_hat: ArrayLike,
    routings: int = 3,
    *,
    bias: ArrayLike | None = None,
    stop_gradient: bool = True,
) -> jax.Array:
    """Routes by agreement (procedure 1): each output capsule from the predictions of all inputs.

    b = 0; repeat: c = softmax_j(b), s_j = Σ_i c_ji û_ji, v_j = squash(s_j), b_ji += û_ji · v_j

    Args:
      u_hat: predictions û [..., j, i, d], of any float dtype; sums run in float32.
      routings: the number of iterations, a Python int of 1 or more. With 1 all couplings are 1/J.
      bias: [j, d], added to s in every iteration, as in the authors' released code.
      stop_gradient: lets the gradient flow through the last iteration only, as if the couplings
        were constants. False: through every iteration, as in the authors' released code.

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
    """Routes as `routing` does, and also returns the logits and couplings of the last iteration.

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
      ValueError: under the same conditions as `routing`.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> state = capsjax.routing_state(jnp.ones((10, 1152, 16)))
      >>> state.couplings.shape, round(float(state.couplings[:, 0].sum()), 4)
      ((10, 1152), 1.0)

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, procedure 1.
    """
    u_hat = jnp.asarray(u_hat)
    check_iterations(routings)
    check_votes_and_bias(u_hat, bias)
    j, _, d = u_hat.shape[-3:]
    inputs = at_least_float32(u_hat), broadcast_bias(bias, (*(1,) * (u_hat.ndim - 3), j, d))

    b, c = jnp.zeros(u_hat.shape[:-1]), jnp.full(u_hat.shape[:-1], 1 / j)
    for iteration in range(routings):
        last = iteration == routings - 1
        u, bias = inputs if last or not stop_gradient else lax.stop_gradient(inputs)
        if iteration == 0:  # softmax(0) is 1/J: a plain sum is a third of the work
            s = jnp.sum(u, -2) / j
        else:
            c = jax.nn.softmax(b, -2)
            s = jnp.sum(c[..., None] * u, -2)
        v = squash(s + bias)
        if not last:
            b += jnp.sum(u * v[..., None, :], -1)
    return RoutingState(b, c, v.astype(float_dtype(u_hat)))


def broadcast_bias(bias: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array:
    """Reshapes the bias so that it broadcasts against s; None is 0."""
    return jnp.zeros(()) if bias is None else at_least_float32(jnp.asarray(bias)).reshape(shape)


def check_iterations(routings: int) -> None:
    """Raises ValueError unless routings is an int of 1 or more."""
    if not isinstance(routings, int) or isinstance(routings, bool) or routings < 1:
        raise ValueError(f"routing: routings is an int of 1 or more, got {routings!r}")


def check_votes_and_bias(u_hat: Any, bias: ArrayLike | None) -> None:
    """Raises ValueError unless û is [..., j, i, d] and the bias, if there is one, [j, d]."""
    if u_hat.ndim < 3 or not u_hat.shape[-3]:
        raise ValueError(f"routing: expected predictions [..., j, i, d], got {list(u_hat.shape)}")
    j, _, d = u_hat.shape[-3:]
    if bias is not None and jnp.shape(bias) != (j, d):
        raise ValueError(f"routing: expected a bias [j, d] = [{j}, {d}], got {[*jnp.shape(bias)]}")
