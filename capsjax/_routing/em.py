"""EM routing: each output capsule is a Gaussian, fitted to the votes that it explains best."""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from capsjax._routing._competition import Competition, OverWindows
from capsjax._routing._gaussians import distances, moments
from capsjax._routing._tiles import from_tiles, to_tiles
from capsjax._routing._votes import (
    Votes,
    as_activations,
    as_votes,
    check_iterations,
    check_positive,
)
from capsjax._vectors import at_least_float32


class EMState(NamedTuple):
    """The Gaussians after the last M-step of EM routing."""

    poses: jax.Array  # μ [..., j, d]
    activations: jax.Array  # a [..., j]: from 0 to 1
    variances: jax.Array  # σ² [..., j, d]
    responsibilities: jax.Array  # R [..., j, i] of the fit; Σ R = 1 over all that compete


def em_routing(
    votes: ArrayLike | Votes,
    activations: ArrayLike,
    *,
    beta_u: ArrayLike,
    beta_a: ArrayLike,
    routings: int = 3,
    inverse_temperature: ArrayLike = 0.01,
    min_variance: float = 1e-4,
    mass: float | None = None,
    over_windows: OverWindows | None = None,
) -> EMState:
    """Routes by expectation maximisation (procedure 1): poses agree if they form a tight cluster.

    R = 1/J; repeat an M-step and, but after the last one, an E-step:
    M: r_ji = R_ji a_i, μ_j = Σ_i r_ji V_ji / Σ_i r_ji, σ²_j = Σ_i r_ji (V_ji − μ_j)² / Σ_i r_ji,
    a_j = sigmoid(λ (β_a − Σ_d (β_u + log σ_jd) mass Σ_i r_ji))
    E: R_ji = softmax_j(log a_j + Σ_d log N(V_jid; μ_jd, σ²_jd))

    The gradient flows through all of it. Votes are made for one output capsule after the other, so
    that `MatrixVotes` and `DenseVotes` hold only 1/J of them at once.

    Where output capsules at several positions compete for an input capsule, leading axes are
    positions, i runs over the capsules of a window, and `over_windows` makes the softmax run over
    the J types at every position whose window holds the input capsule; R begins at one over their
    number.

    Args:
      votes: V [..., j, i, d], of any float dtype, an array, `DenseVotes` or `MatrixVotes`; computed
        in float32.
      activations: a [..., i] of the input capsules, from 0 to 1.
      beta_u: [j], the cost of describing one vote by the capsule, for each of the d numbers.
      beta_a: [j], the cost at which the activation is ½; a cheaper capsule is more active.
      routings: the number of M-steps, a Python int of 1 or more.
      inverse_temperature: a scalar, the limit of λ, which is inverse_temperature · (1 − 0.95^t) in
        the M-step t = 1, 2, ….
      min_variance: is added to σ², which is 0 for a capsule with a single vote; above 0.
      mass: a factor on Σ_i r_ji, so that one λ suits layers with many and with few votes per output
        capsule. 1: the paper's. None: IBM's 100 J / I, which ignores that several windows may share
        an input capsule.
      over_windows: `capsjax.logsumexp_over_windows` with the size and the stride of the windows;
        None: each input capsule has its J output capsules for itself.

    Returns:
      An `EMState`, in float32: `poses`, `activations`, `variances` and `responsibilities`.

    Raises:
      ValueError: if a shape does not fit, `routings` is not an int of 1 or more, or `min_variance`
        or `mass` is not above 0.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> votes, activations = jnp.ones((2, 10, 144, 16)), jnp.full((2, 144), 0.5)
      >>> beta = jnp.zeros(10)
      >>> state = capsjax.em_routing(votes, activations, beta_u=beta, beta_a=beta)
      >>> state.poses.shape, state.activations.shape
      ((2, 10, 16), (2, 10))

    References:
      Hinton, Sabour, Frosst, "Matrix capsules with EM routing", 2018, procedure 1. λ as in
      google-research/capsule_em; the added variance and the mass: Gritzman, 2019,
      arXiv:1907.00652, and IBM/matrix-capsules-with-em-routing.
    """
    votes = as_votes("em_routing", votes)
    check_iterations("em_routing", routings)
    check_positive("em_routing", min_variance=min_variance)
    if jnp.ndim(inverse_temperature):
        raise ValueError(
            "em_routing: inverse_temperature is a scalar, got an array of shape "
            f"{list(jnp.shape(inverse_temperature))}"
        )
    *lead, j, i, _ = votes.shape
    a = to_tiles(as_activations("em_routing", activations, votes), 1)  # [i, b]
    beta_u, beta_a = _as_beta("beta_u", beta_u, j), _as_beta("beta_a", beta_a, j)  # [j, 1]
    mass = 100 * j / max(i, 1) if mass is None else mass
    check_positive("em_routing", mass=mass)
    competition = Competition(lead, over_windows)

    def fit(votes: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        mean, variance = moments(votes, weights)
        variance += min_variance
        return mean, variance, distances(votes, mean, 1 / variance)

    def maximise(shares: jax.Array, step: int) -> tuple[EMState, jax.Array]:
        """Does an M-step, and returns the next log R as well, not yet normalised."""
        weights = shares * a[:, None]  # r [t, j, i, b]
        means, variances, squares = votes.map_outputs(fit, weights)
        cost = jnp.sum(beta_u[..., None] + jnp.log(variances) / 2, 2) * mass * jnp.sum(weights, 2)
        logits = jnp.asarray(inverse_temperature) * (1 - 0.95**step) * (beta_a - cost)  # [j, b]
        log_scale = jnp.sum(jnp.log(2 * math.pi * variances), 2)
        densities = -(squares + log_scale[:, :, None]) / 2  # log N [j, i, b]
        state = EMState(
            *(from_tiles(x, lead) for x in (means, jax.nn.sigmoid(logits), variances, shares))
        )
        return state, jax.nn.log_sigmoid(logits)[:, :, None] + densities

    state, scores = maximise(competition.begin(j, i), 1)
    for step in range(2, routings + 1):
        state, scores = maximise(competition.share(scores), step)
    return state


def _as_beta(name: str, beta: ArrayLike, j: int) -> jax.Array:
    if jnp.shape(beta) != (j,):
        raise ValueError(f"em_routing: expected {name} [j] = [{j}], got {[*jnp.shape(beta)]}")
    return at_least_float32(jnp.asarray(beta))[None, :, None]


@dataclasses.dataclass(frozen=True)
class EM:
    """EM routing as a value that layers of poses and activations take.

    Args:
      iterations: of procedure 1, an int of 1 or more.
      inverse_temperature: the limit of λ, as in `capsjax.em_routing`.

    Raises:
      ValueError: if `iterations` is not an int of 1 or more, or `inverse_temperature` not above 0.

    Example:
      >>> from flax import nnx
      >>> import capsjax
      >>> layer = capsjax.nn.EMCaps(16, 10, routing=capsjax.EM(iterations=2), rngs=nnx.Rngs(0))
      >>> layer.routing.iterations
      2

    References:
      As `capsjax.em_routing`.
    """

    name: ClassVar[str] = "em"
    iterations: int = 3
    inverse_temperature: float = 0.01

    def __post_init__(self) -> None:
        check_iterations("EM", self.iterations, "iterations")
        check_positive("EM", inverse_temperature=self.inverse_temperature)

    def __call__(
        self,
        votes: ArrayLike | Votes,
        activations: ArrayLike,
        *,
        beta_u: ArrayLike,
        beta_a: ArrayLike,
        over_windows: OverWindows | None = None,
    ) -> EMState:
        """Routes votes [..., j, i, d] and activations [..., i] as `em_routing` does."""
        return em_routing(
            votes,
            activations,
            beta_u=beta_u,
            beta_a=beta_a,
            routings=self.iterations,
            inverse_temperature=self.inverse_temperature,
            over_windows=over_windows,
        )
