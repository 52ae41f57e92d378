"""The figure of misclassified images."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from capsjax.viz._captions import draw_captioned
from capsjax.viz._grids import to_rgb
from capsjax.viz._text import draw_sentence, format_class_name

_MOST_IMAGES = 60


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
      ValueError: if `images`, `labels` and `predicted` differ in length, or a class has no name.

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
    highest = max(labels.max(), predicted.max())
    if highest >= len(class_names):
        raise ValueError(f"misread: got {len(class_names)} names, but there is a class {highest}")
    shown = wrong[:_MOST_IMAGES]
    names = [format_class_name(name, number) for number, name in enumerate(class_names)]
    captions = [(names[labels[n]], f"→ {names[predicted[n]]}") for n in shown]
    part = f" (the first {_MOST_IMAGES} shown)" if wrong.size > _MOST_IMAGES else ""
    title = f"{wrong.size} of {len(labels)} misread{part}: true → predicted"
    return draw_captioned(to_rgb(images[shown]), captions, title)
