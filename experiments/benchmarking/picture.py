"""The benchmark's bar charts."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from benchmarking.stages import PEAKS

_COLORS = {"capsjax": "C0", "torch": "0.6"}
_TITLES = {"train": "training, images/s", "forward": "forward pass, images/s"}


def draw_results(contest: Mapping[str, Mapping[str, Any]], stages: Mapping[str, Any]) -> Figure:
    """Draws images a second of every contender, and milliseconds of every stage."""
    figure = Figure(figsize=(11, 8), dpi=120, layout="constrained")
    panels = figure.subplot_mosaic([["train", "forward"], ["stages"] * 2], height_ratios=(2, 3))
    for task in _TITLES:
        _draw_speeds(panels[task], contest, task)
    panels["forward"].set_yticklabels([])
    _draw_stages(panels["stages"], stages)
    return figure


def _draw_speeds(axes: Axes, contest: Mapping[str, Mapping[str, Any]], task: str) -> None:
    speeds = {name: result["batch"] / result[task] for name, result in contest.items()}
    colors = [_COLORS["capsjax" if name.startswith("capsjax") else "torch"] for name in speeds]
    _label_bars(axes, axes.barh(list(speeds), list(speeds.values()), color=colors))
    _finish(axes, _TITLES[task])


def _draw_stages(axes: Axes, stages: Mapping[str, Any]) -> None:
    shown = {name: stage for name, stage in stages.items() if name not in PEAKS}
    places = np.arange(len(shown))
    for library, label, shift in (("capsjax", "capsjax", -0.2), ("torch", "PyTorch", 0.2)):
        times = [1e3 * stage.get(library, np.nan) for stage in shown.values()]
        bars = axes.barh(places + shift, times, 0.4, color=_COLORS[library], label=label)
        _label_bars(axes, bars)
    axes.set_yticks(places, list(shown))
    _finish(axes, "a step's stages, milliseconds, float32, allocator set")
    axes.legend(frameon=False, loc="upper right")  # the bars of conv1 leave room on any machine


def _label_bars(axes: Axes, bars: BarContainer) -> None:
    axes.bar_label(bars, fmt="%.0f", padding=3)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
