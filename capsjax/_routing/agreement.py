"""Routing by agreement: procedure 1 as the paper has it, and its value `Agreement`.

Letters: `...` leading axes, j output capsule, i input capsule, d output and k input dimension.
"""

import dataclasses
import functools
import operator
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from capsjax._routing._dense_votes import DenseVotes
from capsjax._routing._votes import Votes, as_bias, as_votes, check_iterations
from capsjax._vectors import squash

_MAX_WRITTEN_OUT = 32  # output capsules: the program grows with each


class RoutingState(NamedTuple):
    """The final state of routing by agreement."""

    logits: jax.Array  # b [..., j, i]: how well each prediction agreed, before the softmax
    couplings: jax.Array  # c [..., j, i]: softmax of b over j; the shares of each input capsule
    capsules: jax.Array  # v [..., j, d]: the output capsules


def routing(
    votes: ArrayLike | Votes,
    routings: int = 3,
    *,
    bias: ArrayLike | None = None,
    leak: bool = False,
    stop_gradient: bool = True,
) -> jax.Array:
    """Routes by agreement (procedure 1): each output capsule from the votes of all inputs.

    b = 0; repeat: c = softmax_j(b), s_j = Σ_i c_ji û_ji, v_j = squash(s_j), b_ji += û_ji · v_j

    Args:
      votes: û [..., j, i, d], of any float dtype, from `predictions`, or `DenseVotes`, which are
        never made; sums run in float32.
      routings: the number of iterations, a Python int of 1 or more. With 1 all couplings are 1/J,
        with a leak 1/(J + 1).
      bias: [j, d], added to s in every iteration, as in the authors' released code.
      leak: adds an output capsule whose logit stays 0 and which is left out of the result:
        c_ji = e^b_ji / (1 + Σ_j e^b_ji).
      stop_gradient: lets the gradient flow through the last iteration only, as if the couplings
        were constants. False: through every iteration, as in the authors' released code.

    Returns:
      v: output capsules [..., j, d] in the dtype of the votes.

    Raises:
      ValueError: if a shape does not fit or `routings` is not an int of 1 or more.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> capsjax.routing(jnp.ones((128, 10, 1152, 16)), routings=3).shape
      (128, 10, 16)

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, procedure 1; the stopped gradient:
      XifengGuo/CapsNet-Pytorch; the bias and the leak: Sarasra/models, research/capsules.
    """
    state = routing_state(votes, routings, bias=bias, leak=leak, stop_gradient=stop_gradient)
    return state.capsules


def routing_state(
    votes: ArrayLike | Votes,
    routings: int = 3,
    *,
    bias: ArrayLike | None = None,
    leak: bool = False,
    stop_gradient: bool = True,
) -> RoutingState:
    """Routes as `routing` does, and also returns the logits and couplings of the last iteration.

    c = softmax_j(b), Σ_j c_ji = 1; with a leak Σ_j c_ji < 1

    Args:
      votes: as in `routing`.
      routings: as in `routing`.
      bias: as in `routing`.
      leak: as in `routing`.
      stop_gradient: as in `routing`.

    Returns:
      `RoutingState`: logits b [..., j, i] and couplings c [..., j, i] in float32, capsules v
      [..., j, d] in the dtype of the votes.

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
    votes = as_votes("routing", votes)
    check_iterations("routing", routings)
    *lead, j, i, d = votes.shape
    inputs = votes, as_bias("routing", bias, "[j, d]", (j, d), len(lead) + 2)

    dtype = jnp.promote_types(votes.dtype, jnp.float32)
    b, c = jnp.zeros((*lead, j, i), dtype), jnp.full((*lead, j, i), 1 / (j + leak), dtype)
    total = jnp.zeros((*lead, j, d), dtype)
    for iteration in range(routings):
        last = iteration == routings - 1
        u_hat, beta = inputs if last or not stop_gradient else lax.stop_gradient(inputs)
        if iteration == 0:  # the couplings are equal: a plain sum is a third of the work
            s = u_hat.weighted_sum() / (j + leak)
        else:
            c = _couple(b, leak)
            s = u_hat.weighted_sum(c)
        v = squash(s + beta)
        if not last:
            total += v  # Σ û · v = û · Σ v, so b is written but never read again
            b = u_hat.agreement(total).astype(dtype)
    return RoutingState(b, c, v.astype(votes.dtype))


def _couple(logits: jax.Array, leak: bool) -> jax.Array:
    """Returns softmax_j(b); with a leak there is one logit more, whose share is left out."""
    j = logits.shape[-2]
    if leak:
        logits = jnp.concatenate([logits, jnp.zeros_like(logits[..., :1, :])], -2)
    softmax = functools.partial(jax.nn.softmax, axis=-2)
    on_gpu = _softmax if j <= _MAX_WRITTEN_OUT else softmax
    return lax.platform_dependent(logits, cuda=on_gpu, default=softmax)[..., :j, :]


def _softmax(logits: jax.Array) -> jax.Array:
    """Returns the softmax over j, written out: a GPU does it in the kernel that makes the logits.

    `jax.nn.softmax` becomes three kernels, each of which reads the logits anew.
    """
    rows = [logits[..., n, :] for n in range(logits.shape[-2])]
    top = lax.stop_gradient(functools.reduce(jnp.maximum, rows))
    powers = [jnp.exp(row - top) for row in rows]
    total = functools.reduce(operator.add, powers)
    return jnp.stack([power / total for power in powers], -2)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Routing by agreement as a value that a capsule layer takes.

    Args:
      iterations: of procedure 1, an int of 1 or more.
      bias: whether the layer owns a bias [j, d] that is added to s in every iteration; it begins
        at 0.1, as in the authors' released code.
      stop_gradient: lets the gradient flow through the last iteration only.
      leak: as in `capsjax.routing`.

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
    leak: bool = False

    def __post_init__(self) -> None:
        check_iterations("Agreement", self.iterations, "iterations")

    def initial_bias(self, j: int, i: int, d: int) -> jax.Array | None:
        """Returns 0.1 [j, d] with a bias, None without."""
        return jnp.full((j, d), 0.1, jnp.float32) if self.bias else None

    def __call__(self, u: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None) -> jax.Array:
        """Routes [..., i, k] by W [j, i, d, k] to [..., j, d], as `dense_capsules`."""
        return self._route(u, weight, bias).capsules

    def couplings(
        self, u: ArrayLike, weight: ArrayLike, bias: ArrayLike | None = None
    ) -> jax.Array:
        """Returns the couplings c [..., j, i] of the last iteration."""
        return self._route(u, weight, bias).couplings

    def _route(self, u: ArrayLike, weight: ArrayLike, bias: ArrayLike | None) -> RoutingState:
        return routing_state(
            DenseVotes(u, weight),
            self.iterations,
            bias=bias,
            leak=self.leak,
            stop_gradient=self.stop_gradient,
        )
