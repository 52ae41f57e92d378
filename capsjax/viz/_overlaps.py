"""The figure of overlapping images, each pair pulled apart in two colours."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from capsjax.viz._captions import draw_captioned
from capsjax.viz._grids import to_rgb

_COLOURS = np.array([[1.0, 0.55, 0.0], [0.0, 0.45, 1.0]])  # orange and blue add up to white
_TITLE = "Pairs, and both drawings in orange and blue; L: true, R: drawn, *: one is not there"


def overlaps(images: ArrayLike, drawn: ArrayLike, captions: Sequence[tuple[str, str]]) -> Figure:
    """Draws each image above two drawings of its parts, laid over each other in two colours.

    Args:
      images: [N, H, W, C], floats from 0 to 1.
      drawn: [N, 2, H, W, C], floats from 0 to 1: the two drawings of each image.
      captions: two parts of a caption for each, such as "L: 4 7" and "R: 4 9".

    Returns:
      The figure.

    Raises:
      ValueError: if the shapes do not fit each other.

    Example:
      >>> import numpy as np
      >>> from capsjax import viz
      >>> x = np.random.default_rng(0).uniform(size=(4, 36, 36, 1))
      >>> figure = viz.overlaps(x, np.stack([x, x], 1) / 2, [("L: 4 7", "R: 4 9")] * 4)

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, figure 5.
    """
    images, drawn = np.asarray(images, np.float32), np.asarray(drawn, np.float32)
    number, *size = images.shape
    if images.ndim != 4 or drawn.shape != (number, 2, *size) or len(captions) != number:
        raise ValueError(
            "overlaps: expected images [N, H, W, C], drawn [N, 2, H, W, C] and N captions, got "
            f"{list(images.shape)}, {list(drawn.shape)} and {len(captions)}"
        )
    grey = drawn.mean(-1, keepdims=True)  # [N, 2, H, W, 1]
    mixed = to_rgb(np.sum(grey * _COLOURS[:, None, None], 1))
    line = np.full((number, 1, images.shape[2], 3), 255, np.uint8)
    cells = np.concatenate([to_rgb(images), line, mixed], 1)
    return draw_captioned(cells, captions, _TITLE, size=150)
