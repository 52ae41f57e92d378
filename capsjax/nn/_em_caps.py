"""Capsules of pose matrices and activations, routed by EM: the layers of matrix capsules."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers
from jax.typing import ArrayLike

from capsjax._routing import EM, Capsules, MatrixVotes, OverWindows
from capsjax._vectors import float_dtype
from capsjax._windows import extract_windows, logsumexp_over_windows
from capsjax.nn._layers import Initializer


class PrimaryEMCaps(nnx.Module):
    """Primary capsules of poses and activations: linear functions of the channels of each pixel.

    M = x K,   a = sigmoid(x A)

    There are no biases, as in the authors' code, whose constant −1 in the sigmoid is left out.

    Args:
      in_channels: C.
      types: the number of i at each position.
      dim_caps: d, the numbers of a pose.
      pose_init: of K [C, i·d]; 0.5 · N(0, 1) by default, in the authors' code truncated.
      activation_init: of A [C, i]; 3 · N(0, 1) by default, in the authors' code truncated.
      rngs: its stream `params` draws the initial values.

    Called with x [..., H, W, C], returns `Capsules`: poses [..., H, W, i, d] in the dtype of x and
    activations [..., H, W, i] in float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import capsjax
      >>> layer = capsjax.nn.PrimaryEMCaps(64, 8, rngs=nnx.Rngs(0))
      >>> capsules = layer(jnp.ones((2, 12, 12, 64)))
      >>> capsules.poses.shape, capsules.activations.shape
      ((2, 12, 12, 8, 16), (2, 12, 12, 8))

    References:
      Hinton, Sabour, Frosst, "Matrix capsules with EM routing", 2018, §4;
      google-research/capsule_em.
    """

    def __init__(
        self,
        in_channels: int,
        types: int,
        dim_caps: int = 16,
        *,
        pose_init: Initializer | None = None,
        activation_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        self.dim_caps = dim_caps
        pose_init = pose_init or initializers.normal(0.5)
        activation_init = activation_init or initializers.normal(3.0)
        shapes = (in_channels, types * dim_caps), (in_channels, types)
        self.poses = nnx.Param(pose_init(rngs.params(), shapes[0], jnp.float32))
        self.activations = nnx.Param(activation_init(rngs.params(), shapes[1], jnp.float32))

    def __call__(self, x: ArrayLike) -> Capsules:
        x = jnp.asarray(x)
        x = x.astype(float_dtype(x))
        project = partial(jnp.einsum, "...c,cn->...n", preferred_element_type=jnp.float32)
        poses = project(x, self.poses[...].astype(x.dtype)).astype(x.dtype)
        activations = jax.nn.sigmoid(project(x, self.activations[...].astype(x.dtype)))
        return Capsules(poses.reshape(*activations.shape, self.dim_caps), activations)


class _EMLayer(nnx.Module):
    """What both layers own: the matrices W, and β_u and β_a of each type of output capsule."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        routing: int | EM,
        weight_init: Initializer | None,
        rngs: nnx.Rngs,
    ):
        self.routing = as_em(routing)
        weight_init = weight_init or initializers.normal(0.5)
        self.weight = nnx.Param(weight_init(rngs.params(), shape, jnp.float32))
        self.beta_u = nnx.Param(jnp.zeros(shape[0], jnp.float32))
        self.beta_a = nnx.Param(jnp.zeros(shape[0], jnp.float32))

    def _check(self, capsules: Capsules, types: int) -> None:
        """Raises ValueError unless poses are [..., y, x, types, d], and activations fit them."""
        shape, active = jnp.shape(capsules.poses), jnp.shape(capsules.activations)
        d = self.weight.shape[-1] ** 2
        if len(shape) < 4 or shape[-2:] != (types, d) or active != shape[:-1]:
            raise ValueError(
                f"{type(self).__name__}: expected poses [..., y, x, {types}, {d}] and activations "
                f"[..., y, x, {types}], got {list(shape)} and {list(active)}"
            )

    def _route(
        self, votes: MatrixVotes, activations: jax.Array, over_windows: OverWindows | None = None
    ) -> Capsules:
        # Costs are hundreds: in their unit, one step of Adam moves β_a as far as it does β_u.
        betas = {"beta_u": self.beta_u[...], "beta_a": 100 * self.beta_a[...]}
        state = self.routing(votes, activations, over_windows=over_windows, **betas)
        return Capsules(state.poses.astype(votes.dtype), state.activations)


