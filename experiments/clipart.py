"""Makes class folders of small RGB images from clip art, for mnist.py to train on.

apt-get install openclipart-png
python experiments/clipart.py /usr/share/openclipart/png /tmp/clipart
python experiments/mnist.py --dataset clipart --data-dir /tmp/clipart --preset best

Of each of five categories 300 drawings are taken at random and scaled to fit into 32 × 32 pixels on
white; 240 are for training and 60 for tests. CapsNet needs far more: after 100 epochs in batches of
32 it misreads 35 % of the tests (guessing: 80 %). Open Clip Art is in the public domain.
"""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

CATEGORIES = ("animals", "food", "people", "signs_and_symbols", "transportation")
SIDE, TRAIN, TEST = 32, 240, 60
MOST_PIXELS = 10**7  # some drawings have 6 · 10⁸, of which each takes 2 GB


@dataclasses.dataclass(frozen=True)
class Clipart:
    """Makes OUT/train/CATEGORY/ and OUT/test/CATEGORY/ from SOURCE/CATEGORY/."""

    source: tyro.conf.Positional[Path]
    """Folder of the categories."""
    out: tyro.conf.Positional[Path]
    """New folder."""


def is_small(path: Path) -> bool:
    """Returns whether a drawing has few enough pixels."""
    warned = Image.DecompressionBombWarning
    try:
        # Of very many pixels Pillow warns, and of twice as many it reads nothing.
        with warnings.catch_warnings(action="error", category=warned), Image.open(path) as image:
            return image.width * image.height <= MOST_PIXELS
    except (warned, Image.DecompressionBombError):
        return False


def shrink(path: Path) -> Image.Image:
    """Scales a drawing to fit into a square, on white."""
    with Image.open(path) as image:
        drawing = image.convert("RGBA")
    drawing.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (SIDE, SIDE), "white")
    corner = ((SIDE - drawing.width) // 2, (SIDE - drawing.height) // 2)
    square.alpha_composite(drawing, corner)
    return square.convert("RGB")


def main() -> None:
    """Makes the folders."""
    settings, rng = tyro.cli(Clipart), np.random.default_rng(0)
    for category in CATEGORIES:
        paths = [*filter(is_small, sorted((settings.source / category).rglob("*.png")))]
        if len(paths) < TRAIN + TEST:
            raise SystemExit(
                f"{settings.source / category} holds {len(paths)} drawings, of which "
                f"{TRAIN + TEST} are needed: is it the folder of openclipart-png?"
            )
        for number, chosen in enumerate(rng.permutation(len(paths))[: TRAIN + TEST]):
            folder = settings.out / ("train" if number < TRAIN else "test") / category
            folder.mkdir(parents=True, exist_ok=True)
            shrink(paths[chosen]).save(folder / f"{number:03}.png")


if __name__ == "__main__":
    main()
