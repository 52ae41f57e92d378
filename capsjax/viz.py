"""Arrays -> image grids and figures.

Images are [..., H, W, C], uint8 from 0 to 255 or float from 0 to 1; floats outside are clipped. One
channel is drawn grey, three as RGB, any other number as the grey of their mean. Figures are
matplotlib's, made without pyplot: `figure.savefig(path)` writes one, a notebook shows it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

DPI = 100
_FONT = FontProperties(size=9)
_MISREAD = 60  # the most images that are drawn
_COLORS = {"train": "#0072B2", "validation": "#009E73", "test": "#D55E00"}

_SPLITS = {"train": "training", "validation": "validation", "test": "test"}
_PANELS = {
    "error": "error (% of images)",
    "loss": "loss (margin + weighted reconstruction)",
    "margin": "margin loss",
    "reconstruction": "reconstruction loss (mean squared error)",
}


def image_grid(images: ArrayLike, columns: int, *, separator: int = 1) -> np.ndarray:
    """Lays images out in rows, as one image, with white between them.

    grid[r (H + separator) + h, c (W + separator) + w] = images[r columns + c, h, w]

    Args:
      images: [N, H, W, C], N ≥ 1.
      columns: images in a row; the last row may be shorter.
      separator: pixels between two images.

    Returns:
      uint8 [rows (H + separator) − separator, columns (W + separator) − separator, 3].

    Raises:
      ValueError: if `images` has another shape or dtype, or there are no columns.

    Example:
      >>> import numpy as np
      >>> from capsjax import viz
      >>> viz.image_grid(np.zeros((50, 28, 28, 1), np.uint8), columns=10).shape
      (144, 289, 3)
    """
    pixels = _rgb(images)
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


def curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws error and losses over the epochs of a run.

    Args:
      rows: one mapping an epoch, with `epoch` and, for each of train, validation and test that
        there is, `{split}_error` in percent, `{split}_loss`, `{split}_margin` and
        `{split}_reconstruction`; numbers, or text as a CSV file has it, empty where unknown.

    Returns:
      A figure of four panels.

    Raises:
      ValueError: if there is no row.

    Example:
      >>> from capsjax import viz
      >>> rows = [{"epoch": 1, "test_error": "1.31"}, {"epoch": 2, "test_error": "0.92"}]
      >>> len(viz.curves(rows).axes)
      4
    """
    if not rows:
        raise ValueError("curves: expected a row for at least one epoch, got none")
    figure = Figure(figsize=(10, 7), dpi=DPI, layout="constrained")
    epochs = _column(rows, "epoch")
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, _PANELS.items(), strict=True):
        for split, label in _SPLITS.items():
            values = _column(rows, f"{split}_{name}")
            if np.isfinite(values).any():
                _curve(axes, epochs, values, label, _COLORS[split])
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        _value_axis(axes)
        if axes.lines:
            axes.legend(frameon=False, prop=_FONT)
    return figure


