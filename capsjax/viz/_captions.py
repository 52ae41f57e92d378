"""Figures of images with a caption under each."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from capsjax.viz._grids import choose_scale, draw_grid, image_grid
from capsjax.viz._text import FONT, measure_width

_MOST_COLUMNS = 12
_GRID_WIDTH = 900  # screen pixels that a row of images may take
_LINE_HEIGHT = 17  # screen pixels that a line of a caption takes


def draw_captioned(
    pixels: np.ndarray, captions: Sequence[tuple[str, str]], title: str, size: int = 70
) -> Figure:
    """Draws images [N, H, W, 3] in a grid, each above a caption of two parts.

    Both parts share a line if they have room; an image's longer side takes about `size` screen
    pixels.
    """
    number, height, width, _ = pixels.shape
    scale = choose_scale(height, width, size)
    lines = _format_captions(captions, 1.3 * scale * width)
    cells = _add_margins(pixels, lines, scale)
    separator = max(1, round(12 / scale))
    down, right = cells.shape[1] + separator, cells.shape[2] + separator
    columns = min(number, _MOST_COLUMNS, max(1, int(_GRID_WIDTH / (right * scale))))
    figure, axes = draw_grid(image_grid(cells, columns, separator=separator), scale, title)
    for n, caption in enumerate(lines):
        row, column = divmod(n, columns)
        x, y = column * right + (right - separator) / 2 - 0.5, row * down + height + 2 / scale
        _write_caption(axes, x, y, caption)
    return figure


def _write_caption(axes: Axes, x: float, y: float, caption: str) -> None:
    """Writes a caption centred under the point (x, y) of the grid."""
    axes.text(x, y, caption, fontproperties=FONT, ha="center", va="top", parse_math=False)


def _format_captions(captions: Sequence[tuple[str, str]], room: float) -> list[str]:
    """Formats all captions in one line, or all in two if one is wider than `room` pixels."""
    lines = [" ".join(parts) for parts in captions]
    if max(map(measure_width, lines)) <= room:
        return lines
    return ["\n".join(parts) for parts in captions]


def _add_margins(pixels: np.ndarray, captions: Sequence[str], scale: float) -> np.ndarray:
    """Adds white under and beside each image where its caption needs it."""
    lines = [line for caption in captions for line in caption.split("\n")]
    beside = max(0, round(max(map(measure_width, lines)) / scale) - pixels.shape[2])
    under = round(_LINE_HEIGHT * (len(lines) // len(captions)) / scale)
    margins = ((0, 0), (0, under), (beside // 2, beside - beside // 2), (0, 0))
    return np.pad(pixels, margins, constant_values=255)
