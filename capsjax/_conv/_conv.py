"""The convolution, its gradients, and the choice of the algorithm by platform."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from capsjax._conv import _native, _patches, _shifts, _toom_cook
from capsjax._conv._matmul import contract
from capsjax._conv._tiling import plan_axes


def conv(x: Array, kernel: Array, bias: Array, *, strides: int | tuple[int, int] = 1) -> Array:
    """Convolves images with a kernel, without padding, and adds a bias.

    y[..., h, w, o] = bias[o] + Σ_{p,q,c} x[..., s h + p, s w + q, c] kernel[p, q, c, o]

    Args:
      x: images [..., H, W, C], of any float dtype.
      kernel: [P, Q, C, O].
      bias: [O].
      strides: s, the step between neighbouring outputs: one for both axes, or (rows, columns).

    Returns:
      y [..., (H - P) // s + 1, (W - Q) // s + 1, O] in the dtype of `x`; sums run in float32.

    Raises:
      ValueError: if the shapes do not fit each other, `x` holds no floats, or a stride is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> conv(jnp.ones((2, 28, 28, 1)), jnp.ones((9, 9, 1, 256)), jnp.zeros(256)).shape
      (2, 20, 20, 256)

    References:
      Winograd, "Arithmetic Complexity of Computations", 1980; Lavin, Gray, 2015, arXiv:1509.09308.
    """
    steps = (strides, strides) if isinstance(strides, int) else tuple(strides)
    _check_arguments(x, kernel, bias, steps)
    lead, image = x.shape[:-3], x.shape[-3:]
    x = x.reshape(math.prod(lead), *image)
    operands = _match_varying_axes(x, kernel.astype(x.dtype), bias.astype(x.dtype))
    y: Array = _convolve(steps, *operands)
    return y.reshape(*lead, *y.shape[1:])


def _check_arguments(x, kernel, bias, strides) -> None:
    if x.ndim < 3 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floats [..., H, W, C], got {x.dtype} of shape {x.shape}")
    if kernel.ndim != 4:
        raise ValueError(f"kernel must be [rows, columns, in, out], got shape {kernel.shape}")
    if bias.shape != kernel.shape[3:]:
        raise ValueError(
            f"bias must be {list(kernel.shape[3:])} for a kernel of shape {list(kernel.shape)}, "
            f"got {list(bias.shape)}"
        )
    if x.shape[-1] != kernel.shape[2]:
        raise ValueError(
            f"x must have {kernel.shape[2]} channels for a kernel of shape {list(kernel.shape)}, "
            f"got {x.shape[-1]} in x of shape {list(x.shape)}"
        )
    if not all(1 <= k <= n for k, n in zip(kernel.shape[:2], x.shape[-3:-1], strict=True)):
        raise ValueError(
            f"a kernel of {kernel.shape[0]}x{kernel.shape[1]} does not fit into images of "
            f"{x.shape[-3]}x{x.shape[-2]}: take a smaller kernel or larger images"
        )
    if len(strides) != 2 or min(strides) < 1:
        raise ValueError(f"strides must be one or two integers >= 1, got {strides}")


def _match_varying_axes(*operands):
    """Under shard_map, marks all operands as varying over the same axes, so that a replicated
    operand's gradient is summed over devices."""
    axes = [jax.typeof(operand).manual_axis_type.varying for operand in operands]
    union = frozenset().union(*axes)
    return [
        lax.pcast(operand, tuple(union - varying), to="varying")
        for operand, varying in zip(operands, axes, strict=True)
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(strides, x: Array, w: Array, b: Array) -> Array:
    """Convolves images [B, H, W, C] by the algorithm of the platform that is lowered for."""
    return lax.platform_dependent(
        x,
        w,
        b,
        cpu=functools.partial(_convolve_on_cpu, strides),
        default=functools.partial(_convolve_natively, strides),
    )


def _convolve_fwd(strides, x, w, b):
    w = lax.optimization_barrier(w)  # or both passes of a GPU read it in float32 and round it anew
    return _convolve(strides, x, w, b), (x, w)


def _convolve_bwd(strides, residuals, dy):
    # The platform is chosen anew here, not by differentiating the forward choice, so that code for
    # a GPU contains no operation of the CPU's algorithms.
    return lax.platform_dependent(
        *residuals,
        dy,
        cpu=functools.partial(_compute_gradients_on_cpu, strides),
        tpu=functools.partial(_compute_gradients_on_tpu, strides),
        default=functools.partial(_native.compute_all_gradients, strides),
    )


_convolve.defvjp(_convolve_fwd, _convolve_bwd)


def _convolve_natively(strides, x, w, b):
    y = _native.convolve(strides, x, w)
    return y + jnp.broadcast_to(b, y.shape)


def _compute_gradients_on_tpu(strides, x, w, dy):
    return *_native.differentiate(strides, x, w, dy), jnp.sum(dy, (0, 1, 2))


def _convolve_on_cpu(strides, x, w, b):
    plan = plan_axes(x.shape[1:3], w.shape, strides, x.dtype.name)
    y = _toom_cook.convolve(plan, x, w) if plan else _choose_direct(w).convolve(strides, x, w)
    return (y + jnp.broadcast_to(b, y.shape)).astype(x.dtype)


def _compute_gradients_on_cpu(strides, x, w, dy):
    # A matrix product, since XLA's sum of bfloat16 over leading axes takes ten times as long.
    flat = dy.reshape(-1, dy.shape[3])
    db = contract(jnp.ones(flat.shape[0], dy.dtype), flat, ((0,), (0,)))
    plan, direct = plan_axes(x.shape[1:3], w.shape, strides, x.dtype.name), _choose_direct(w)
    if plan:
        dx, dw = _toom_cook.compute_gradients(plan, x, w, dy)
    elif direct is _native and _shifts.pay(strides, w):
        dx = _native.compute_dx(strides, x.shape, w, dy)
        dw = _shifts.compute_dw(x, w, dy).astype(w.dtype)
    else:
        dx, dw = direct.compute_gradients(strides, x, w, dy)
    return dx, dw, db.astype(dy.dtype)


def _choose_direct(w: Array) -> Any:
    """Chooses patches times kernel for few channels or a 1×1 kernel, else the library's own."""
    rows, columns, channels, _ = w.shape
    return _patches if channels < 16 or rows == columns == 1 else _native
