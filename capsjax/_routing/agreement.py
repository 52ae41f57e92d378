"""Routing by agreement: procedure 1 as the paper has it, and its value `Agreement`.

Letters: `...` leading axes, j output capsule, i input capsule, d output and k input dimension.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from capsjax._routing._votes import broadcast_bias, check_iterations, check_votes_and_bias
from capsjax._routing.dense import dense_capsules
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


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Routing by agreement as a value that a capsule layer takes.

    Args:
      iterations: of procedure 1, an int of 1 or more.
      bias: whether the layer owns a bias [j, d] that is added to s in every iteration.
      stop_gradient: lets the gradient flow through the last iteration only.

    Raises:
      ValueError: if `iterations` is not an int of 1 or more.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, capsjax
      >>> routing = capsjax.Agreement(iterations=2, bias=True, stop_gradient=False)
      >>> layer = capsjax.nn.DenseCaps(1152, 8, 10, 16, routing, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 1152, 8))).shape
      (2, 10, 16)

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, procedure 1.
    """

    name: ClassVar[str] = "agreement"
    iterations: int = 3
    bias: bool = False
    stop_gradient: bool = True

    def __post_init__(self) -> None:
        check_iterations(self.iterations)

    def bias_shape(self, j: int, i: int, d: int) -> tuple[int, ...] | None:
        """Returns [j, d] with a bias, None without."""
        return (j, d) if self.bias else None

    def __call__(self, u: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None) -> jax.Array:
        """Routes [..., i, k] by W [j, i, d, k] to [..., j, d], as `dense_capsules`."""
        return dense_capsules(
            u, weight, self.iterations, bias=bias, stop_gradient=self.stop_gradient
        )
