"""Augmentation: pure, key-first and jittable."""

import functools

import jax
import jax.numpy as jnp


def shift(key: jax.Array, images: jax.Array, max_pixels: int) -> jax.Array:
    """Shifts each image by its own random whole number of pixels and fills with zeros.

    y[b, r, c] = x[b, r − Δr_b, c − Δc_b], with (Δr_b, Δc_b) uniform on {−m, …, m}², m = max_pixels

    Args:
      key: a random key.
      images: x [B, H, W, C], of any dtype.
      max_pixels: m, the largest shift along each axis; 0 returns the images unchanged.

    Returns:
      y [B, H, W, C], of the same dtype. The result does not depend on how the batch is sharded.

    Raises:
      ValueError: if `images` does not have four axes, or if `max_pixels` is negative or not less
        than the height and the width.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from capsjax.data import shift
      >>> images = jnp.ones((2, 4, 4, 1), jnp.uint8)
      >>> shift(jax.random.key(0), images, 2).shape
      (2, 4, 4, 1)

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, §5, which shifts by up to 2 pixels.
    """
    if images.ndim != 4:
        raise ValueError(f"shift: expected images [B, H, W, C], got shape {images.shape}")
    batch, *shape = images.shape
    if not 0 <= max_pixels < min(shape[:2]):
        raise ValueError(
            f"shift: expected max_pixels from 0 to {min(shape[:2]) - 1} for images of {shape[0]} × "
            f"{shape[1]}, got {max_pixels}"
        )
    if max_pixels == 0:
        return images
    margin = (max_pixels, max_pixels)
    padded = jnp.pad(images, ((0, 0), margin, margin, (0, 0)))
    starts = jax.random.randint(key, (batch, 2), 0, 2 * max_pixels + 1)
    return jax.vmap(functools.partial(_crop, shape=shape))(padded, starts)


def crop(key: jax.Array | None, images: jax.Array, size: int) -> jax.Array:
    """Cuts a window out of each image, at random or in the middle.

    y[b, r, c] = x[b, r + r_b, c + c_b], with (r_b, c_b) uniform on {0, …, H − s} × {0, …, W − s}

    Args:
      key: a random key; None: the windows lie in the middle.
      images: x [B, H, W, C], of any dtype.
      size: s, the height and the width of the windows.

    Returns:
      y [B, s, s, C], of the same dtype. The result does not depend on how the batch is sharded.

    Raises:
      ValueError: if `images` does not have four axes, or if `size` is less than 1 or more than the
        height or the width.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from capsjax.data import crop
      >>> crop(jax.random.key(0), jnp.ones((2, 48, 48, 2), jnp.uint8), 32).shape
      (2, 32, 32, 2)

    References:
      Hinton, Sabour, Frosst, "Matrix Capsules with EM Routing", ICLR 2018, §5.
    """
    if images.ndim != 4:
        raise ValueError(f"crop: expected images [B, H, W, C], got shape {images.shape}")
    batch, height, width, channels = images.shape
    if not 1 <= size <= min(height, width):
        raise ValueError(
            f"crop: expected a size from 1 to {min(height, width)} for images of {height} × "
            f"{width}, got {size}"
        )
    room = jnp.array([[height - size, width - size]])
    if key is None:
        starts = jnp.broadcast_to(room // 2, (batch, 2))
    else:
        starts = jax.random.randint(key, (batch, 2), 0, room + 1)
    return jax.vmap(functools.partial(_crop, shape=[size, size, channels]))(images, starts)


def _crop(image: jax.Array, start: jax.Array, *, shape: list[int]) -> jax.Array:
    """Cuts a window out of one image."""
    return jax.lax.dynamic_slice(image, (start[0], start[1], 0), shape)
