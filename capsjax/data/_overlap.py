"""Overlapping digits: the pairs of MultiMNIST, pure, key-first and jittable."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from capsjax.data._shift import shift as shift_images


class Pairs(NamedTuple):
    """Images of two digits each.

    Attributes:
      images: [B, canvas, canvas, C], both digits over each other, in the dtype of the data set.
      labels: class numbers [B, 2], of the base and of the top.
      digits: [B, 2, canvas, canvas, C], each digit alone, where it lies in `images`.
    """

    images: jax.Array
    labels: jax.Array
    digits: jax.Array


def overlap(
    key: jax.Array,
    images: Any,
    labels: ArrayLike,
    indices: ArrayLike,
    *,
    pool: ArrayLike | None = None,
    shift: int = 4,
    canvas: int = 36,
) -> Pairs:
    """Lays over each image another one, drawn from those of other classes, and clips the sum.

    y = min(255, base + top), each in the middle of the canvas and shifted by its own random number
    of pixels, uniform on {−shift, …, shift}²; for floats 1 in place of 255

    The authors shift each base once, lay 1,000 tops over it, and so enumerate 60 million pairs;
    here every pair draws its top and both shifts anew.

    Args:
      key: a random key.
      images: a whole data set [N, H, W, C], uint8, or floats from 0 to 1; an array or
        `capsjax.sharding.PlacedImages`.
      labels: class numbers [N].
      indices: of the bases, [B].
      pool: indices [P] of the images that tops are drawn from, each as likely; None: all. With
        `indices` themselves no image outside of the batch is seen. If the pool holds only the
        base's class, the top is the pool's first image.
      shift: the largest shift in each direction, in pixels.
      canvas: the height and width of the result, larger than the images' by twice the shift or
        more.

    Returns:
      `Pairs`.

    Raises:
      ValueError: if a shape does not fit, or the shifted images exceed the canvas.

    Example:
      >>> import jax, jax.numpy as jnp, capsjax
      >>> images, labels = jnp.ones((50, 28, 28, 1), jnp.uint8), jnp.arange(50) % 10
      >>> pairs = capsjax.data.overlap(jax.random.key(0), images, labels, jnp.arange(8))
      >>> pairs.images.shape, pairs.labels.shape, pairs.digits.shape
      ((8, 36, 36, 1), (8, 2), (8, 2, 36, 36, 1))

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, §6; Sarasra/models, research/capsules.
    """
    images = jnp.asarray(images) if isinstance(images, np.ndarray) else images
    labels, indices = jnp.asarray(labels), jnp.asarray(indices)
    pool = jnp.arange(len(images)) if pool is None else jnp.asarray(pool)
    _check(images, labels, indices, pool, shift, canvas)
    draw, *move = jax.random.split(key, 3)
    tops = _draw_others(draw, labels[indices], pool, labels[pool])
    digits = jnp.stack(
        [
            shift_images(which, _centre(images[chosen], canvas), shift)
            for which, chosen in zip(move, (indices, tops), strict=True)
        ],
        1,
    )
    return Pairs(_add(*digits.swapaxes(0, 1)), labels[jnp.stack([indices, tops], 1)], digits)


def _draw_others(
    key: jax.Array, labels: jax.Array, pool: jax.Array, pool_labels: jax.Array
) -> jax.Array:
    """Draws for each label an element of the pool that has another one."""
    others = pool_labels[None] != labels[:, None]  # [B, P]
    ranks = jnp.cumsum(others, 1)
    chosen = jax.random.randint(key, labels.shape, 0, jnp.maximum(ranks[:, -1], 1))
    return pool[jnp.argmax(ranks > chosen[:, None], 1)]


def _centre(images: jax.Array, canvas: int) -> jax.Array:
    margins = [((canvas - n) // 2, (canvas - n + 1) // 2) for n in images.shape[1:3]]
    return jnp.pad(images, ((0, 0), *margins, (0, 0)))


def _add(base: jax.Array, top: jax.Array) -> jax.Array:
    if jnp.issubdtype(base.dtype, jnp.floating):
        return jnp.minimum(base + top, 1)
    most = jnp.iinfo(base.dtype).max
    return base + jnp.minimum(top, most - base)  # no overflow


def _check(
    images: Any, labels: jax.Array, indices: jax.Array, pool: jax.Array, shift: int, canvas: int
) -> None:
    shape = images.shape
    if len(shape) != 4 or labels.shape != shape[:1] or indices.ndim != 1:
        raise ValueError(
            "overlap: expected images [N, H, W, C], labels [N] and indices [B], got "
            f"{list(shape)}, {list(labels.shape)} and {list(indices.shape)}"
        )
    if pool.ndim != 1 or not len(pool):
        raise ValueError(f"overlap: expected a pool [P] of an image or more, got {[*pool.shape]}")
    height, width = shape[1:3]
    if shift < 0 or min(canvas - height, canvas - width) < 2 * shift:
        raise ValueError(
            f"overlap: images of {height} × {width}, shifted by up to {shift} pixels, do not fit "
            f"into {canvas} × {canvas}"
        )
