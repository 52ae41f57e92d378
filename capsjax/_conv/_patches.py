"""Convolution as one matrix product: patches under the kernel times kernel (im2col)."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from capsjax._conv._matmul import contract
from capsjax._vectors import at_least_float32


def convolve(strides: tuple[int, int], x: Array, w: Array) -> Array:
    """Convolves images [B, H, W, C] with a kernel [P, Q, C, O]; returns float32 [B, H', W', O]."""
    return contract(_extract_patches(strides, w.shape[:2], x, 3), w, ((3, 4, 5), (0, 1, 2)))


def compute_gradients(
    strides: tuple[int, int], x: Array, w: Array, dy: Array
) -> tuple[Array, Array]:
    """Computes the gradients of images and kernel from that of the outputs [B, H', W', O]."""
    patches = _extract_patches(strides, w.shape[:2], x, 0)  # [P, Q, B, H', W', C]
    patches = jnp.moveaxis(patches, 5, 2)  # [P, Q, C, B, H', W']
    dw = contract(patches, dy, ((3, 4, 5), (0, 1, 2)))
    dpatches = contract(dy, w, ((3,), (3,)))  # [B, H', W', P, Q, C]
    _, scatter = jax.vjp(
        lambda x: _extract_patches(strides, w.shape[:2], x, 3), at_least_float32(x)
    )
    (dx,) = scatter(dpatches)
    return dx.astype(x.dtype), dw.astype(w.dtype)


def _extract_patches(strides, taps, x, at):
    """Stacks the inputs of each tap: [P, Q, B, H', W', C] at 0, [B, H', W', P, Q, C] at 3."""
    for axis in (1, 0):
        n, s = taps[axis], strides[axis]
        dim = axis + 1 if at else axis - 3
        length = (x.shape[dim] - n) // s * s + 1
        x = jnp.stack([lax.slice_in_dim(x, i, i + length, s, axis=dim) for i in range(n)], at)
    return x
