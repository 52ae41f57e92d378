"""Valid convolution that is fast on the platform it is lowered for.

On a GPU or a TPU that is the platform's own convolution. On a CPU XLA's is slow, its weight gradient
above all, so there the convolution is one matrix product of patches and kernel.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax


def conv(x: Array, kernel: Array, *, strides: int | tuple[int, int] = 1) -> Array:
    """Convolves images with a kernel, without padding.

    y[..., h, w, o] = Σ_{p,q,c} x[..., s h + p, s w + q, c] kernel[p, q, c, o]

    Args:
      x: images `[..., H, W, C]`, any number of leading axes.
      kernel: `[P, Q, C, O]`.
      strides: step between neighbouring outputs, one for both axes or (rows, columns).

    Returns:
      `[..., (H - P) // s + 1, (W - Q) // s + 1, O]` in the dtype of `x`; sums run in float32.

    Raises:
      ValueError: a shape or a stride does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> conv(jnp.ones((2, 28, 28, 1)), jnp.ones((9, 9, 1, 256))).shape
      (2, 20, 20, 256)
    """
    strides = (strides, strides) if isinstance(strides, int) else tuple(strides)
    _check(x.shape, kernel.shape, strides)
    lead, image = x.shape[:-3], x.shape[-3:]
    x = x.reshape(math.prod(lead), *image)
    y = _conv(strides, *_vary_alike(x, kernel.astype(x.dtype)))
    return y.reshape(*lead, *y.shape[1:])


def _check(x: tuple[int, ...], kernel: tuple[int, ...], strides: tuple[int, ...]) -> None:
    if len(x) < 3:
        raise ValueError(f"x must be [..., H, W, C], got shape {x}")
    if len(kernel) != 4:
        raise ValueError(f"kernel must be [rows, columns, in, out], got shape {kernel}")
    if x[-1] != kernel[2]:
        raise ValueError(f"x {x} has {x[-1]} channels, kernel {kernel} reads {kernel[2]}")
    if kernel[0] > x[-3] or kernel[1] > x[-2] or min(kernel[:2]) < 1:
        raise ValueError(
            f"kernel of {kernel[0]}x{kernel[1]} does not fit into an image of {x[-3]}x{x[-2]}: "
            "take a smaller kernel or larger images"
        )
    if len(strides) != 2 or min(strides) < 1:
        raise ValueError(f"strides must be one or two integers >= 1, got {strides}")


def _vary_alike(x, w):
    """Inside shard_map: the gradient of what only one of the two is split along is then summed."""
    x_axes, w_axes = (jax.typeof(a).manual_axis_type.varying for a in (x, w))
    return (
        lax.pcast(x, tuple(w_axes - x_axes), to="varying"),
        lax.pcast(w, tuple(x_axes - w_axes), to="varying"),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(strides, x, w):
    return lax.platform_dependent(
        x,
        w,
        cpu=functools.partial(_patches_conv, strides),
        default=functools.partial(_lax_conv, strides),
    )


def _conv_fwd(strides, x, w):
    return _conv(strides, x, w), (x, w)


def _conv_bwd(strides, residuals, dy):
    return lax.platform_dependent(
        *residuals,
        dy,
        cpu=functools.partial(_patches_conv_bwd, strides),
        default=lambda x, w, dy: jax.vjp(functools.partial(_lax_conv, strides), x, w)[1](dy),
    )


_conv.defvjp(_conv_fwd, _conv_bwd)


def _lax_conv(strides, x, w):
    return lax.conv_general_dilated(
        x, w, strides, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _patches(strides, size, x, axis):
    """The [B, H', W', C] slices of x under each of the kernel's taps, stacked along `axis`."""
    (P, Q), (s, t) = size, strides
    H, W = (x.shape[1] - P) // s * s + 1, (x.shape[2] - Q) // t * t + 1
    rows = [lax.slice_in_dim(x, p, p + H, s, axis=1) for p in range(P)]
    return jnp.stack(
        [lax.slice_in_dim(row, q, q + W, t, axis=2) for row in rows for q in range(Q)], axis
    )


def _patches_conv(strides, x, w):
    patches = _patches(strides, w.shape[:2], x, 3)  # [B, H', W', P Q, C]
    y = lax.dot_general(
        patches,
        w.reshape(-1, *w.shape[2:]),
        (((3, 4), (0, 1)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return y.astype(x.dtype)


def _patches_conv_bwd(strides, x, w, dy):
    P, Q, C, O = w.shape
    patches = _patches(strides, (P, Q), x, 0)  # [P Q, B, H', W', C]
    patches = jnp.moveaxis(patches, 4, 1)
    dw = lax.dot_general(
        patches, dy, (((2, 3, 4), (0, 1, 2)), ((), ())), preferred_element_type=jnp.float32
    )
    dpatches = lax.dot_general(
        dy,
        w.reshape(P * Q, C, O),
        (((3,), (2,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    _, scatter = jax.vjp(lambda x: _patches(strides, (P, Q), x, 3), x.astype(jnp.float32))
    (dx,) = scatter(dpatches)
    return dx.astype(x.dtype), dw.reshape(w.shape).astype(w.dtype)
