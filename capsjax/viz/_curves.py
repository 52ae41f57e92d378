"""The figure of error and losses over the epochs of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator

from capsjax.viz._text import DPI, FONT, draw_sentence, write_title

_SPLITS = {"train": "training", "validation": "validation", "test": "test"}
_COLORS = {"train": "#0072B2", "validation": "#009E73", "test": "#D55E00"}
_TITLES = {
    "error": "error (% of images)",
    "digit_error": "error (% of digits)",
    "loss": "total loss",
}
_PANEL_SIZE = (5, 3.5)  # inches


def curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws error and losses over the epochs of a run, a panel each.

    There is a panel for every name that has a finite value in a column `{split}_{name}`, where
    the split is train, validation or test. The panel of `error`, in percent, comes first, then
    that of `loss`, the total, unless one term is all of it; every other name is that of a term of
    the loss. Other columns are ignored.

    Args:
      rows: one mapping per epoch, with `epoch` and the columns; numbers, or text as read from a
        CSV file, empty where unknown.

    Returns:
      A figure of the panels; if there are none, a figure of a sentence that says so.

    Raises:
      ValueError: if there is no row.

    Example:
      >>> from capsjax import viz
      >>> rows = [{"epoch": 1, "test_error": "1.31"}, {"epoch": 2, "test_error": "0.92"}]
      >>> len(viz.curves(rows).axes)
      1
    """
    if not rows:
        raise ValueError("curves: expected a row for at least one epoch, got none")
    panels = {name: drawn for name in _find_names(rows) if (drawn := _read_splits(rows, name))}
    terms = [values for name, values in panels.items() if name not in _TITLES]
    if any(_are_equal(values, panels.get("loss", {})) for values in terms):
        del panels["loss"]
    if not panels:
        return draw_sentence("No error or loss has a finite value")
    epochs = _read_column(rows, "epoch")
    columns, lines = min(2, len(panels)), -(-len(panels) // 2)
    size = columns * _PANEL_SIZE[0], lines * _PANEL_SIZE[1]
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    for n, (name, values) in enumerate(panels.items(), start=1):
        _draw_panel(figure.add_subplot(lines, columns, n), name, epochs, values)
    return figure


def _find_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the names in columns `{split}_{name}`: error, loss, the others as they occur."""
    # csv.DictReader keeps the surplus values of a row under None, hence str.
    columns = dict.fromkeys(str(column) for row in rows for column in row)
    parts = [column.partition("_") for column in columns]
    names = dict.fromkeys(name for split, _, name in parts if split in _SPLITS and name)
    return sorted(names, key=lambda name: (name != "error", name != "loss"))


def _read_splits(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, np.ndarray]:
    """Reads the columns of a name, by split, leaving out those without a finite value."""
    values = {split: _read_column(rows, f"{split}_{name}") for split in _SPLITS}
    return {split: column for split, column in values.items() if np.isfinite(column).any()}


def _read_column(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """Reads a column as numbers, NaN where there is none."""
    values = (row.get(key) for row in rows)
    return np.array([np.nan if value in (None, "") else float(value) for value in values])


def _are_equal(values: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]) -> bool:
    """Returns whether both have the same splits and the same numbers."""
    return values.keys() == others.keys() and all(
        np.array_equal(column, others[split], equal_nan=True) for split, column in values.items()
    )


def _draw_panel(
    axes: Axes, name: str, epochs: np.ndarray, values: Mapping[str, np.ndarray]
) -> None:
    """Draws one curve per split, under a title that says what the name stands for."""
    for split, column in values.items():
        _draw_curve(axes, epochs, column, split)
    write_title(axes, _TITLES.get(name, f"{name.replace('_', ' ')} loss"))
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    _choose_value_scale(axes, np.concatenate(list(values.values())))
    axes.legend(frameon=False, prop=FONT)


def _draw_curve(axes: Axes, epochs: np.ndarray, values: np.ndarray, split: str) -> None:
    """Draws a split's values, with points if they are few and the last one in the legend."""
    last = values[np.isfinite(values)][-1]
    label = f"{_SPLITS[split]} (last: {last:.3g})"
    marker = "o" if len(epochs) <= 30 else ""
    color = _COLORS[split]
    axes.plot(epochs, values, color=color, marker=marker, markersize=4, linewidth=1.5, label=label)


def _choose_value_scale(axes: Axes, values: np.ndarray) -> None:
    """Makes the axis logarithmic if all values are positive and span a decade or more."""
    low, high = np.nanmin(values), np.nanmax(values)
    if low > 0 and high >= 10 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(NullLocator())
