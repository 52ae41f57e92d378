"""Losses of class scores, of reconstructions, and their weighted sum."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from capsjax._labels import to_targets
from capsjax._vectors import at_least_float32

Loss = Literal["margin", "spread", "cross_entropy"]  # of class scores, by name


def margin_loss(
    lengths: ArrayLike,
    labels: ArrayLike,
    *,
    m_plus: float = 0.9,
    m_minus: float = 0.1,
    down_weight: float = 0.5,
) -> jax.Array:
    """Computes the margin loss: present classes want |v| > m⁺, absent ones |v| < m⁻.

    L = Σ_j T_j max(0, m⁺ − |v_j|)² + λ (1 − T_j) max(0, |v_j| − m⁻)²        (eq. 4)

    Args:
      lengths: |v| [..., j], of any float dtype.
      labels: class numbers [...], or one-hot or k-hot labels T [..., j].
      m_plus: m⁺.
      m_minus: m⁻.
      down_weight: λ, which keeps the first steps from shrinking all capsules.

    Returns:
      The loss of each example, [...], float32.

    Raises:
      ValueError: if `labels` does not fit `lengths`.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> round(float(capsjax.margin_loss(jnp.array([0.4, 0.2]), 0)), 4)   # 0.5² + 0.5 · 0.1²
      0.255

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, eq. 4.
    """
    lengths = at_least_float32(jnp.asarray(lengths))
    if not lengths.ndim:
        raise ValueError("margin_loss: expected lengths [..., j], got a scalar")
    present = to_targets(labels, lengths.shape)
    too_short = jnp.square(jnp.maximum(0, m_plus - lengths))
    too_long = jnp.square(jnp.maximum(0, lengths - m_minus))
    return jnp.sum(present * too_short + down_weight * (1 - present) * too_long, -1)


def spread_loss(activations: ArrayLike, labels: ArrayLike, margin: ArrayLike) -> jax.Array:
    """Computes the spread loss: the present class wants to lead each absent one by a margin.

    L = Σ_{j≠t} max(0, m − (a_t − a_j))²

    Of several present classes each wants to lead: the loss is the sum over them,
    Σ_t T_t Σ_j (1 − T_j) max(0, m − (a_t − a_j))².

    Args:
      activations: a [..., j], of any float dtype.
      labels: class numbers t [...], or one-hot or k-hot labels T [..., j].
      margin: m, a scalar array, so that raising it compiles nothing anew.

    Returns:
      The loss of each example, [...], float32.

    Raises:
      ValueError: if `labels` does not fit `activations`, or `margin` is no scalar.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> a = jnp.array([0.6, 0.5, 0.1])
      >>> round(float(capsjax.spread_loss(a, 0, 0.2)), 4)     # (0.2 − 0.1)²; 0.6 − 0.1 is enough
      0.01

    References:
      Hinton, Sabour, Frosst, "Matrix Capsules with EM Routing", ICLR 2018.
    """
    activations, margin = at_least_float32(jnp.asarray(activations)), jnp.asarray(margin)
    if not activations.ndim or margin.ndim:
        raise ValueError(
            "spread_loss: expected activations [..., j] and a scalar margin, got "
            f"{list(activations.shape)} and {list(margin.shape)}"
        )
    present = to_targets(labels, activations.shape)
    lead = activations[..., :, None] - activations[..., None, :]  # a_t − a_j [..., t, j]
    pairs = present[..., :, None] * (1 - present[..., None, :])
    return jnp.sum(pairs * jnp.square(jnp.maximum(0, margin - lead)), (-2, -1))


def cross_entropy(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Computes the cross-entropy of the softmax of class scores.

    L = −Σ_j T_j / (Σ_j' T_j') log softmax(logits)_j

    Args:
      logits: [..., j], of any float dtype. Lengths of capsules will do, but as none exceeds 1 they
        leave a loss of at least log(1 + (j − 1) / e).
      labels: class numbers [...], or one-hot or k-hot labels T [..., j]; k present classes share
        the probability, 1/k each. An example of no class costs nothing.

    Returns:
      The loss of each example, [...], float32.

    Raises:
      ValueError: if `labels` does not fit `logits`.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> round(float(capsjax.cross_entropy(jnp.zeros(4), 2)), 4)                  # log 4
      1.3863
    """
    logits = at_least_float32(jnp.asarray(logits))
    if not logits.ndim:
        raise ValueError("cross_entropy: expected logits [..., j], got a scalar")
    present = to_targets(labels, logits.shape)
    count = jnp.sum(present, -1)
    # Not 0 · log 0: a class whose logit is −∞ costs nothing unless it is present.
    surprise = -jnp.sum(jnp.where(present > 0, present * jax.nn.log_softmax(logits), 0), -1)
    return surprise / jnp.where(count > 0, count, 1)


def reconstruction_loss(reconstruction: ArrayLike, images: ArrayLike) -> jax.Array:
    """Computes the mean squared error over the pixels of an image.

    L = 1/(H·W·C) Σ (x̂ − x)²

    Args:
      reconstruction: x̂ [..., H, W, C], of any float dtype.
      images: x [..., H, W, C], pixels between 0 and 1.

    Returns:
      The loss of each example, [...], float32.

    Raises:
      ValueError: if the shapes differ or are not those of images.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> x = jnp.zeros((128, 28, 28, 1))
      >>> capsjax.reconstruction_loss(x + 0.5, x)[0].item()
      0.25

    References:
      XifengGuo/CapsNet-Pytorch. Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, §4.1 sums over
      the pixels instead; their weight times H·W·C is the weight of this mean.
    """
    reconstruction, images = jnp.asarray(reconstruction), jnp.asarray(images)
    if reconstruction.shape != images.shape or images.ndim < 3:
        raise ValueError(
            "reconstruction_loss: expected two arrays of one shape [..., H, W, C], got "
            f"{list(reconstruction.shape)} and {list(images.shape)}"
        )
    error = at_least_float32(reconstruction) - at_least_float32(images)
    return jnp.mean(jnp.square(error), (-3, -2, -1))


def caps_loss(
    y_true: ArrayLike, y_pred: ArrayLike, x: ArrayLike, x_recon: ArrayLike, lam_recon: float
) -> jax.Array:
    """Computes the total loss of CapsNet over a batch.

    L = mean(margin loss) + lam_recon · mean(reconstruction loss)

    Args:
      y_true: class numbers [...], or one-hot or k-hot labels [..., j].
      y_pred: lengths |v| [..., j].
      x: images [..., H, W, C], pixels between 0 and 1.
      x_recon: reconstructions [..., H, W, C].
      lam_recon: the weight of the reconstruction; 0.0005·H·W·C, 0.392 for MNIST, in most code.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: under the same conditions as `margin_loss` and `reconstruction_loss`.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> x = jnp.zeros((2, 28, 28, 1))
      >>> y_pred = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> round(float(capsjax.caps_loss(jnp.array([0, 1]), y_pred, x, x + 0.5, 0.392)), 4)
      0.098

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, §4.1; XifengGuo/CapsNet-Pytorch.
    """
    margin = jnp.mean(margin_loss(y_pred, y_true))
    return add_losses(margin, jnp.mean(reconstruction_loss(x_recon, x)), lam_recon)


def add_losses(loss: jax.Array, reconstruction: jax.Array, lam_recon: float) -> jax.Array:
    """Returns the total of the two losses, of each example or of their means."""
    return loss + lam_recon * reconstruction
