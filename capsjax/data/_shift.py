"""Augmentation: pure, key-first and jittable."""

import functools

import jax
import jax.numpy as jnp


def shift(key: jax.Array, images: jax.Array, max_pixels: int) -> jax.Array:
    """Moves every image by its own whole number of pixels, filling with zeros.

    y[b, r, c] = x[b, r − Δr_b, c − Δc_b], with (Δr_b, Δc_b) uniform on {−m, …, m}², m = max_pixels.

    Args:
      key: a random key.
      images: `[B, H, W, C]`, any dtype.
      max_pixels: the farthest move along each axis, in pixels; 0 leaves the images as they are.

    Returns:
      Images of the same shape and dtype. How the batch is sharded does not change them.

    Raises:
      ValueError: `images` has not four axes; `max_pixels` is negative or as large as the image.

    Reference: Sabour et al. 2017, §5 (up to 2 pixels), https://arxiv.org/abs/1710.09829

    >>> import jax, jax.numpy as jnp
    >>> images = jnp.ones((2, 4, 4, 1), jnp.uint8)
    >>> shift(jax.random.key(0), images, 2).shape
    (2, 4, 4, 1)
    """
    if images.ndim != 4:
        raise ValueError(f"expected images [B, H, W, C], came shape {images.shape}")
    batch, *window = images.shape
    if not 0 <= max_pixels < min(window[:2]):
        raise ValueError(
            f"expected max_pixels from 0 to {min(window[:2]) - 1} for images of {window[0]} × "
            f"{window[1]}, came {max_pixels}"
        )
    if max_pixels == 0:
        return images
    margin = (max_pixels, max_pixels)
    padded = jnp.pad(images, ((0, 0), margin, margin, (0, 0)))
    starts = jax.random.randint(key, (batch, 2), 0, 2 * max_pixels + 1)
    return jax.vmap(functools.partial(_cut, shape=window))(padded, starts)


def _cut(image: jax.Array, start: jax.Array, *, shape: list[int]) -> jax.Array:
    return jax.lax.dynamic_slice(image, (start[0], start[1], 0), shape)
