"""The pictures of a run: curves, reconstructions, perturbations, errors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import capsjax
from capsjax import viz
from capsjax._files import write_atomically

OFFSETS = np.arange(-5, 6) * 0.05  # Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, figure 4
RECONSTRUCTED = 50  # images, as in XifengGuo/CapsNet-Pytorch


def write_pictures(
    folder: Path,
    model: capsjax.nn.CapsNet,
    x_test: np.ndarray,
    y_test: np.ndarray,
    predicted: np.ndarray,
    class_names: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Writes curves.png, reconstructions.png, perturbations.png and errors.png into `folder`.

    Args:
      folder: must exist; a picture that is there already is replaced.
      model: the trained network.
      x_test: uint8 [N, H, W, C].
      y_test: int32 [N].
      predicted: int32 [N], the classes that the network says.
      class_names: a name for each class.
      rows: of metrics.csv, one an epoch; without any there is no curves.png.
    """
    if rows:
        write(viz.curves(rows), folder / "curves.png")
    some = x_test[:RECONSTRUCTED]
    drawn = capsjax.predict(model, some).reconstruction
    write(viz.reconstructions(some, drawn), folder / "reconstructions.png")
    example = np.argmax(predicted == y_test)  # the first that is read right, if any is
    moved = viz.perturbations(
        perturbed(model, x_test[example], OFFSETS), OFFSETS, predicted[example], class_names
    )
    write(moved, folder / "perturbations.png")
    write(viz.misread(x_test, y_test, predicted, class_names), folder / "errors.png")


def perturbed(model: capsjax.nn.CapsNet, image: np.ndarray, offsets: np.ndarray) -> jax.Array:
    """Moves each number of an image's longest capsule and decodes it: [d, n, H, W, C].

    Args:
      model: a `CapsNet`.
      image: uint8 [H, W, C].
      offsets: [n], what is added to a number.
    """
    capsules = model(jnp.asarray(image, jnp.float32) / 255).capsules  # [j, d]
    label = jnp.argmax(capsjax.length(capsules))
    numbers = capsules.shape[-1]
    moves = jnp.eye(numbers)[:, None] * jnp.asarray(offsets)[None, :, None]  # [d, n, d]
    moved = capsules[None, None] + moves[:, :, None]  # [d, n, j, d]; the mask leaves one j
    layers = [(layer.kernel[...], layer.bias[...]) for layer in model.decoder]
    pixels = capsjax.decode(layers, capsjax.mask(moved, jnp.full(moves.shape[:2], label)))
    return pixels.reshape(*moves.shape[:2], *image.shape)


def write(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG: all of it or, if interrupted, nothing."""
    with write_atomically(path) as part:
        figure.savefig(part, format="png")
