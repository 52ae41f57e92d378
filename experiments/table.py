"""The README's table of results, made from results/EXPERIMENT/NAME/SEED/{config.json, metrics.csv}.

python experiments/table.py

Rewrites the table in the README, that of the trials in results/trials.md, and the figure
results/mnist.png. The error is that of the last epoch; the standard deviation is that of the seeds.
An ensemble stands in results/mnist/NAME/test.json, as `mnist.py --testing` leaves it.
"""

import csv
import dataclasses
import json
import math
import shlex
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

import mnist
import trials
from capsjax import NETWORKS
from capsjax.networks._config_json import config_from_json, with_routing
from capsjax.run import Experiment
from capsjax.run.pictures import write
from capsjax.run.settings import Settings, from_json, to_json
from capsjax.viz._text import DPI, FONT, write_title

RESULTS = Path(__file__).with_name("results")
README = Path(__file__).parents[1] / "README.md"
EXPERIMENTS = {"mnist": mnist.MNIST, "trials": trials.TRIALS}
CLASSES = 10  # of all data sets in the table
BEGIN, END = "<!-- python experiments/table.py -->\n", "<!-- end of the table -->\n"


class Run(NamedTuple):
    """What a run left."""

    config: dict[str, Any]
    rows: list[dict[str, str]]  # of metrics.csv

    @property
    def settings(self) -> Settings:
        """The settings."""
        return from_json(self.config["settings"])

    def read(self, column: str) -> list[float]:
        """Returns a column, a number an epoch."""
        return [float(row[column]) for row in self.rows]


