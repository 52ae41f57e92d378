"""Variational routing: EM routing with priors, so that no cluster collapses onto one vote."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import digamma
from jax.typing import ArrayLike

from capsjax._routing._votes import Votes, as_activations, as_votes, check_iterations


class VariationalState(NamedTuple):
    """The mixture after the last update of variational routing."""

    poses: jax.Array  # m [..., j, d]
    evidence: jax.Array  # −π_j H_j [..., j]: batch norm and a sigmoid make it an activation
    responsibilities: jax.Array  # R [..., j, i]: with which it was fitted; Σ_j R = 1


def variational_routing(
    votes: ArrayLike | Votes,
    activations: ArrayLike,
    *,
    routings: int = 3,
    prior_counts: float = 1.0,
    prior_mean_counts: float = 1.0,
    prior_scale: float = 1.0,
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

    Returns:
      A `VariationalState`, in float32.

    Raises:
      ValueError: if a shape does not fit or `routings` is not an int of 1 or more.

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
    *lead, j, i, d = votes.shape
    a = as_activations("variational_routing", activations, votes)
    fit = partial(_fit, kappa=prior_mean_counts, psi=prior_scale)

    def update(shares: jax.Array) -> tuple[VariationalState, jax.Array]:
        """Updates the mixture, and returns the next log R as well, not yet normalised."""
        means, log_precision, distances = votes.map_outputs(fit, shares * a[None])
        alpha = prior_counts + jnp.sum(shares * a[None], -1)
        log_pi = digamma(alpha) - digamma(jnp.sum(alpha, 0, keepdims=True))
        entropy = (d * math.log(2 * math.pi * math.e) - log_precision) / 2
        state = VariationalState(
            poses=jnp.moveaxis(means, 0, -2),
            evidence=jnp.moveaxis(-jnp.exp(log_pi) * entropy, 0, -1),
            responsibilities=jnp.moveaxis(shares, 0, -2),
        )
        return state, (log_pi + log_precision / 2)[..., None] - distances / 2

    state, scores = update(jnp.full((j, *lead, i), 1 / j))
    for _ in range(routings - 1):
        state, scores = update(jax.nn.softmax(scores, 0))
    return state


def _fit(
    votes: jax.Array, weights: jax.Array, *, kappa: float, psi: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Updates the posterior of one output capsule by votes [..., i, d], weighted by r [..., i].

    Returns its mean m [..., d], log|Λ| [...], and each vote's expected distance [..., i].
    """
    d, total = votes.shape[-1], jnp.sum(weights, -1)
    n = total[..., None]
    mu = jnp.sum(weights[..., None] * votes, -2) / (n + 1e-9)  # no votes: the prior's mean
    scatter = jnp.sum(weights[..., None] * jnp.square(votes - mu[..., None, :]), -2)
    scale = psi + scatter + kappa * n / (kappa + n) * jnp.square(mu)
    mean, nu = n / (kappa + n) * mu, d + 1 + n
    halves = (nu - jnp.expand_dims(jnp.arange(d), range(total.ndim))) / 2
    log_precision = jnp.sum(digamma(halves) - jnp.log(scale), -1) + d * math.log(2)
    squares = jnp.square(votes - mean[..., None, :]) / scale[..., None, :]
    return mean, log_precision, d / (kappa + n) + nu * jnp.sum(squares, -1)
