"""Capsules by their activation: which are dead, and how the class scores are distributed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from capsjax._labels import to_targets
from capsjax._vectors import at_least_float32


def dead(activations: ArrayLike, *, threshold: float = 0.01) -> jax.Array:
    """Finds the capsules that no example activates.

    dead_i = mean_n a_ni < threshold and std_n a_ni < threshold

    Args:
      activations: a [N, ...] of N examples: `capsjax.length(u)`, or the activations themselves
        where capsules have them beside their poses.
      threshold: a capsule below it is dead.

    Returns:
      bool [...].

    Raises:
      ValueError: if there is no example.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> u = jnp.ones((100, 1152, 8)).at[:, :288].set(0)
      >>> float(capsjax.diagnostics.dead(capsjax.length(u)).mean())
      0.25

    References:
      Mitterreiter, Koch, Giesen, Laue, "Why Capsule Neural Networks Do Not Scale", 2023,
      arXiv:2301.01583; matthiasware/EfficientCN, misc/metrics.py.
    """
    a = at_least_float32(jnp.asarray(activations))
    if not a.ndim or not len(a):
        raise ValueError(f"dead: expected activations [N, ...], N ≥ 1, got {list(a.shape)}")
    return (jnp.mean(a, 0) < threshold) & (jnp.std(a, 0) < threshold)


class ScoreHistogram(NamedTuple):
    """How often the score of a class falls into each of equal bins from 0 to 1."""

    present: jax.Array  # int32 [j, bins]: in examples that show the class
    absent: jax.Array  # int32 [j, bins]: in examples that do not


def score_histogram(scores: ArrayLike, labels: ArrayLike, *, bins: int = 50) -> ScoreHistogram:
    """Counts the class scores by size, apart for examples with and without the class.

    present_jb = #{n : T_nj = 1, ⌊bins · scores_nj⌋ = b}, absent_jb the same for T_nj = 0

    Args:
      scores: [..., j], lengths of class capsules or activations; one outside [0, 1] counts in the
        bin next to it.
      labels: class numbers [...] or k-hot [..., j].
      bins: their number.

    Returns:
      `ScoreHistogram` of two int32 arrays [j, bins].

    Raises:
      ValueError: if labels do not fit the scores, or there is not even one bin.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> scores = jnp.array([[0.9, 0.1], [0.4, 0.3]])
      >>> histogram = capsjax.diagnostics.score_histogram(scores, jnp.array([0, 1]), bins=2)
      >>> histogram.present.tolist(), histogram.absent.tolist()
      ([[0, 1], [1, 0]], [[1, 0], [1, 0]])

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, §3: what the margin loss pulls apart.
    """
    scores = at_least_float32(jnp.asarray(scores))
    if not scores.ndim or bins < 1:
        raise ValueError(
            f"score_histogram: expected scores [..., j] and 1 bin or more, got "
            f"{list(scores.shape)} and {bins}"
        )
    shown = to_targets(labels, scores.shape) > 0
    bin_of = jnp.clip(jnp.floor(bins * scores), 0, bins - 1).astype(jnp.int32)
    class_of = jnp.broadcast_to(jnp.arange(scores.shape[-1]), scores.shape)
    counts = jnp.zeros((2, scores.shape[-1], bins), jnp.int32)
    counts = counts.at[shown.astype(jnp.int32), class_of, bin_of].add(1)
    return ScoreHistogram(present=counts[1], absent=counts[0])
