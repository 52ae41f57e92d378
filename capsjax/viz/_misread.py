"""The figure of misclassified images."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from capsjax.viz._grids import choose_scale, draw_grid, image_grid, to_rgb
from capsjax.viz._text import FONT, draw_sentence, format_class_name, measure_width

_MOST_IMAGES = 60
_MOST_COLUMNS = 12
_GRID_WIDTH = 900  # screen pixels that a row of images may take
_LINE_HEIGHT = 17  # screen pixels that a line of a caption takes


def misread(
    images: ArrayLike,
    labels: ArrayLike,
    predicted: ArrayLike,
    class_names: Sequence[str],
) -> Figure:
    """Draws the misclassified images with "true → predicted" under each.

    Args:
      images: [N, H, W, C], all of them, whether classified correctly or not.
      labels: [N], the true class of each.
      predicted: [N], the predicted class of each.
      class_names: a name for each class; its number is written where the font lacks a character.

    Returns:
      A figure of the first 60 misclassified images, with the number of all of them in its title;
      if there are none, a figure of a sentence that says so.

    Raises:
      ValueError: if `images`, `labels` and `predicted` differ in length.

    Example:
      >>> import numpy as np
      >>> from capsjax import viz
      >>> figure = viz.misread(np.zeros((3, 28, 28, 1)), [4, 9, 1], [4, 4, 1], "0123456789")
    """
    images, labels, predicted = np.asarray(images), np.asarray(labels), np.asarray(predicted)
    if not images.shape[:1] == labels.shape == predicted.shape:
        raise ValueError(
            "misread: expected images [N, H, W, C], labels [N] and predicted [N], got "
            f"{list(images.shape)}, {list(labels.shape)} and {list(predicted.shape)}"
        )
    wrong = np.flatnonzero(labels != predicted)
    if not wrong.size:
        return draw_sentence(f"None of {len(labels)} images misread")
    shown = wrong[:_MOST_IMAGES]
    names = [format_class_name(name, number) for number, name in enumerate(class_names)]
    pairs = [(names[labels[n]], names[predicted[n]]) for n in shown]
    part = f" (the first {_MOST_IMAGES} shown)" if wrong.size > _MOST_IMAGES else ""
    title = f"{wrong.size} of {len(labels)} misread{part}: true → predicted"
    return _draw_captioned(to_rgb(images[shown]), pairs, title)


def _draw_captioned(pixels: np.ndarray, pairs: Sequence[tuple[str, str]], title: str) -> Figure:
    """Draws images [N, H, W, 3] in a grid with "true → predicted" under each."""
    number, height, width, _ = pixels.shape
    scale = choose_scale(height, width, 70)
    captions = _format_captions(pairs, 1.3 * scale * width)
    cells = _add_margins(pixels, captions, scale)
    separator = max(1, round(12 / scale))
    down, right = cells.shape[1] + separator, cells.shape[2] + separator
    columns = min(number, _MOST_COLUMNS, max(1, int(_GRID_WIDTH / (right * scale))))
    figure, axes = draw_grid(image_grid(cells, columns, separator=separator), scale, title)
    for n, caption in enumerate(captions):
        row, column = divmod(n, columns)
        x, y = column * right + (right - separator) / 2 - 0.5, row * down + height + 2 / scale
        _write_caption(axes, x, y, caption)
    return figure


def _write_caption(axes: Axes, x: float, y: float, caption: str) -> None:
    """Writes a caption centred under the point (x, y) of the grid."""
    axes.text(x, y, caption, fontproperties=FONT, ha="center", va="top", parse_math=False)


def _format_captions(pairs: Sequence[tuple[str, str]], room: float) -> list[str]:
    """Formats all captions in one line, or all in two if one is wider than `room` pixels."""
    captions = [f"{true} → {predicted}" for true, predicted in pairs]
    if max(map(measure_width, captions)) <= room:
        return captions
    return [f"{true}\n→ {predicted}" for true, predicted in pairs]


def _add_margins(pixels: np.ndarray, captions: Sequence[str], scale: float) -> np.ndarray:
    """Adds white under and beside each image where its caption needs it."""
    lines = [line for caption in captions for line in caption.split("\n")]
    beside = max(0, round(max(map(measure_width, lines)) / scale) - pixels.shape[2])
    under = round(_LINE_HEIGHT * (len(lines) // len(captions)) / scale)
    margins = ((0, 0), (0, under), (beside // 2, beside - beside // 2), (0, 0))
    return np.pad(pixels, margins, constant_values=255)