def read_run(folder: Path) -> Run:
    """Reads the folder of a run.

    Raises:
      ValueError: if the run has not ended.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    epochs = config["settings"]["training"]["epochs"]
    if len(rows) != epochs:
        raise ValueError(f"{folder}: {len(rows)} of {epochs} epochs; only a whole run counts")
    return Run(config, rows)


def read_results(folder: Path) -> dict[str, list[Run]]:
    """Reads all runs of an experiment: by name, in the order of their seeds."""
    return {
        named.name: [read_run(seed) for seed in sorted(named.iterdir(), key=lambda s: int(s.name))]
        for named in sorted(folder.iterdir())
        if not (named / "test.json").exists()
    }


def read_tests(folder: Path) -> list[dict[str, Any]]:
    """Reads what the tests of an experiment's ensembles left."""
    files = sorted(folder.glob("*/test.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def make_table(
    experiment: str, results: dict[str, list[Run]], tests: list[dict[str, Any]], column: str
) -> str:
    """Makes a table in Markdown, a line for each name, in the order of the mean error."""
    lines = [
        "| network, routing | parameters | command | error, % | each seed | epochs | machine |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for test in tests:
        words = " ".join(f"runs/{name}" for name in test["weights"])
        command = f"python experiments/{experiment}.py --testing --weights {words}"
        error = f"{test['test']['error']:.2f}"
        lines.append(f"| an ensemble | | `{command}` | {error} | | | {describe_machine(test)} |")
    for runs in sorted(results.values(), key=lambda runs: mean_error(runs, column)):
        errors = [run.read(column)[-1] for run in runs]
        error = f"{errors[0]:.2f}"
        if len(runs) > 1:
            error = f"{statistics.mean(errors):.3f} ± {statistics.stdev(errors):.3f}"
        seconds = statistics.median(second for run in runs for second in run.read("seconds"))
        cells = [
            *describe_network(runs[0].config),
            f"`{make_command(experiment, runs[0])}`",
            error,
            ", ".join(f"{error:.2f}" for error in errors),
            f"{len(runs[0].rows)} of {seconds:.0f} s",
            describe_machine(runs[0].config),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def mean_error(runs: list[Run], column: str) -> float:
    """Returns the mean over seeds of the last epoch's error."""
    return statistics.mean(run.read(column)[-1] for run in runs)


def describe_network(config: dict[str, Any]) -> tuple[str, str]:
    """Returns the names of a network and of its routing, and its number of parameters."""
    network = config_from_json(config["network"], NETWORKS)
    image_shape = tuple(config["image_shape"])
    model = nnx.eval_shape(lambda: network.build(image_shape, CLASSES, rngs=nnx.Rngs(0)))
    shapes = nnx.state(model, nnx.Param)
    parameters = sum(math.prod(shape.shape) for shape in jax.tree.leaves(shapes))
    names = [network.name, *([network.routing.name] if hasattr(network, "routing") else [])]
    return ", ".join(f"`{name}`" for name in names), f"{parameters:,}"


def make_command(experiment: str, run: Run) -> str:
    """Makes the command that repeats a run: a flag for each setting that is not the preset's."""
    settings = run.settings
    words = ["python", f"experiments/{experiment}.py"]
    defaults = find_defaults(EXPERIMENTS[experiment], run)
    for group, fields in to_json(settings).items():
        for name, value in fields.items():
            if value != defaults[group][name] or name == "seed":
                words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def find_defaults(experiment: Experiment, run: Run) -> dict[str, dict[str, Any]]:
    """Returns the settings that the command line has if only the run's preset is given."""
    recipe, training = run.settings.recipe, run.settings.training
    preset, settings = experiment.presets[recipe.preset], experiment.settings(recipe.preset)
    shape = tuple(run.config["image_shape"])
    # A decay over the whole run is completed for the run's number of epochs.
    whole = dataclasses.replace(settings.training, epochs=training.epochs)
    complete = dataclasses.replace(preset.complete(whole, shape), epochs=settings.training.epochs)
    network = with_routing(preset.network, recipe.routing) if recipe.routing else preset.network
    first = dataclasses.replace(
        settings.recipe,
        preset=next(iter(experiment.presets)),
        routings=getattr(getattr(network, "routing", None), "iterations", None),
    )
    return to_json(dataclasses.replace(settings, recipe=first, training=complete))


def describe_machine(config: dict[str, Any]) -> str:
    """Describes what a run was made on, and by which code."""
    cores = "1 core" if config["cores"] == 1 else f"{config['cores']} cores"
    device = config["device"]
    machine = f"{cores} of {config['processor']}" if "cpu" in device else device
    return f"{machine}, JAX {config['versions']['jax']}, commit {config['git']}"


def write_between_marks(path: Path, text: str) -> None:
    """Replaces what stands between the two marks in a file."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}{text}{END}{after}", encoding="utf-8")


def draw(results: dict[str, list[Run]]) -> Figure:
    """Draws the test error by epoch: the mean over seeds, and each seed thinly."""
    figure = Figure(figsize=(7, 4), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for number, (name, runs) in enumerate(results.items()):
        errors, color = np.array([run.read("test_error") for run in runs]), f"C{number}"
        epochs = np.arange(1, errors.shape[1] + 1)
        axes.plot(epochs, errors.T, color=color, linewidth=0.5, alpha=0.6)
        axes.plot(epochs, errors.mean(0), ".-", color=color, linewidth=1.8, label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("epoch")
    write_title(axes, "test error (% of images): mean over seeds, and each seed")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, prop=FONT)
    return figure


def make_tables() -> dict[Path, str]:
    """Makes each table, by the file that it stands in."""
    results, tests = read_results(RESULTS / "mnist"), read_tests(RESULTS / "mnist")
    tried = read_results(RESULTS / "trials")
    return {
        README: make_table("mnist", results, tests, "test_error"),
        RESULTS / "trials.md": make_table("trials", tried, [], "validation_error"),
    }


def main() -> None:
    """Makes the README's table, that of the trials, and the figure, and prints the tables."""
    for path, table in make_tables().items():
        write_between_marks(path, table)
        print(table)
    write(draw(read_results(RESULTS / "mnist")), RESULTS / "mnist.png")


if __name__ == "__main__":
    tyro.cli(main)
