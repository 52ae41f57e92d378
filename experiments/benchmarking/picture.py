"""The benchmark's bar charts."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmark_stages import PEAKS

_COLORS = {"capsjax": "C0", "torch": "0.6"}


def draw(contest: Mapping[str, Mapping[str, Any]], stages: Mapping[str, Any]) -> Figure:
    """Images a second of every contender, and milliseconds of every stage."""
    figure = Figure(figsize=(11, 8), dpi=120, layout="constrained")
    panels = figure.subplot_mosaic([["train", "forward"], ["stages"] * 2], height_ratios=(2, 3))
    for task in ("train", "forward"):
        axes = panels[task]
        speeds = {name: r["batch"] / r[task] for name, r in contest.items()}
        colors = [_COLORS["capsjax" if n.startswith("capsjax") else "torch"] for n in speeds]
        bars(axes, list(speeds), list(speeds.values()), colors)
        axes.set_title({"train": "training", "forward": "forward pass"}[task] + ", images/s")
    panels["forward"].set_yticklabels([])
    per_stage(panels["stages"], stages)
    return figure


def bars(axes: Axes, names: list[str], values: list[float], colors: list[str]) -> None:
    axes.bar_label(axes.barh(names, values, color=colors), fmt="%.0f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def per_stage(axes: Axes, stages: Mapping[str, Any]) -> None:
    shown = {name: stage for name, stage in stages.items() if name not in PEAKS}
    places = np.arange(len(shown))
    for library, label, shift in (("capsjax", "capsjax", -0.2), ("torch", "PyTorch", 0.2)):
        times = [1e3 * stage.get(library, np.nan) for stage in shown.values()]
        drawn = axes.barh(places + shift, times, 0.4, color=_COLORS[library], label=label)
        axes.bar_label(drawn, fmt="%.0f", padding=3)
    axes.set_yticks(places, list(shown))
    axes.invert_yaxis()
    axes.set_title("a step's stages, milliseconds, float32, allocator set")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
