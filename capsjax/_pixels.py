"""Pixels: from the integers that data sets store to the numbers that networks take."""

import jax
import jax.numpy as jnp
import numpy as np


def to_unit_interval(images: jax.Array | np.ndarray) -> jax.Array:
    """Turns integer pixels from 0 to 255 into float32 from 0 to 1; floats stay as they are.

    Booleans become 0 and 1.
    """
    images = jnp.asarray(images)
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    highest = 1 if images.dtype == bool else 255
    return images.astype(jnp.float32) / highest