class ConvEMCaps(_EMLayer):
    """Capsules at every position, routed by EM from the capsules of a window.

    V = M W, and `capsjax.em_routing` with the same W [j, i] for the same place in every window

    An input capsule shares itself out among the output capsules of all types at all positions whose
    window holds it.

    Args:
      in_types: the number of i, capsules at an input position.
      out_types: the number of j, capsules at an output position.
      side: the rows and columns of a pose matrix; d = side².
      routing: iterations of EM, or a `capsjax.EM`.
      kernel_size: n, the side of a window, in positions.
      strides: s, the step between neighbouring windows, in positions.
      weight_init: of W [j, n·n·i, side, side]; 0.5 · N(0, 1) by default. β_u and β_a begin at 0,
        and the parameter `beta_a` holds β_a / 100. Both choices are ours.
      rngs: its stream `params` draws the initial values.

    Called with `Capsules`, poses [..., y, x, i, d] and activations [..., y, x, i], returns those at
    [..., (y − n) // s + 1, (x − n) // s + 1, j]; activations are float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import capsjax
      >>> layer = capsjax.nn.ConvEMCaps(8, 4, strides=2, rngs=nnx.Rngs(0))
      >>> inputs = capsjax.Capsules(jnp.ones((2, 12, 12, 8, 16)), jnp.ones((2, 12, 12, 8)))
      >>> outputs = layer(inputs)
      >>> outputs.poses.shape, outputs.activations.shape
      ((2, 5, 5, 4, 16), (2, 5, 5, 4))

    References:
      Hinton, Sabour, Frosst, "Matrix capsules with EM routing", 2018, §3 and §4; the competition of
      positions: Gritzman, 2019, arXiv:1907.00652.
    """

    def __init__(
        self,
        in_types: int,
        out_types: int,
        *,
        side: int = 4,
        routing: int | EM = EM(),  # noqa: B008  frozen
        kernel_size: int = 3,
        strides: int = 1,
        weight_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        shape = (out_types, kernel_size * kernel_size * in_types, side, side)
        super().__init__(shape, routing, weight_init, rngs)
        self.kernel_size, self.strides = kernel_size, strides

    def __call__(self, capsules: Capsules) -> Capsules:
        self._check(capsules, self.weight.shape[1] // self.kernel_size**2)
        cut = partial(extract_windows, size=self.kernel_size, strides=self.strides)
        votes = MatrixVotes(cut(capsules.poses), self.weight[...])
        activations = cut(capsules.activations[..., None])[..., 0]
        over_windows = partial(logsumexp_over_windows, size=self.kernel_size, strides=self.strides)
        return self._route(votes, activations, over_windows)


class EMCaps(_EMLayer):
    """Class capsules, routed by EM from the capsules at all positions, which share their matrices.

    V = M W + C, and `capsjax.em_routing` with the same W [j, i] at every position

    C tells the votes where they come from (coordinate addition): the first two numbers of its
    right-hand column are the row and the column of the position, scaled to between 0 and 1; all
    others are 0.

    Args:
      in_types: the number of i, capsules at an input position.
      out_num_caps: the number of j.
      side: the rows and columns of a pose matrix, 2 or more; d = side².
      routing: iterations of EM, or a `capsjax.EM`.
      weight_init: of W [j, i, side, side]; and β_u and β_a, as in `ConvEMCaps`.
      rngs: its stream `params` draws the initial values.

    Called with `Capsules`, poses [..., y, x, i, d] and activations [..., y, x, i], returns poses
    [..., j, d] and activations [..., j]; activations are float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import capsjax
      >>> layer = capsjax.nn.EMCaps(16, 10, rngs=nnx.Rngs(0))
      >>> inputs = capsjax.Capsules(jnp.ones((2, 3, 3, 16, 16)), jnp.ones((2, 3, 3, 16)))
      >>> layer(inputs).activations.shape
      (2, 10)

    References:
      Hinton, Sabour, Frosst, "Matrix capsules with EM routing", 2018, §4; the scale of the
      coordinates: IBM/matrix-capsules-with-em-routing.
    """

    def __init__(
        self,
        in_types: int,
        out_num_caps: int,
        *,
        side: int = 4,
        routing: int | EM = EM(),  # noqa: B008  frozen
        weight_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        if side < 2:
            raise ValueError(f"EMCaps: side is 2 or more, for two coordinates, got {side}")
        super().__init__((out_num_caps, in_types, side, side), routing, weight_init, rngs)

    def __call__(self, capsules: Capsules) -> Capsules:
        self._check(capsules, self.weight.shape[1])
        *lead, rows, columns, i, d = capsules.poses.shape
        positions = rows * columns
        weight = self.weight[...]
        votes = MatrixVotes(
            capsules.poses.reshape(*lead, positions * i, d),
            jnp.tile(weight, (1, positions, 1, 1)),
            jnp.repeat(_coordinates(rows, columns, d), i, 0),
        )
        return self._route(votes, capsules.activations.reshape(*lead, positions * i))


def as_em(routing: int | EM) -> EM:
    """Returns EM routing for a number of iterations, an `EM` as it is.

    Raises:
      ValueError: if it is neither.
    """
    if isinstance(routing, EM):
        return routing
    if callable(routing) or isinstance(routing, str):
        raise ValueError(
            "layers of poses and activations take a number of iterations or a capsjax.EM, got "
            f"{routing!r}"
        )
    return EM(routing)


def _coordinates(rows: int, columns: int, d: int) -> jax.Array:
    """Returns what is added to the votes of each position, [rows·columns, d]."""
    right = d - math.isqrt(d)  # a pose is stored column by column
    places = jnp.indices((rows, columns)).reshape(2, -1).T
    scaled = (places + 0.5) / jnp.array([[rows, columns]])
    return jnp.zeros((rows * columns, d)).at[:, right : right + 2].set(scaled)
