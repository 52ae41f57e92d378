"""The convolution of the platform's own library, and both gradients as operations of that library.

For a GPU, XLA compiles JAX's gradients of a strided convolution as convolutions of arrays that are
spread out with zeros. So both are written in the forms by which XLA recognises the library's
operations. A TPU skips the zeros by itself.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

_CHANNEL_MULTIPLE = 8  # to which cuDNN pads the channels of 16-bit images


def convolve(strides: tuple[int, int], x: Array, w: Array) -> Array:
    """Convolves images [B, H, W, C] with a kernel [P, Q, C, O]."""
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, strides, "VALID", dimension_numbers=dims)


def differentiate(strides: tuple[int, int], x: Array, w: Array, dy: Array) -> tuple[Array, Array]:
    """Returns the gradients of images and kernel as JAX derives them: the best form for a TPU."""
    dx, dw = jax.vjp(functools.partial(convolve, strides), x, w)[1](dy)
    return dx, dw


def compute_gradients(
    strides: tuple[int, int], x: Array, w: Array, dy: Array
) -> tuple[Array, Array]:
    """Returns the gradients of images and kernel: the best form but for a TPU."""
    return compute_dx(strides, x.shape, w, dy), _compute_dw(strides, x, w.shape, dy)


def compute_all_gradients(
    strides: tuple[int, int], x: Array, w: Array, dy: Array
) -> tuple[Array, Array, Array]:
    """Returns the gradients of images, kernel and bias: the best form for a GPU."""
    dx, channels = compute_dx(strides, x.shape, w, dy), x.shape[3]
    if channels % _CHANNEL_MULTIPLE == 0 or dy.dtype.itemsize > 2:
        return dx, _compute_dw(strides, x, w.shape, dy), jnp.sum(dy, (0, 1, 2))
    # A channel of ones fits into the padding, and the gradient of each of its taps is the bias's,
    # Σ dy. Few channels come with large images, for which a sum would read all of dy once more.
    with_ones = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1)
    dw = _compute_dw(strides, with_ones, (*w.shape[:2], channels + 1, w.shape[3]), dy)
    return dx, dw[:, :, :-1], dw[0, 0, -1]


def _compute_dw(strides, x, shape, dy) -> Array:
    """Convolves the images with dy, the channels as examples; what no patch covers is left out."""
    sizes = zip(x.shape[1:3], dy.shape[1:3], strides, shape[:2], strict=True)
    unused = [h - (n - 1) * s - k for h, n, s, k in sizes]
    if all(n <= k for n, k in zip(dy.shape[1:3], shape[:2], strict=True)):
        # XLA takes this for a forward convolution, for which it would pad instead of crop.
        x = x[:, : x.shape[1] - unused[0], : x.shape[2] - unused[1]]
        unused = [0, 0]
    return lax.conv_general_dilated(
        x,
        dy,
        (1, 1),
        [(0, -n) for n in unused],
        rhs_dilation=strides,
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
    )


def compute_dx(strides: tuple[int, int], shape: tuple[int, ...], w: Array, dy: Array) -> Array:
    """Returns the gradient of images of a shape.

    Convolves dy with the taps of each residue: row s r + p of an image meets taps p, p + s, …
    """
    batch, height, width, channels = shape
    (s, t), (rows, columns) = strides, (-(-height // strides[0]), -(-width // strides[1]))
    parts = [_spread(w[p::s, q::t], dy, rows, columns) for p in range(s) for q in range(t)]
    if len(parts) == 1:
        return parts[0]
    grid = jnp.stack(parts, 3).reshape(batch, rows, columns, s, t, channels)
    pixels = grid.swapaxes(2, 3).reshape(batch, s * rows, t * columns, channels)
    return pixels[:, :height, :width]


def _spread(w: Array, dy: Array, rows: int, columns: int) -> Array:
    """Returns the images' gradient of a convolution of stride 1, padded with zeros to a size."""
    taps = w.shape[:2]
    if 0 in taps:  # the stride leaves these pixels out
        return jnp.zeros((dy.shape[0], rows, columns, w.shape[2]), dy.dtype)
    full = [(n - 1, n - 1) for n in taps]
    dims = ("NHWC", "HWOI", "NHWC")
    dx = lax.conv_general_dilated(dy, lax.rev(w, (0, 1)), (1, 1), full, dimension_numbers=dims)
    return jnp.pad(dx, ((0, 0), (0, rows - dx.shape[1]), (0, columns - dx.shape[2]), (0, 0)))
