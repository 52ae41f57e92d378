"""The figure of images and their reconstructions."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from capsjax.viz._grids import choose_scale, draw_grid, image_grid, to_rgb
from capsjax.viz._text import FONT

_COLUMNS = 10
_TITLE = "Real images, each above its reconstruction"


def reconstructions(images: ArrayLike, reconstructed: ArrayLike) -> Figure:
    """Draws each real image above its reconstruction.

    Args:
      images: [N, H, W, C].
      reconstructed: [N, H, W, C].

    Returns:
      The figure.

    Raises:
      ValueError: if the two shapes differ or are not [N, H, W, C].

    Example:
      >>> import numpy as np
      >>> from capsjax import viz
      >>> x = np.random.default_rng(0).uniform(size=(50, 28, 28, 1))
      >>> figure = viz.reconstructions(x, np.sqrt(x))

    References:
      XifengGuo/CapsNet-Pytorch, real_and_recon.png.
    """
    above, below = to_rgb(images), to_rgb(reconstructed)
    if np.shape(images) != np.shape(reconstructed) or above.ndim != 4:
        raise ValueError(
            "reconstructions: expected two arrays of one shape [N, H, W, C], got "
            f"{list(np.shape(images))} and {list(np.shape(reconstructed))}"
        )
    number, height, width, _ = above.shape
    columns = min(_COLUMNS, number)
    scale = choose_scale(height, width, 84)
    line = max(1, round(1 / scale))
    pairs = np.concatenate([above, np.full((number, line, width, 3), 255, np.uint8), below], 1)
    grid = image_grid(pairs, columns, separator=6 * line)
    figure, axes = draw_grid(grid, scale, _TITLE, left=105)
    _label_rows(axes, -(-number // columns), height, line)
    return figure


def _label_rows(axes: Axes, rows: int, height: int, line: int) -> None:
    """Writes "real" and "reconstructed" beside the two halves of each row of pairs."""
    tops = np.arange(rows) * (2 * height + 7 * line)
    centres = np.stack([tops + height / 2, tops + line + 1.5 * height], -1)
    axes.set_yticks(centres.ravel(), ["real", "reconstructed"] * rows, fontproperties=FONT)
