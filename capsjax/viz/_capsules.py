"""The figure of what capsules and routing do."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from capsjax.diagnostics import (
    ClassScores,
    CouplingStatistics,
    Diagnosis,
    LayerActivations,
    ScoreHistogram,
)
from capsjax.viz._text import DPI, FONT, format_class_name, measure_width, write_title

_PRESENT, _ABSENT = "#0072B2", "#D55E00"
_COLORS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_COUPLINGS = {
    "entropy": "1: all are equal, 0: one is 1",
    "bonding": "the largest coupling of an active capsule",
    "dynamics": "1: they change with the image, 0: never",
    "active": "share of capsules with one above 1.5 / J",
}
_PANEL_SIZE, _MARGIN = (5.3, 4.2), 0.15  # inches
_MOST_NAMES = 20  # beside a panel


def capsules(diagnosis: Diagnosis, class_names: Sequence[str]) -> Figure:
    """Draws the class scores, the lengths of all capsules, and the couplings by iteration.

    Args:
      diagnosis: from `capsjax.diagnostics.diagnose`.
      class_names: a name for each class; its number is written where the font lacks a character.

    Returns:
      A figure of two to four panels: one of layers and one of couplings only where the diagnosis
      has any.

    Raises:
      ValueError: if the network has no capsules, or there are not as many names as classes.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, capsjax
      >>> from capsjax import viz
      >>> net = capsjax.CapsNet(channels=16, types=2, routings=2, rngs=nnx.Rngs(0))
      >>> images, labels = jnp.zeros((4, 28, 28, 1)), jnp.arange(4)
      >>> found = capsjax.diagnostics.diagnose(net, images, labels)
      >>> len(viz.capsules(found, "0123456789").axes)
      4

    References:
      Mitterreiter, Koch, Giesen, Laue, 2023, arXiv:2301.01583.
    """
    if not diagnosis.scores:
        raise ValueError("capsules: expected the diagnosis of a network that has capsules")
    histogram = diagnosis.scores[-1].histogram
    if len(class_names) != len(histogram.present):
        raise ValueError(
            f"capsules: expected names of {len(histogram.present)} classes, got {len(class_names)}"
        )
    names = [format_class_name(name, number) for number, name in enumerate(class_names)]
    panels: list[Callable[[Axes], None]] = [
        lambda axes: _draw_scores(axes, diagnosis.scores, diagnosis.images),
        lambda axes: _draw_classes(axes, histogram, names),
    ]
    if diagnosis.layers:
        panels.append(lambda axes: _draw_layers(axes, diagnosis.layers))
    if diagnosis.couplings:
        panels.append(lambda axes: _draw_couplings(axes, diagnosis.couplings))
    lines = -(-len(panels) // 2)
    width, height = _PANEL_SIZE
    widths = [width, width + max(map(measure_width, names)) / DPI]
    layout = ConstrainedLayoutEngine(w_pad=_MARGIN, h_pad=_MARGIN)
    figure = Figure(figsize=(sum(widths), lines * height), dpi=DPI, layout=layout)
    # Figures of their own, so that the names beside one panel do not move the others.
    parts = figure.subfigures(lines, 2, squeeze=False, width_ratios=widths)
    for part, draw in zip(parts.flat, panels, strict=False):
        draw(part.subplots())
    return figure


def _draw_scores(axes: Axes, scores: Sequence[ClassScores], images: int) -> None:
    """Draws the histograms over all classes, and those without routing as outlines."""
    title = f"{images:,} images, {100 * scores[-1].error:.2f} % misread"
    kinds = {"present": ("the image's class", _PRESENT), "absent": ("other classes", _ABSENT)}
    for kind, (label, color) in kinds.items():
        counts = getattr(scores[-1].histogram, kind).sum(0)
        _draw_shares(axes, counts, color=color, alpha=0.75, fill=True, label=label)
    if len(scores) > 1:
        title += f"; without routing {100 * scores[0].error:.2f} %"
        for kind, (label, color) in kinds.items():
            counts = getattr(scores[0].histogram, kind).sum(0)
            label = f"{label}, without routing"
            _draw_shares(axes, counts, color=color, linestyle=":", linewidth=1.5, label=label)
    write_title(axes, title)
    axes.set(xlabel="class score, such as |v|", ylabel="share of scores")
    _finish(axes)


def _draw_classes(axes: Axes, histogram: ScoreHistogram, names: Sequence[str]) -> None:
    """Draws both histograms of every class in a row, the darker the more."""
    pixels = np.ones((*histogram.present.shape, 3))
    for counts, color in ((histogram.present, _PRESENT), (histogram.absent, _ABSENT)):
        share = np.asarray(counts) / np.maximum(np.max(counts, 1, keepdims=True), 1)
        pixels *= 1 - np.sqrt(share)[..., None] * (1 - np.array(to_rgb(color)))
    extent = (0, 1, len(names) - 0.5, -0.5)
    axes.imshow(pixels, aspect="auto", extent=extent, interpolation="nearest")
    write_title(axes, "Class by class, the darker the more images")
    step = -(-len(names) // _MOST_NAMES)
    axes.set_yticks(range(0, len(names), step), names[::step], parse_math=False)
    axes.tick_params(left=False)
    axes.set(xlabel="class score, such as |v|")
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_layers(axes: Axes, layers: Mapping[str, LayerActivations]) -> None:
    """Draws the histogram of a layer's mean lengths or activations, and counts the dead."""
    for (name, layer), color in zip(layers.items(), itertools.cycle(_COLORS)):
        counts, _ = np.histogram(np.clip(layer.mean, 0, 1), np.linspace(0, 1, 51))
        label = f"{name}: {np.sum(layer.dead):,} of {layer.dead.size:,} dead"
        _draw_shares(axes, counts, color=color, alpha=0.75, fill=True, label=label)
    write_title(axes, "Lengths or activations, averaged over the images")
    axes.set(xlabel="mean length or activation; dead if it is below 0.01 and hardly varies")
    axes.set(ylabel="share of capsules")
    _finish(axes)


def _draw_couplings(axes: Axes, couplings: Sequence[CouplingStatistics]) -> None:
    """Draws each number over the iterations, with what it means and its last value."""
    iterations, top = range(1, len(couplings) + 1), 1.0
    for (name, meaning), color in zip(_COUPLINGS.items(), _COLORS, strict=True):
        values = [getattr(statistics, name) for statistics in couplings]
        label = f"{name} {values[-1]:.3g} ({meaning})"
        axes.plot(iterations, values, color=color, marker="o", markersize=4, label=label)
        top = max(top, *values)
    write_title(axes, "Couplings in each iteration of the last layer's routing")
    label = "iteration, the first without routing" if len(couplings) > 1 else "iteration"
    axes.set(xlabel=label, ylim=(-0.03, top + 0.03))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _finish(axes)


def _draw_shares(axes: Axes, counts: ArrayLike, **style: Any) -> None:
    """Draws the counts in equal bins from 0 to 1 as shares of their sum."""
    counts = np.asarray(counts)
    edges = np.linspace(0, 1, len(counts) + 1)
    axes.stairs(counts / max(1, counts.sum()), edges, **style)
    axes.set_xlim(0, 1)


def _finish(axes: Axes) -> None:
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, prop=FONT)
