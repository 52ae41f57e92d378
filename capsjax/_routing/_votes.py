"""The votes û (eq. 2), what a routing asks of them, and the checks that routings share."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from capsjax._routing._tiles import map_tiles, to_tiles
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


class Capsules(NamedTuple):
    """Capsules whose presence is not their length: what EM and its relatives route."""

    poses: jax.Array  # [..., j, d]
    activations: jax.Array  # [..., j]: from 0 to 1


@runtime_checkable
class Votes(Protocol):
    """Votes û [..., j, i, d] as a routing sees them, which need not be made, or not all at once.

    A pytree, so that `lax.stop_gradient` applies to it.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., j, i, d]."""

    @property
    def dtype(self) -> jnp.dtype:
        """The float dtype of the capsules that a routing returns."""

    def weighted_sum(self, couplings: jax.Array | None = None) -> jax.Array:
        """Returns s_j = Σ_i c_ji û_ji, [..., j, d], for couplings [..., j, i]; None: all are 1."""

    def agreement(self, vectors: jax.Array) -> jax.Array:
        """Returns û_ji · v_j, [..., j, i], for vectors [..., j, d]."""

    def map_outputs(self, function: Callable, *arrays: jax.Array) -> Any:
        """Applies a function to the votes of one output capsule after the other, tile by tile.

        function(votes [i, d, b] in float32, *an element of each array [t, j, ...])

        `capsjax._routing._tiles` says what a tile t and its examples b are.

        Returns its results, stacked along two first axes t and j.
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ArrayVotes:
    """Votes that lie in an array; sums run in float32."""

    u_hat: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.u_hat.shape

    @property
    def dtype(self) -> jnp.dtype:
        return float_dtype(self.u_hat)

    def weighted_sum(self, couplings: jax.Array | None = None) -> jax.Array:
        u_hat = at_least_float32(self.u_hat)
        return jnp.sum(u_hat if couplings is None else couplings[..., None] * u_hat, -2)

    def agreement(self, vectors: jax.Array) -> jax.Array:
        return jnp.sum(at_least_float32(self.u_hat) * vectors[..., None, :], -1)

    def map_outputs(self, function: Callable, *arrays: jax.Array) -> Any:
        def of_tile(*tile: jax.Array) -> Any:
            return lax.map(lambda of_output: function(*of_output), tile)

        return map_tiles(of_tile, to_tiles(at_least_float32(self.u_hat), 3), *arrays)


def as_votes(function: str, votes: ArrayLike | Votes) -> Votes:
    """Returns votes as they are, an array as votes.

    Raises:
      ValueError: unless they are [..., j, i, d].
    """
    if not isinstance(votes, Votes):
        votes = ArrayVotes(jnp.asarray(votes))
    if len(votes.shape) < 3 or not votes.shape[-3]:
        raise ValueError(f"{function}: expected votes [..., j, i, d], got {list(votes.shape)}")
    return votes


def as_bias(
    function: str, bias: ArrayLike | None, axes: str, shape: tuple[int, ...], ndim: int
) -> jax.Array:
    """Returns the bias with leading axes of 1, `ndim` axes in all; None is 0.

    Raises:
      ValueError: unless its shape is the one that `axes` names.
    """
    if bias is None:
        return jnp.zeros((1,) * ndim)
    if jnp.shape(bias) != shape:
        raise ValueError(
            f"{function}: expected a bias {axes} = {list(shape)}, got {[*jnp.shape(bias)]}"
        )
    return at_least_float32(jnp.asarray(bias)).reshape((1,) * (ndim - len(shape)) + shape)


def as_activations(function: str, activations: ArrayLike, votes: Votes) -> jax.Array:
    """Returns the activations of input capsules in float32.

    Raises:
      ValueError: unless they are [..., i], with the leading axes of the votes.
    """
    *lead, _, i, _ = votes.shape
    if jnp.shape(activations) != (*lead, i):
        raise ValueError(
            f"{function}: expected activations [..., i] = {[*lead, i]} for votes "
            f"{list(votes.shape)}, got {[*jnp.shape(activations)]}"
        )
    return at_least_float32(jnp.asarray(activations))


def check_iterations(function: str, iterations: int, name: str = "routings") -> None:
    """Raises ValueError unless the argument `name` is an int of 1 or more."""
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
        raise ValueError(f"{function}: {name} is an int of 1 or more, got {iterations!r}")


def check_positive(function: str, **numbers: float) -> None:
    """Raises ValueError unless all numbers are above 0 and finite."""
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{function}: {name} is a number above 0 and finite, got {number}")
