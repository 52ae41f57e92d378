"""Variational routing: EM routing with priors, so that no cluster collapses onto one vote."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import digamma
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


class VariationalState(NamedTuple):
    """The mixture after the last update of variational routing."""

    poses: jax.Array  # m [..., j, d]
    evidence: jax.Array  # −π_j H_j [..., j]: batch norm and a sigmoid make it an activation
    responsibilities: jax.Array  # R [..., j, i]: of its fit; Σ R = 1 over all that compete


def variational_routing(
    votes: ArrayLike | Votes,
    activations: ArrayLike,
    *,
    routings: int = 3,
    prior_counts: float = 1.0,
    prior_mean_counts: float = 1.0,
    prior_scale: float = 1.0,
    over_windows: OverWindows | None = None,
) -> VariationalState:
    """Routes by variational Bayes: a mixture of Gaussians of diagonal precision, with priors.

    R = 1/J; repeat, with r_ji = R_ji a_i, N_j = Σ_i r_ji and μ_j = Σ_i r_ji V_ji / N_j:
    α_j = α₀ + N_j, κ_j = κ₀ + N_j, ν_j = d + 1 + N_j, m_j = N_j μ_j / κ_j,
    P_j = Ψ₀ + Σ_i r_ji (V_ji − μ_j)² + κ₀ N_j / κ_j μ_j²,
    log π_j = ψ(α_j) − ψ(Σ_j α_j), log|Λ_j| = Σ_n ψ((ν_j − n) / 2) + d log 2 − Σ_d log P_jd,
    R_ji = softmax_j(log π_j + ½ log|Λ_j| − ½ (d / κ_j + ν_j Σ_d (V_jid − m_jd)² / P_jd))

    At the end the evidence is −π_j H_j, where H_j = ½ (d log 2πe − log|Λ_j|) is the entropy of the
    Gaussian; a layer makes activations of it, sigmoid(BN(evidence)). The paper's β_a and β_u are
    left out, because that batch norm cancels them. The gradient flows through all of it, and
    votes are made for one output capsule after the other.

    Args:
      votes: V [..., j, i, d], of any float dtype, an array or `DenseVotes`; computed in float32.
      activations: a [..., i] of the input capsules, from 0 to 1.
      routings: the number of updates, a Python int of 1 or more.
      prior_counts: α₀, the votes with which each output capsule begins.
      prior_mean_counts: κ₀, the votes that a mean of 0 is worth.
      prior_scale: Ψ₀, the scatter of those votes in each dimension.
      over_windows: as in `capsjax.em_routing`.

    Returns:
      A `VariationalState`, in float32.

    Raises:
      ValueError: if a shape does not fit, `routings` is not an int of 1 or more, or a prior is not
        above 0.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> votes, activations = jnp.ones((2, 10, 144, 16)), jnp.full((2, 144), 0.5)
      >>> state = capsjax.variational_routing(votes, activations)
      >>> state.poses.shape, state.evidence.shape
      ((2, 10, 16), (2, 10))

    References:
      Ribeiro, Leontidis, Kollias, "Capsule Routing via Variational Bayes", 2020, arXiv:1905.11455;
      fabio-deep/Variational-Capsule-Routing.
    """
    votes = as_votes("variational_routing", votes)
    check_iterations("variational_routing", routings)
    check_positive(
        "variational_routing",
        prior_counts=prior_counts,
        prior_mean_counts=prior_mean_counts,
        prior_scale=prior_scale,
    )
    *lead, j, i, d = votes.shape
    a = to_tiles(as_activations("variational_routing", activations, votes), 1)  # [i, b]
    competition = Competition(lead, over_windows)

    def fit(votes: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Updates the posterior of one output capsule: m and P [d, b], expected distances."""
        n = jnp.sum(weights, 0, keepdims=True)
        mu, variance = moments(votes, weights)  # no votes: the prior's mean
        kappa, nu = prior_mean_counts + n, d + 1 + n
        scale = prior_scale + n * variance + prior_mean_counts * n / kappa * jnp.square(mu)
        mean = n / kappa * mu
        return mean, scale, d / kappa + distances(votes, mean, nu / scale)

    def update(shares: jax.Array) -> tuple[VariationalState, jax.Array]:
        """Updates the mixture, and returns the next log R as well, not yet normalised."""
        weights = shares * a[:, None]  # r [t, j, i, b]
        means, scales, expected = votes.map_outputs(fit, weights)
        n = jnp.sum(weights, 2)  # [t, j, b]
        alpha = prior_counts + n
        log_pi = digamma(alpha) - digamma(jnp.sum(alpha, 1, keepdims=True))
        halves = (d + 1 + n[:, :, None] - jnp.arange(d)[None, None, :, None]) / 2
        log_precision = jnp.sum(digamma(halves) - jnp.log(scales), 2) + d * math.log(2)
        entropy = (d * math.log(2 * math.pi * math.e) - log_precision) / 2
        evidence = -jnp.exp(log_pi) * entropy
        state = VariationalState(*(from_tiles(x, lead) for x in (means, evidence, shares)))
        return state, (log_pi + log_precision / 2)[:, :, None] - expected / 2

    state, scores = update(competition.begin(j, i))
    for _ in range(routings - 1):
        state, scores = update(competition.share(scores))
    return state
