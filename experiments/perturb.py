"""Digits, their reconstructions, and what one number of a capsule does: the README's picture.

python experiments/perturb.py
"""

import dataclasses
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

import capsjax
from capsjax import viz
from capsjax._pixels import to_unit_interval
from capsjax.presets import check
from capsjax.run.command_line import refusals
from capsjax.run.pictures import OFFSETS, perturbed
from capsjax.run.settings import find_weights

SCALE = 2  # screen pixels for a pixel


@dataclasses.dataclass(frozen=True)
class Perturb:
    """Draws each test digit beside its reconstruction and eleven perturbations of its capsule:
    -0.25 to 0.25 is added to the number that changes the drawing most."""

    weights: tyro.conf.Positional[Path] = Path("capsnet-mnist")
    """A network for MNIST: a file, or a pretrained one."""
    images: tuple[int, ...] = (0, 1, 4)
    """Which of the test images."""
    out: Path = Path("perturb.png")
    """The picture."""


def main() -> None:
    with refusals():
        settings = tyro.cli(Perturb)
        digits = capsjax.data.load("mnist").x_test
        for number in settings.images:
            check(0 <= number < len(digits), "images", f"from 0 to {len(digits) - 1}", number)
        folder = settings.out.parent
        check(folder.is_dir(), "out", "a file in a folder that is there", settings.out)
        model = capsjax.weights.load(find_weights(settings.weights))
    rows = np.concatenate([draw_row(model, digits[number]) for number in settings.images])
    grid = viz.image_grid(rows, columns=3 + len(OFFSETS), separator=2)
    height, width, _ = grid.shape
    enlarged = Image.fromarray(grid).resize(
        (SCALE * width, SCALE * height), Image.Resampling.NEAREST
    )
    enlarged.save(settings.out)
    print(f"wrote {settings.out}")


def draw_row(model: capsjax.Network, digit: np.ndarray) -> np.ndarray:
    """Draws a digit, its reconstruction, a gap, and the perturbations: [14, H, W, C]."""
    moved = np.asarray(perturbed(model, digit, OFFSETS))
    most = np.argmax(np.var(moved, axis=1).sum((1, 2, 3)))
    drawn = np.asarray(capsjax.predict(model, digit).reconstruction)
    return np.concatenate([[to_unit_interval(digit), drawn, np.ones_like(drawn)], moved[most]])


if __name__ == "__main__":
    main()
