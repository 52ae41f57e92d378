"""Augmentation by affine maps and elastic distortions, in one interpolation."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from capsjax._vectors import at_least_float32, float_dtype


def warp(
    key: jax.Array,
    images: jax.Array,
    *,
    rotation: float = 0.0,
    shear: float = 0.0,
    zoom: float = 0.0,
    shift: float = 0.0,
    elastic: float = 0.0,
) -> jax.Array:
    """Warps every image by a random map of its own, with one bilinear interpolation.

    y[p] = x[A (p − m) + m − t + e(p)],   A = R(θ) [[1, 0], [tan φ, 1]] diag(1/z_r, 1/z_c)

    m is the centre of the image, and pixels outside it count as 0. θ, φ and both numbers of t are
    uniform between plus and minus their limit, z_r and z_c between 1 − zoom and 1 + zoom. e is a
    smooth field of normal displacements. Their correlation at a distance r along an axis is
    exp(−r²/4ρ²), where ρ is a seventh of the image's height or width.

    Args:
      key: a random key.
      images: [B, H, W, C], of any dtype.
      rotation: limit of θ, in degrees.
      shear: limit of φ, the slant of vertical lines, in degrees.
      zoom: limit of |z − 1|, drawn apart for rows and columns.
      shift: limit of |t|, in pixels.
      elastic: standard deviation of both numbers of e, in pixels.

    Returns:
      Images of the same shape, in their float dtype, float32 for integers. How the batch is sharded
      does not change them.

    Raises:
      ValueError: if `images` does not have four axes, or a limit is out of range.

    Example:
      >>> import jax, jax.numpy as jnp, capsjax
      >>> images = jnp.ones((2, 28, 28, 1))
      >>> capsjax.data.warp(jax.random.key(0), images, rotation=10, zoom=0.2, shift=2.8).shape
      (2, 28, 28, 1)

    References:
      Simard, Steinkraus, Platt, "Best Practices for Convolutional Neural Networks Applied to Visual
      Document Analysis", 2003, §2.
    """
    images = jnp.asarray(images)
    _check_warp(images, rotation, shear, zoom, shift, elastic)
    limits = jnp.array([[rotation, shear, zoom, zoom, shift, shift]], jnp.float32)
    draws = limits * jax.random.uniform(key, (len(images), 6), minval=-1, maxval=1)
    # A key of its own, so that what is drawn above does not depend on `elastic`.
    field = elastic * _draw_fields(jax.random.fold_in(key, 1), images.shape) if elastic else 0.0
    in_axes = (0, 0, 0 if elastic else None)
    warped = jax.vmap(_warp_image, in_axes)(at_least_float32(images), draws, field)
    return warped.astype(float_dtype(images))


def _draw_fields(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws smooth fields [B, H, W, 2], each number of standard deviation 1.

    e = G_r ε G_cᵀ with normal ε on a coarse grid, and the rows of G of length 1.
    """
    batch, *size, _ = shape
    rows, columns = map(_smoothing, size)
    noise = jax.random.normal(key, (batch, rows.shape[1], columns.shape[1], 2))
    return jnp.einsum("hr,brcx,wc->bhwx", rows, noise, columns)


def _smoothing(size: int) -> jax.Array:
    """Returns the Gaussian weights [size, knots] of the knots of a grid at each pixel.

    The knots lie one standard deviation apart, and beyond both ends of the image two more.
    """
    knots = jnp.linspace(-2 / 7, 1 + 2 / 7, 12)
    pixels = (jnp.arange(size) + 0.5) / size
    weights = jnp.exp(-((7 * (pixels[:, None] - knots[None])) ** 2) / 2)
    return weights / jnp.linalg.norm(weights, axis=1, keepdims=True)


def _warp_image(image: jax.Array, draws: jax.Array, field: ArrayLike = 0.0) -> jax.Array:
    """Warps one image [H, W, C] by its six draws and its displacements [H, W, 2]."""
    theta, phi = jnp.radians(draws[:2])
    rotate = jnp.array([[jnp.cos(theta), -jnp.sin(theta)], [jnp.sin(theta), jnp.cos(theta)]])
    slant = jnp.array([[1.0, 0.0], [jnp.tan(phi), 1.0]])
    matrix = rotate @ slant / (1 + draws[2:4])[None, :]
    rows, columns, _ = image.shape
    centre = jnp.array([[[rows - 1, columns - 1]]], jnp.float32) / 2  # [1, 1, 2]
    pixels = jnp.stack(jnp.mgrid[:rows, :columns], -1)  # [H, W, 2]
    points = (pixels - centre) @ matrix.T + centre - draws[None, None, 4:]
    return _interpolate(image, points + field)


def _interpolate(image: jax.Array, points: jax.Array) -> jax.Array:
    """Interpolates an image [H, W, C] at points [H, W, 2]; outside the image it is 0."""
    height, width, channels = image.shape
    framed = jnp.pad(image, ((1, 1), (1, 1), (0, 0))).reshape(-1, channels)
    last = jnp.array([[[height, width]]])
    points = jnp.clip(points + 1, 0, last + 1)  # beyond the frame of zeros there are only zeros
    corner = jnp.minimum(jnp.floor(points), last)
    row, column = jnp.moveaxis(corner.astype(jnp.int32), -1, 0)
    down, right = jnp.moveaxis((points - corner)[..., None], 2, 0)  # [H, W, 1]
    upper, lower = (
        (1 - right) * framed[start] + right * framed[start + 1]
        for start in (row * (width + 2) + column, (row + 1) * (width + 2) + column)
    )
    return (1 - down) * upper + down * lower


def _check_warp(
    images: jax.Array, rotation: float, shear: float, zoom: float, shift: float, elastic: float
) -> None:
    if images.ndim != 4:
        raise ValueError(f"warp: expected images [B, H, W, C], got shape {list(images.shape)}")
    for name, limit, most in (
        ("rotation", rotation, 180),
        ("shear", shear, 89),
        ("zoom", zoom, 0.99),
        ("shift", shift, max(images.shape[1:3])),
        ("elastic", elastic, max(images.shape[1:3])),
    ):
        if not 0 <= limit <= most:
            raise ValueError(f"warp: expected {name} from 0 to {most}, got {limit}")
