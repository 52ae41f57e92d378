"""The votes û (eq. 2), and the checks that all routings by agreement share."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from capsjax._vectors import at_least_float32, float_dtype


def predictions(u: ArrayLike, weight: ArrayLike) -> jax.Array:
    """Computes what each input capsule predicts of each output capsule (eq. 2).

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
