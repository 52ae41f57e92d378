"""Gaussians of diagonal variance: their moments, and the distances of votes from them.

Both take the votes of one output capsule, [i, d, b]: i input capsules, d numbers, b examples. They
have gradients of their own, since those that JAX derives read and write the votes three times as
often.
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax import lax

_LEAST = 1e-9  # is added to the sum of weights, which is 0 where all input capsules are inactive


@jax.custom_vjp
def moments(votes: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes mean μ and variance of votes V [i, d, b] of weights r [i, b], both [d, b].

    μ = Σ_i p_i V_i, variance = Σ_i p_i (V_i − μ)², p_i = r_i / Σ_i r_i

    Where all weights are 0, both are 0.
    """
    return _moments_fwd(votes, weights)[0]


def _moments_fwd(votes, weights):
    total = jnp.sum(weights, 0) + _LEAST
    shares = lax.optimization_barrier(weights / total[None])
    mean = _sum_inputs(shares[:, None] * votes)
    variance = _sum_inputs(shares[:, None] * jnp.square(votes - mean[None]))
    return (mean, variance), (votes, shares, total, mean, variance)


def _moments_bwd(residuals, gradients):
    votes, shares, total, mean, variance = residuals
    g_mean, g_variance = gradients
    # The variance has no slope in μ if Σ p = 1; _LEAST leaves it a little.
    g_mean -= 2 * g_variance * mean * (_LEAST / total)[None]
    deviations = votes - mean[None]
    slopes = g_mean[None] + 2 * g_variance[None] * deviations
    g_votes = shares[:, None] * slopes
    # dμ/dr_i = (V_i − μ) / Σ r and d variance/dr_i = ((V_i − μ)² − variance) / Σ r
    half = g_mean[None] + g_variance[None] * deviations
    excess = jnp.sum(g_variance * variance, 0)
    g_weights = (_sum_numbers(half * deviations) - excess[None]) / total[None]
    return g_votes, g_weights


moments.defvjp(_moments_fwd, _moments_bwd)


@jax.custom_vjp
def distances(votes: jax.Array, mean: jax.Array, precision: jax.Array) -> jax.Array:
    """Computes how far votes V [i, d, b] are from a mean μ, with precisions λ [d, b]: [i, b].

    Σ_d λ_d (V_id − μ_d)²
    """
    return _sum_numbers(precision[None] * jnp.square(votes - mean[None]))


def _distances_fwd(votes, mean, precision):
    return distances(votes, mean, precision), (votes, mean, precision)


def _distances_bwd(residuals, gradient):
    votes, mean, precision = residuals
    deviations = votes - mean[None]
    weighted = gradient[:, None] * deviations
    g_mean = -2 * precision * _sum_inputs(weighted)
    return 2 * precision[None] * weighted, g_mean, _sum_inputs(weighted * deviations)


distances.defvjp(_distances_fwd, _distances_bwd)


def _sum_inputs(x: jax.Array) -> jax.Array:
    """Sums [i, d, b] over i.

    On a CPU, XLA adds up whole rows only if they lie in memory, hence the barrier; the sums of
    eight parts, which it adds up as they are computed, are an eighth of what is to be written.
    """
    parts = jnp.split(x, math.gcd(8, x.shape[0]))
    return jnp.sum(lax.optimization_barrier(functools.reduce(operator.add, parts)), 0)


def _sum_numbers(x: jax.Array) -> jax.Array:
    """Sums [i, d, b] over d."""
    return jnp.sum(lax.optimization_barrier(x), 1)
