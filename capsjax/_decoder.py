"""The decoder: from class capsules to a reconstructed image."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from capsjax._labels import pick_highest, to_targets
from capsjax._vectors import float_dtype, length


def mask(capsules: ArrayLike, labels: ArrayLike | None = None) -> jax.Array:
    """Keeps the capsules of the labelled classes and sets all others to zero.

    x_jd = T_j v_jd

    Args:
      capsules: v [..., j, d].
      labels: class numbers [...], or one-hot or k-hot labels [..., j]. None keeps the longest
        capsule, as in evaluation.

    Returns:
      x: [..., j·d], flattened for the decoder, in the dtype of `capsules`.

    Raises:
      ValueError: if a shape does not fit.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> v = jnp.array([[1.0, 2.0], [3.0, 4.0]])          # two classes of two numbers
      >>> capsjax.mask(v, 0).tolist(), capsjax.mask(v).tolist()
      ([1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 4.0])

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, §4.1.
    """
    capsules = jnp.asarray(capsules)
    if capsules.ndim < 2:
        raise ValueError(f"mask: expected capsules [..., j, d], got {list(capsules.shape)}")
    if labels is None:
        labels = pick_highest(length(capsules))
    kept = to_targets(labels, capsules.shape[:-1]).astype(capsules.dtype)
    return (capsules * kept[..., None]).reshape(*capsules.shape[:-2], -1)


def perturb(capsules: ArrayLike, offsets: ArrayLike) -> jax.Array:
    """Moves one number of the class capsules at a time, by one offset after the other.

    x_dnje = v_je + offsets_n · [d = e]

    Args:
      capsules: v [j, d] of one image.
      offsets: [n], what is added to a number.

    Returns:
      x: [d, n, j, d] in the dtype of `capsules`; in x[d, n] number d is moved by offset n. A
      decoder with a label keeps the capsule of its class.

    Raises:
      ValueError: if a shape does not fit.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> v = jnp.zeros((10, 16))
      >>> capsjax.perturb(v, jnp.linspace(-0.25, 0.25, 11)).shape
      (16, 11, 10, 16)

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, figure 4.
    """
    capsules, offsets = jnp.asarray(capsules), jnp.asarray(offsets)
    if capsules.ndim != 2 or offsets.ndim != 1:
        raise ValueError(
            "perturb: expected capsules [j, d] and offsets [n], got "
            f"{list(capsules.shape)} and {list(offsets.shape)}"
        )
    basis = jnp.eye(capsules.shape[1], dtype=capsules.dtype)  # [d, e]
    moves = offsets.astype(capsules.dtype)[None, :, None, None] * basis[:, None, None, :]
    return capsules[None, None] + moves


def decode(params: Sequence[tuple[ArrayLike, ArrayLike]], x: ArrayLike) -> jax.Array:
    """Draws pixels from capsules: dense layers with ReLU, the last one with a sigmoid.

    h = max(0, h·kernel + bias), …, pixels = σ(h·kernel + bias)

    Args:
      params: a (kernel [in, out], bias [out]) for each layer.
      x: masked capsules [..., j·d], of any float dtype; sums run in float32.

    Returns:
      Pixels [..., H·W·C] between 0 and 1, in the dtype of `x`.

    Raises:
      ValueError: if a layer does not fit the output of the one before it.

    Example:
      >>> import jax.numpy as jnp, capsjax
      >>> layers = [(jnp.ones((160, 512)), jnp.zeros(512)), (jnp.ones((512, 784)), jnp.zeros(784))]
      >>> capsjax.decode(layers, jnp.ones((128, 160))).shape
      (128, 784)

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, figure 2.
    """
    x = jnp.asarray(x)
    dtype = float_dtype(x)
    if not params:
        raise ValueError("decode: expected at least one layer (kernel, bias), got none")
    for layer, (kernel, bias) in enumerate(params):
        kernel, bias = jnp.asarray(kernel), jnp.asarray(bias)
        if kernel.ndim != 2 or x.shape[-1:] != kernel.shape[:1] or bias.shape != kernel.shape[1:]:
            raise ValueError(
                f"decode: expected layer {layer} as kernel [{x.shape[-1] if x.ndim else 'in'}, out]"
                f" and bias [out], got {list(kernel.shape)} and {list(bias.shape)}"
            )
        h = jnp.dot(x, kernel, preferred_element_type=jnp.float32)
        h = h + jnp.broadcast_to(bias, h.shape)
        x = (jax.nn.relu if layer < len(params) - 1 else jax.nn.sigmoid)(h).astype(dtype)
    return x
