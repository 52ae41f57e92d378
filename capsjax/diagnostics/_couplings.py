"""Couplings in numbers: how far they are from equal, and how much they depend on the example.

In a parse tree each input capsule would belong to one output capsule, which changes with the image:
entropy 0, bonding 1, dynamics 1. Equal couplings have entropy 1 and all else 0.
"""

import math

import jax
import jax.numpy as jnp
from jax.scipy.special import entr
from jax.typing import ArrayLike

from capsjax._vectors import at_least_float32


def coupling_entropy(couplings: ArrayLike) -> jax.Array:
    """Computes how evenly each input capsule spreads over the output capsules.

    H_i = −Σ_j p_ji log p_ji / log J, p_ji = c_ji / Σ_j c_ji

    Args:
      couplings: c [..., j, i], not negative, J ≥ 2; the sum over j may be less than 1, as with a
        leak.

    Returns:
      H [..., i] in float32: 1 if an input capsule couples to all outputs alike, 0 if to one alone.

    Raises:
      ValueError: if the couplings have another shape.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> c = jnp.array([[1.0, 0.25], [0.0, 0.25], [0.0, 0.25], [0.0, 0.25]])  # two inputs
      >>> capsjax.diagnostics.coupling_entropy(c).tolist()
      [0.0, 1.0]

    References:
      Shannon, 1948, as a share of its largest value; polarised couplings: Paik, Kwak, Kim, 2019,
      arXiv:1907.13327.
    """
    c = _as_couplings("coupling_entropy", couplings)
    total = jnp.sum(c, -2, keepdims=True)
    shares = c / jnp.where(total == 0, 1, total)
    return jnp.sum(entr(shares), -2) / math.log(c.shape[-2])


def active(couplings: ArrayLike) -> jax.Array:
    """Finds the couplings that routing has raised well above equal ones.

    active_ji = c_ji > 1.5 / J

    Args:
      couplings: c [..., j, i], J ≥ 2.

    Returns:
      bool [..., j, i].

    Raises:
      ValueError: if the couplings have another shape.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> c = jnp.array([[0.8, 0.5], [0.2, 0.5]])
      >>> capsjax.diagnostics.active(c).any(-2).tolist()  # which input capsules are bound at all
      [True, False]

    References:
      Mitterreiter, Koch, Giesen, Laue, 2023, arXiv:2301.01583; matthiasware/EfficientCN,
      misc/metrics.py.
    """
    c = _as_couplings("active", couplings)
    return c > 1.5 / c.shape[-2]


def bonding(couplings: ArrayLike) -> jax.Array:
    """Computes how strongly an active input capsule is bound to one output capsule.

    bonding = mean max_j c_ji over all ... and i with max_j c_ji > 1.5 / J

    Args:
      couplings: c [..., j, i], J ≥ 2.

    Returns:
      A scalar in float32: 1 if all of an active capsule goes to one output; 0 if none is active.

    Raises:
      ValueError: if the couplings have another shape.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> c = jnp.array([[0.875, 0.5], [0.125, 0.5]])  # the second input capsule is not active
      >>> float(capsjax.diagnostics.bonding(c))
      0.875

    References:
      As `active`.
    """
    c = _as_couplings("bonding", couplings)
    bound = jnp.any(active(c), -2)
    strongest = jnp.where(bound, jnp.max(c, -2), 0)
    return jnp.sum(strongest) / jnp.maximum(jnp.sum(bound), 1)


def dynamics(couplings: ArrayLike) -> jax.Array:
    """Computes how much the couplings change from one example to another.

    dynamics = Σ_i n_i mean_j std_n(c_nji) / max_nj c_nji / (Σ_i n_i √(1/J (1 − 1/J)))

    An input capsule counts in the n_i examples where one of its couplings is active; its other
    couplings there count as 0.

    Args:
      couplings: c [N, ..., j, i] of N examples, J ≥ 2.

    Returns:
      A scalar in float32: 1 if each input capsule is bound to one output alone, and to each in
      equally many examples; 0 if no coupling changes, or none is active. It exceeds 1 where input
      capsules are bound to several outputs at once, and to others in other examples.

    Raises:
      ValueError: if the couplings have another shape, or there is no example.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> c = jnp.eye(4).reshape(4, 4, 1)  # in each of four examples bound to another output
      >>> float(capsjax.diagnostics.dynamics(c)), float(capsjax.diagnostics.dynamics(c[:1]))
      (1.0, 0.0)

    References:
      As `active`.
    """
    c = _as_couplings("dynamics", couplings)
    if c.ndim < 3 or not len(c):
        raise ValueError(f"dynamics: expected couplings [N, ..., j, i], N ≥ 1, got {list(c.shape)}")
    c = jnp.where(active(c), c, 0)
    bound = jnp.any(c > 0, -2, keepdims=True)  # [N, ..., 1, i]
    number = jnp.sum(bound, 0)
    divisor = jnp.maximum(number, 1)
    means = jnp.sum(c, 0) / divisor  # [..., j, i], over the examples that bind i
    squares = jnp.where(bound, jnp.square(c - means[None]), 0)
    deviations = jnp.mean(jnp.sqrt(jnp.sum(squares, 0) / divisor), -2)  # [..., i]
    strongest = jnp.max(c, (0, -2))
    relative = deviations / jnp.where(strongest > 0, strongest, 1)
    share = 1 / c.shape[-2]
    number = number[..., 0, :]
    mean = jnp.sum(number * relative) / jnp.maximum(jnp.sum(number), 1)
    return mean / math.sqrt(share * (1 - share))


def _as_couplings(function: str, couplings: ArrayLike) -> jax.Array:
    """Returns couplings in float32.

    Raises:
      ValueError: unless they are [..., j, i] with two output capsules or more.
    """
    c = at_least_float32(jnp.asarray(couplings))
    if c.ndim < 2 or c.shape[-2] < 2:
        raise ValueError(
            f"{function}: expected couplings [..., j, i] of 2 output capsules or more, got "
            f"{list(c.shape)}"
        )
    return c
