"""Image grids, and figures of one grid."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from capsjax.viz._text import DPI, TITLE_FONT, measure_width, write_title

_MARGIN = 15  # screen pixels around a grid where nothing is written
_TITLE_MARGIN = 4  # screen pixels at the right of a title that is wider than its grid
_MIN_WIDTH = 480  # screen pixels


def image_grid(images: ArrayLike, columns: int, *, separator: int = 1) -> np.ndarray:
    """Arranges images in rows, as one image, with white between them.

    grid[r (H + separator) + h, c (W + separator) + w] = images[r columns + c, h, w]

    Args:
      images: [N, H, W, C], N ≥ 1.
      columns: images in a row; the last row may be shorter.
      separator: pixels between two images.

    Returns:
      uint8 [rows (H + separator) − separator, columns (W + separator) − separator, 3].

    Raises:
      ValueError: if `images` has another shape or dtype, or `columns` is less than 1.

    Example:
      >>> import numpy as np
      >>> from capsjax import viz
      >>> viz.image_grid(np.zeros((50, 28, 28, 1), np.uint8), columns=10).shape
      (144, 289, 3)
    """
    pixels = to_rgb(images)
    if pixels.ndim != 4 or not pixels.size or columns < 1:
        raise ValueError(
            f"image_grid: expected images [N, H, W, C] and 1 column or more, got "
            f"{list(np.shape(images))} and {columns}"
        )
    number, height, width, _ = pixels.shape
    rows = -(-number // columns)
    cells = np.full((rows * columns, height + separator, width + separator, 3), 255, np.uint8)
    cells[:number, :height, :width] = pixels
    cells = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)
    grid = cells.reshape(rows * (height + separator), columns * (width + separator), 3)
    return grid[: len(grid) - separator, : grid.shape[1] - separator]


def to_rgb(images: ArrayLike) -> np.ndarray:
    """Converts images [..., H, W, C] to uint8 [..., H, W, 3]."""
    pixels = np.asarray(images)
    if pixels.ndim < 3 or (pixels.dtype != np.uint8 and pixels.dtype.kind in "biu"):
        raise ValueError(
            "expected images [..., H, W, C], uint8 from 0 to 255 or float from 0 to 1, got "
            f"{pixels.dtype} {list(pixels.shape)}"
        )
    if pixels.dtype != np.uint8:
        pixels = np.rint(255 * np.clip(pixels.astype(np.float32), 0, 1)).astype(np.uint8)
    if pixels.shape[-1] not in (1, 3):
        pixels = np.rint(pixels.mean(-1, keepdims=True)).astype(np.uint8)
    return np.broadcast_to(pixels, (*pixels.shape[:-1], 3))


def choose_scale(height: int, width: int, size: int) -> float:
    """Returns the scale at which an image's longer side takes about `size` screen pixels.

    Small images are enlarged by a whole number, so that all of their pixels have one size.
    """
    scale = size / max(height, width)
    return scale if scale < 1 else float(int(scale))


def draw_grid(
    grid: np.ndarray,
    scale: float,
    title: str,
    *,
    left: int = _MARGIN,
    top: int = 40,
    min_height: int = 0,
) -> tuple[Figure, Axes]:
    """Draws a grid under a title, with `left` and `top` screen pixels beside and above it.

    The figure is at least `min_height` screen pixels high.
    """
    height, width = scale * grid.shape[0], scale * grid.shape[1]
    bottom = max(_MARGIN, min_height - top - height)
    title_width = measure_width(title, TITLE_FONT) + _TITLE_MARGIN
    full_width = max(left + width + _MARGIN, left + title_width, _MIN_WIDTH)
    full_height = top + height + bottom
    figure = Figure(figsize=(full_width / DPI, full_height / DPI), dpi=DPI)
    position = left / full_width, bottom / full_height, width / full_width, height / full_height
    axes = figure.add_axes(position)
    write_title(axes, title)
    axes.imshow(grid, interpolation="nearest" if scale >= 1 else "antialiased")
    axes.set(xticks=[], yticks=[])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure, axes
