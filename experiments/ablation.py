"""What does each part of CapsNet add? One part changed at a time, with the spread over seeds.

python experiments/ablation.py

Each network trains by the preset `seed`, but on 10,000 training digits for 10 epochs, so that all
27 runs take a few hours on a CPU; the error is that of all 10,000 test digits after the last epoch.
All networks are trained with one random seed before the next is begun. Stopped and started again,
the command continues where it was, to the bit. With one iteration of routing the couplings are
uniform; random couplings are the same with every seed. Only differences larger than the spread mean
anything, and a longer training may rank the parts differently: 10 epochs of 10,000 digits are 1,000
steps, and the preset `paper` takes 300,000.

Reference: Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules", 2017, arXiv:1710.09829,
table 1: with reconstruction 0.29 % with one iteration and 0.25 % with three, without it 0.34 % and
0.35 %.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
from matplotlib.figure import Figure

from capsjax import Agreement, Random
from capsjax.networks import CapsNetConfig
from capsjax.presets import SEED, Preset, check
from capsjax.run import Experiment, run
from capsjax.run.command_line import refusals
from capsjax.run.lifecycle import failures
from capsjax.run.machine import configure
from capsjax.run.pictures import write
from capsjax.viz._text import DPI, FONT, write_title
from markdown_tables import format_mean, make_table


def change(network: CapsNetConfig | None = None, **training: Any) -> Preset:
    """Changes one part of the preset `seed`."""
    changed = dataclasses.replace(SEED.training, **training)
    return dataclasses.replace(SEED, network=network or SEED.network, training=changed)


CONTROL = "routings-3"
GRID = {
    **{f"routings-{n}": change(CapsNetConfig(routing=n)) for n in range(1, 6)},
    "random": change(CapsNetConfig(routing=Random())),
    "gradient": change(CapsNetConfig(routing=Agreement(stop_gradient=False))),
    "flat-grouping": change(CapsNetConfig(grouping="flat")),
    "no-reconstruction": change(lam_recon=0.0),
}
ABLATION = Experiment("Change one part of CapsNet.", GRID, draw=lambda *_: None)


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Trains every network of the grid with every seed, and draws their errors."""

    folder: Path = Path("runs/ablation")
    """Folder of all runs and of ablation.png; it may hold some of the runs already."""
    seeds: int = 3
    """Seeds from 0."""
    epochs: int = 10
    """Passes over the training images."""
    train_size: int = 10_000
    """Training images, drawn at random by the seed."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format of the networks' computations."""
    data_dir: Path | None = None
    """Where the images are, as in mnist.py. None: MNIST as it comes with the package."""

    def __post_init__(self) -> None:
        check(self.seeds >= 1, "seeds", "1 or more", self.seeds)

    def train(self, name: str, seed: int) -> float:
        """Trains a network unless it is there already, and returns its test error in percent."""
        settings = ABLATION.settings(name)
        changed: dict[str, Any] = {
            "recipe": {"seed": seed, "precision": self.precision},
            "training": {"epochs": self.epochs},
            "images": {"train_size": self.train_size, "data_dir": self.data_dir},
            "run": {"save_dir": self.folder / name / str(seed)},
        }
        with refusals(), failures(changed["run"]["save_dir"]):
            parts = {
                part: dataclasses.replace(getattr(settings, part), **values)
                for part, values in changed.items()
            }
            return run(ABLATION, dataclasses.replace(settings, **parts)).test.error


def make_rows(errors: Mapping[str, Sequence[float]]) -> list[dict[str, str]]:
    """Makes the row of each network."""
    return [
        {
            "network": name,
            "test error, %": format_mean(each),
            "each seed": ", ".join(f"{error:.2f}" for error in each),
        }
        for name, each in errors.items()
    ]


def draw(errors: Mapping[str, Sequence[float]]) -> Figure:
    """Draws each seed's error, the mean and one standard deviation around it, a row a network."""
    figure = Figure(figsize=(7, 0.5 + 0.35 * len(errors)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for row, (name, each) in enumerate(errors.items()):
        color = "C1" if name == CONTROL else "C0"
        mean, spread = statistics.mean(each), statistics.stdev(each) if len(each) > 1 else 0
        axes.plot(each, [row] * len(each), ".", color=color, alpha=0.5, markersize=5)
        axes.errorbar(mean, row, xerr=spread, fmt="o", color=color, capsize=3)
    if CONTROL in errors:
        axes.axvline(statistics.mean(errors[CONTROL]), color="C1", linewidth=0.8, alpha=0.5)
    axes.set_yticks(range(len(errors)), list(errors), fontproperties=FONT)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.03 * axes.get_xlim()[1])  # with place for the last dot
    write_title(axes, "test error (% of images): each seed, mean ± standard deviation")
    axes.grid(axis="x", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Does what the command line says."""
    configure()
    errors: dict[str, list[float]] = {name: [] for name in GRID}
    with refusals():
        ablation = tyro.cli(Ablation)
    try:
        for seed in range(ablation.seeds):
            for name, found in errors.items():
                found.append(ablation.train(name, seed))
                print(f"{name}, seed {seed}: test error {found[-1]:.2f} %\n", flush=True)
    except KeyboardInterrupt:  # between two runs
        raise SystemExit(130) from None
    write(draw(errors), ablation.folder / "ablation.png")
    print(make_table(("network", "test error, %", "each seed"), make_rows(errors)))


if __name__ == "__main__":
    main()
