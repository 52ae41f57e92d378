"""EM routing: each output capsule is a Gaussian, fitted to the votes that it explains best."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from capsjax._routing._votes import Votes, as_activations, as_votes, check_iterations
from capsjax._vectors import at_least_float32


class EMState(NamedTuple):
    """The Gaussians after the last M-step of EM routing."""

    poses: jax.Array  # μ [..., j, d]
    activations: jax.Array  # a [..., j]: from 0 to 1
    variances: jax.Array  # σ² [..., j, d]
    responsibilities: jax.Array  # R [..., j, i]: with which they were fitted; Σ_j R = 1


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
) -> EMState:
    """Routes by expectation maximisation (procedure 1): poses agree if they form a tight cluster.

    R = 1/J; repeat an M-step and, but after the last one, an E-step:
    M: r_ji = R_ji a_i, μ_j = Σ_i r_ji V_ji / Σ_i r_ji, σ²_j = Σ_i r_ji (V_ji − μ_j)² / Σ_i r_ji,
    a_j = sigmoid(λ (β_a − Σ_d (β_u + log σ_jd) mass Σ_i r_ji))
    E: R_ji = softmax_j(log a_j + Σ_d log N(V_jid; μ_jd, σ²_jd))

    The gradient flows through all of it. Votes are made for one output capsule after the other, so
    that `DenseVotes` take 1/J of the memory.

    Args:
      votes: V [..., j, i, d], of any float dtype, an array or `DenseVotes`; computed in float32.
      activations: a [..., i] of the input capsules, from 0 to 1.
      beta_u: [j], the cost of describing one vote by the capsule, for each of the d numbers.
      beta_a: [j], what a capsule may cost before it is active.
      routings: the number of M-steps, a Python int of 1 or more.
      inverse_temperature: a scalar, the limit of λ, which is inverse_temperature · (1 − 0.95^t) in
        the M-step t = 1, 2, ….
      min_variance: is added to σ², which is 0 for a capsule with a single vote.
      mass: weighs Σ_i r_ji, so that one λ suits layers with many votes per output capsule and with
        few; None: 100 J / I. 1: as in the paper.

    Returns:
      An `EMState`, in float32: `poses`, `activations`, `variances` and `responsibilities`.

    Raises:
      ValueError: if a shape does not fit or `routings` is not an int of 1 or more.

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
    *lead, j, i, _ = votes.shape
    a = as_activations("em_routing", activations, votes)
    beta_u, beta_a = _as_beta("beta_u", beta_u, j), _as_beta("beta_a", beta_a, j)
    mass = 100 * j / max(i, 1) if mass is None else mass
    fit = partial(_fit, min_variance=min_variance, mass=mass)

    def maximise(shares: jax.Array, step: int) -> tuple[EMState, jax.Array]:
        """Does an M-step, and returns the next log R as well, not yet normalised."""
        means, variances, costs, densities = votes.map_outputs(fit, shares * a[None], beta_u)
        scale = jnp.asarray(inverse_temperature) * (1 - 0.95**step)
        logits = scale * (beta_a.reshape(j, *(1 for _ in lead)) - costs)
        state = EMState(
            poses=jnp.moveaxis(means, 0, -2),
            activations=jnp.moveaxis(jax.nn.sigmoid(logits), 0, -1),
            variances=jnp.moveaxis(variances, 0, -2),
            responsibilities=jnp.moveaxis(shares, 0, -2),
        )
        return state, jax.nn.log_sigmoid(logits)[..., None] + densities

    state, scores = maximise(jnp.full((j, *lead, i), 1 / j), 1)
    for step in range(2, routings + 1):
        state, scores = maximise(jax.nn.softmax(scores, 0), step)
    return state


def _fit(
    votes: jax.Array, weights: jax.Array, beta_u: jax.Array, *, min_variance: float, mass: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Fits the Gaussian of one output capsule to votes [..., i, d], weighted by r [..., i].

    Returns its mean and variance [..., d], its cost [...], and each vote's log-density [..., i].
    """
    total = jnp.sum(weights, -1)
    parts = (weights / (total[..., None] + 1e-9))[..., None]  # no votes: mean 0, least variance
    mean = jnp.sum(parts * votes, -2)
    squares = jnp.square(votes - mean[..., None, :])
    variance = jnp.sum(parts * squares, -2) + min_variance
    cost = jnp.sum(beta_u + jnp.log(variance) / 2, -1) * mass * total
    terms = squares / variance[..., None, :] + jnp.log(2 * math.pi * variance)[..., None, :]
    return mean, variance, cost, -jnp.sum(terms, -1) / 2


def _as_beta(name: str, beta: ArrayLike, j: int) -> jax.Array:
    if jnp.shape(beta) != (j,):
        raise ValueError(f"em_routing: expected {name} [j] = [{j}], got {[*jnp.shape(beta)]}")
    return at_least_float32(jnp.asarray(beta))
