"""The figure of what the dimensions of a capsule encode."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from capsjax.viz._grids import choose_scale, draw_grid, image_grid, to_rgb
from capsjax.viz._text import FONT, format_class_name

_MIN_HEIGHT = 290  # screen pixels, room for the label of the rows


def perturbations(
    images: ArrayLike, offsets: ArrayLike, label: int, class_names: Sequence[str]
) -> Figure:
    """Draws the reconstructions of a capsule with one of its dimensions perturbed.

    Args:
      images: [d, n, H, W, C], the reconstructions; in row d, dimension d is perturbed.
      offsets: [n], what is added to the dimension in each column.
      label: the class of the capsule.
      class_names: a name for each class; its number is written where the font lacks a character.

    Returns:
      A figure of d × n images.

    Raises:
      ValueError: if `images` and `offsets` do not have these shapes, or the label has no name.

    Example:
      >>> import numpy as np
      >>> from capsjax import viz
      >>> images = np.zeros((16, 11, 28, 28, 1))
      >>> figure = viz.perturbations(images, np.linspace(-0.25, 0.25, 11), 7, "0123456789")

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, figure 4.
    """
    pixels, offsets = to_rgb(images), np.asarray(offsets)
    if pixels.ndim != 5 or pixels.shape[1:2] != offsets.shape:
        raise ValueError(
            f"perturbations: expected images [d, n, H, W, C] and offsets [n], got "
            f"{list(np.shape(images))} and {list(offsets.shape)}"
        )
    if not 0 <= label < len(class_names):
        raise ValueError(f"perturbations: got {len(class_names)} names, but the label is {label}")
    dimensions, columns, height, width, _ = pixels.shape
    scale = choose_scale(height, width, 56)
    separator = max(1, round(1 / scale))
    grid = image_grid(pixels.reshape(-1, height, width, 3), columns, separator=separator)
    name = format_class_name(class_names[label], label)
    title = f"The capsule of “{name}”, one of its {dimensions} numbers moved"
    figure, axes = draw_grid(grid, scale, title, left=60, top=85, min_height=_MIN_HEIGHT)
    _label_rows(axes, _locate_centres(dimensions, height, separator))
    _label_columns(axes, _locate_centres(columns, width, separator), offsets)
    return figure


def _locate_centres(number: int, size: int, separator: int) -> np.ndarray:
    """Returns the coordinates of the centres of `number` images, one after another."""
    return np.arange(number) * (size + separator) + size / 2 - 0.5  # pixel n is centred on n


def _label_rows(axes: Axes, centres: np.ndarray) -> None:
    """Numbers the rows from 1, a row a dimension."""
    axes.set_yticks(centres, [str(n + 1) for n in range(len(centres))], fontproperties=FONT)
    axes.set_ylabel("which of the capsule's numbers", fontproperties=FONT)


def _label_columns(axes: Axes, centres: np.ndarray, offsets: np.ndarray) -> None:
    """Writes each offset above its column."""
    labels = [f"{offset:+.2f}" if offset else "0" for offset in offsets]
    axes.set_xticks(centres, labels, fontproperties=FONT)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("added to the number", fontproperties=FONT)
