"""The pictures of a run: curves, errors, capsules, reconstructions, perturbations."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

import capsjax
from capsjax import diagnostics, viz
from capsjax._files import write_atomically
from capsjax._pixels import to_unit_interval
from capsjax.run.machine import return_freed_memory

OFFSETS = np.arange(-5, 6) * 0.05  # Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, figure 4
DIAGNOSED = 1000  # images, which take a few seconds on a CPU
RECONSTRUCTED = 50  # images, as in XifengGuo/CapsNet-Pytorch


def write_pictures(
    folder: Path,
    model: capsjax.Network,
    x_test: np.ndarray,
    y_test: np.ndarray,
    predicted: np.ndarray,
    class_names: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Writes curves, errors, capsules, reconstructions and perturbations, a .png each.

    What a network does not offer, such as the last two without a decoder, is left out, and that is
    printed.

    Args:
      folder: must exist; a picture that is there already is replaced.
      model: the trained network.
      x_test: uint8 [N, H, W, C].
      y_test: int32 [N].
      predicted: int32 [N], the classes that the network predicts.
      class_names: a name for each class.
      rows: of metrics.csv, one an epoch; without any there is no curves.png.
    """
    if rows:
        write(viz.curves(rows), folder / "curves.png")
    write(viz.misread(x_test, y_test, predicted, class_names), folder / "errors.png")
    _write_capsules(folder, model, x_test[:DIAGNOSED], y_test[:DIAGNOSED], class_names)
    first = x_test[:RECONSTRUCTED]
    drawn = capsjax.predict(model, first).reconstruction
    if drawn is None:
        print("pictures  no reconstructions and perturbations: this network has no decoder")
        return
    write(viz.reconstructions(first, drawn), folder / "reconstructions.png")
    if type(model).decode is capsjax.Network.decode:
        print(f"pictures  no perturbations: {type(model).__name__} does not define decode")
        return
    example = np.argmax(predicted == y_test)  # the first that is read right, if any is
    moved = perturbed(model, x_test[example], OFFSETS)
    figure = viz.perturbations(moved, OFFSETS, predicted[example], class_names)
    write(figure, folder / "perturbations.png")


def _write_capsules(
    folder: Path,
    model: capsjax.Network,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
) -> None:
    """Writes capsules.png, and prints what is left out of it."""
    if isinstance(model, capsjax.networks.Ensemble):
        print("pictures  no capsules: an ensemble has those of several networks")
        return
    found = diagnostics.diagnose(model, images, labels)
    return_freed_memory()  # what the diagnosis used
    if not found.scores:
        print("pictures  no capsules: this network has none")
        return
    if not found.layers:
        print("pictures  only class capsules: this network has no capsule layer of capsjax.nn")
    elif not found.couplings:
        print("pictures  no couplings: the routing of the last capsule layer does not return them")
    write(viz.capsules(found, class_names), folder / "capsules.png")


def perturbed(model: capsjax.Network, image: np.ndarray, offsets: np.ndarray) -> jax.Array:
    """Moves each number of the capsule of the predicted class and decodes it: [d, n, H, W, C].

    Args:
      model: a network with a decoder.
      image: uint8 [H, W, C].
      offsets: [n], what is added to a number.
    """
    return _perturb(*nnx.split(model), to_unit_interval(jnp.asarray(image)), jnp.asarray(offsets))


@partial(jax.jit, static_argnums=0)
def _perturb(
    graphdef: nnx.GraphDef, variables: nnx.State, image: jax.Array, offsets: jax.Array
) -> jax.Array:
    model = nnx.merge(graphdef, variables)
    model.eval()
    output = model(image)
    assert output.capsules is not None  # what a decoder draws
    moved = capsjax.perturb(output.capsules, offsets)
    return model.decode(moved, jnp.broadcast_to(output.predicted, moved.shape[:2]))


def write(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, whole or not at all."""
    with write_atomically(path) as part:
        figure.savefig(part, format="png")
