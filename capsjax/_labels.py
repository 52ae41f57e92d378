"""Classes: labels in every form as one array of targets, and the class of the highest score."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def to_targets(labels: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Returns labels as float32 targets T of `shape` [..., j]: 1 where class j is present.

    Class numbers have the shape [...], one-hot and k-hot labels the shape [..., j].

    Raises:
      ValueError: if `labels` has neither shape, or holds class numbers that are not integers from 0
        to j − 1. Under jit, where values are not known, another number stands for no class.
    """
    labels = jnp.asarray(labels)
    if labels.shape == shape:
        return labels.astype(jnp.float32)
    if labels.shape != shape[:-1]:
        raise ValueError(
            f"labels: expected class numbers of shape {list(shape[:-1])} or one-hot labels of "
            f"shape {list(shape)}, got {list(labels.shape)}"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels: class numbers must be integers, got {labels.dtype}")
    if not isinstance(labels, jax.core.Tracer):
        _check_range(labels, shape[-1])
    return jax.nn.one_hot(labels, shape[-1], dtype=jnp.float32)


def _check_range(labels: jax.Array, num_classes: int) -> None:
    numbers = np.asarray(labels)
    wrong = numbers[(numbers < 0) | (numbers >= num_classes)]
    if wrong.size:
        raise ValueError(
            f"labels: class numbers of {num_classes} classes are 0 to {num_classes - 1}, got "
            f"{wrong.flat[0]}"
        )


def pick_highest(scores: jax.Array) -> jax.Array:
    """Returns the class of the highest score, int32 [...], for scores [..., j]."""
    return jnp.argmax(scores, -1).astype(jnp.int32)