def reconstructions(images: ArrayLike, reconstructed: ArrayLike) -> Figure:
    """Draws each real image above its reconstruction.

    Args:
      images: [N, H, W, C].
      reconstructed: [N, H, W, C].

    Returns:
      The figure.

    Raises:
      ValueError: if the two shapes differ, or are not images.

    Example:
      >>> import numpy as np
      >>> from capsjax import viz
      >>> x = np.random.default_rng(0).uniform(size=(50, 28, 28, 1))
      >>> figure = viz.reconstructions(x, np.sqrt(x))

    References:
      XifengGuo/CapsNet-Pytorch, real_and_recon.png.
    """
    real, drawn = _rgb(images), _rgb(reconstructed)
    if np.shape(images) != np.shape(reconstructed) or real.ndim != 4:
        raise ValueError(
            "reconstructions: expected two arrays of one shape [N, H, W, C], got "
            f"{list(np.shape(images))} and {list(np.shape(reconstructed))}"
        )
    number, height, width, _ = real.shape
    columns = min(10, number)
    scale = _scale(height, width, 84)
    line = max(1, round(1 / scale))
    pairs = np.concatenate([real, np.full((number, line, width, 3), 255, np.uint8), drawn], 1)
    grid = image_grid(pairs, columns, separator=6 * line)
    figure, axes = _grid_figure(grid, scale, left=105)
    step = 2 * height + 7 * line
    tops = np.arange(-(-number // columns)) * step
    axes.set_yticks(
        np.sort([*(tops + height / 2), *(tops + line + 1.5 * height)]),
        ["real", "reconstructed"] * len(tops),
        fontproperties=_FONT,
    )
    axes.set_title("Real images, each above its reconstruction", fontsize=11, loc="left")
    return figure


def perturbations(
    images: ArrayLike, offsets: ArrayLike, label: int, class_names: Sequence[str]
) -> Figure:
    """Draws what the decoder makes of a capsule when one of its numbers is moved.

    Args:
      images: [d, n, H, W, C], in row d those with number d of the capsule moved.
      offsets: [n], what was added to it in each column.
      label: the class of the capsule.
      class_names: as in `misread`.

    Returns:
      A figure of d × n images.

    Raises:
      ValueError: if the shapes do not fit.

    Example:
      >>> import numpy as np
      >>> from capsjax import viz
      >>> images = np.zeros((16, 11, 28, 28, 1))
      >>> figure = viz.perturbations(images, np.linspace(-0.25, 0.25, 11), 7, "0123456789")

    References:
      Sabour, Frosst, Hinton, 2017, arXiv:1710.09829, figure 4.
    """
    pixels, offsets = _rgb(images), np.asarray(offsets)
    if pixels.ndim != 5 or pixels.shape[1:2] != offsets.shape:
        raise ValueError(
            f"perturbations: expected images [d, n, H, W, C] and offsets [n], got "
            f"{list(np.shape(images))} and {list(offsets.shape)}"
        )
    numbers, moves, height, width, _ = pixels.shape
    scale = _scale(height, width, 56)
    separator = max(1, round(1 / scale))
    grid = image_grid(pixels.reshape(-1, height, width, 3), moves, separator=separator)
    figure, axes = _grid_figure(grid, scale, left=60, top=85)
    centres = [
        np.arange(n) * (size + separator) + size / 2 - 0.5
        for n, size in ((numbers, height), (moves, width))
    ]
    axes.set_yticks(centres[0], [str(d + 1) for d in range(numbers)], fontproperties=_FONT)
    moved = [f"{offset:+.2f}" if offset else "0" for offset in offsets]
    axes.set_xticks(centres[1], moved, fontproperties=_FONT)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("added to the number", fontproperties=_FONT)
    axes.set_ylabel("which of the capsule's numbers", fontproperties=_FONT)
    name = _drawable(class_names[label], label)
    title = f"The capsule of “{name}”, one of its {numbers} numbers moved"
    axes.set_title(title, fontsize=11, loc="left", parse_math=False)
    return figure


def misread(
    images: ArrayLike,
    labels: ArrayLike,
    predicted: ArrayLike,
    class_names: Sequence[str],
) -> Figure:
    """Draws the images whose class was not recognised, "true → predicted" under each.

    Args:
      images: [N, H, W, C], all of them, right and wrong.
      labels: the true classes [N].
      predicted: the classes [N] that a network said.
      class_names: a name for each class; its number is written where the font lacks a letter.

    Returns:
      The figure of the first 60, with their number in its title; one that says so if there are
      none.

    Raises:
      ValueError: if the three differ in length.

    Example:
      >>> import numpy as np
      >>> from capsjax import viz
      >>> figure = viz.misread(np.zeros((3, 28, 28, 1)), [4, 9, 1], [4, 4, 1], "0123456789")
    """
    images, labels, predicted = np.asarray(images), np.asarray(labels), np.asarray(predicted)
    if not images.shape[:1] == labels.shape == predicted.shape:
        raise ValueError(
            "misread: expected images [N, H, W, C], labels [N] and predicted classes [N], got "
            f"{list(images.shape)}, {list(labels.shape)} and {list(predicted.shape)}"
        )
    wrong = np.flatnonzero(labels != predicted)
    if not wrong.size:
        return _sentence(f"None of {len(labels)} images misread")
    shown = wrong[:_MISREAD]
    names = [_drawable(name, number) for number, name in enumerate(class_names)]
    pairs = [(names[labels[n]], names[predicted[n]]) for n in shown]
    figure, axes = _labelled_grid(_rgb(images[shown]), pairs)
    part = f" (the first {_MISREAD} shown)" if wrong.size > _MISREAD else ""
    title = f"{wrong.size} of {len(labels)} misread{part}: true → predicted"
    axes.set_title(title, fontsize=11, loc="left")
    return figure


def _rgb(images: ArrayLike) -> np.ndarray:
    """uint8 [..., H, W, 3]."""
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


def _scale(height: int, width: int, size: int) -> float:
    """Screen pixels for a pixel, so that an image's longer side takes about `size` of them.

    Small images are enlarged a whole number of times, which keeps their pixels alike.
    """
    scale = size / max(height, width)
    return scale if scale < 1 else float(int(scale))


def _grid_figure(
    grid: np.ndarray, scale: float, *, left: int = 15, top: int = 40
) -> tuple[Figure, Axes]:
    """A figure of a grid, with `left` and `top` screen pixels for what is written there."""
    height, width = scale * grid.shape[0], scale * grid.shape[1]
    whole = max(left + width + 15, 480), top + height + 15  # 480: room for a title
    figure = Figure(figsize=(whole[0] / DPI, whole[1] / DPI), dpi=DPI)
    axes = figure.add_axes((left / whole[0], 15 / whole[1], width / whole[0], height / whole[1]))
    axes.imshow(grid, interpolation="nearest" if scale >= 1 else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure, axes


def _labelled_grid(pixels: np.ndarray, pairs: Sequence[tuple[str, str]]) -> tuple[Figure, Axes]:
    """A figure of images [N, H, W, 3] with "true → predicted" under each, in one line or two."""
    number, height, width, _ = pixels.shape
    scale = _scale(height, width, 70)
    texts = [f"{true} → {predicted}" for true, predicted in pairs]
    if max(map(_text_width, texts)) > 1.3 * scale * width:
        texts = [f"{true}\n→ {predicted}" for true, predicted in pairs]
    room = max(_text_width(line) for text in texts for line in text.split("\n"))

    wider = max(0, round(room / scale) - width)
    lower = round(17 * (1 + texts[0].count("\n")) / scale)
    margins = ((0, 0), (0, lower), (wider // 2, wider - wider // 2), (0, 0))
    cells = np.pad(pixels, margins, constant_values=255)
    separator = max(1, round(12 / scale))
    down, right = cells.shape[1] + separator, cells.shape[2] + separator
    columns = min(number, 12, max(1, int(900 / (right * scale))))
    figure, axes = _grid_figure(image_grid(cells, columns, separator=separator), scale)
    for n, text in enumerate(texts):
        row, column = divmod(n, columns)
        at = column * right + (right - separator) / 2 - 0.5, row * down + height + 2 / scale
        axes.text(*at, text, fontproperties=_FONT, ha="center", va="top", parse_math=False)
    return figure, axes


def _text_width(text: str) -> float:
    """Screen pixels."""
    width, _, _ = RendererAgg(1, 1, DPI).get_text_width_height_descent(text, _FONT, False)
    return width


def _drawable(name: str, number: int) -> str:
    """A class's name, cut at 20 letters; its number if the font lacks a letter of it."""
    font = get_font(findfont(_FONT))
    if not all(font.get_char_index(ord(letter)) for letter in name):
        return f"class {number}"
    return name if len(name) <= 20 else name[:19] + "…"


def _sentence(text: str) -> Figure:
    figure = Figure(figsize=(4.8, 1.2), dpi=DPI)
    figure.text(0.5, 0.5, text, fontsize=11, ha="center", va="center")
    return figure


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    values = (row.get(key) for row in rows)
    return np.array([np.nan if value in (None, "") else float(value) for value in values])


def _curve(axes: Axes, epochs: np.ndarray, values: np.ndarray, label: str, color: str) -> None:
    last = values[np.isfinite(values)][-1]
    marker = "o" if len(epochs) <= 30 else ""
    label = f"{label} (last: {last:.3g})"
    axes.plot(epochs, values, color=color, marker=marker, markersize=4, linewidth=1.5, label=label)


def _value_axis(axes: Axes) -> None:
    """Logarithmic from a decade on, where all values are positive."""
    values = np.concatenate([line.get_ydata() for line in axes.lines] or [np.ones(1)])
    low, high = np.nanmin(values), np.nanmax(values)
    if low > 0 and high >= 10 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(NullLocator())
