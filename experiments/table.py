"""The tables of results, made from results/FOLDER/NAME/SEED/{config.json, metrics.csv}.

python experiments/table.py

Rewrites the tables in the README and in results/trials.md, and the figures results/mnist.png and
results/ablation.png. The error is that of the last epoch; the standard deviation is that of the
seeds. An ensemble stands in results/mnist/NAME/test.json, as `mnist.py --testing` leaves it.
"""

import csv
import dataclasses
import json
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

import ablation
import affnist
import mnist
import multi_mnist
import trials
from capsjax import NETWORKS
from capsjax.networks._config_json import config_from_json, with_routing
from capsjax.run import Experiment
from capsjax.run.pictures import write
from capsjax.run.settings import Settings, from_json, to_json
from capsjax.viz._text import DPI, FONT, write_title
from markdown_tables import format_mean, make_table, write_between_marks

RESULTS = Path(__file__).with_name("results")
README = Path(__file__).parents[1] / "README.md"
EXPERIMENTS = {
    "mnist": mnist.MNIST,
    "trials": trials.TRIALS,
    "multi_mnist": multi_mnist.MULTI_MNIST,
    "affnist": affnist.AFFNIST,
    "ablation": ablation.ABLATION,
}
# Folders of results that are not named like their script.
SCRIPTS = {"other_data": "mnist"}
COLUMNS = (
    "name",
    "network, routing",
    "parameters",
    "command",
    "error, %",
    "each seed",
    "epochs",
    "machine",
)
# Of the networks that were stopped at a target, how much they misread of what was held out.
OTHER_COLUMNS = ("data", *COLUMNS[1:4], "held out, %", *COLUMNS[4:])
# One command trains all networks of the ablation.
ABLATION_COLUMNS = ("name", *COLUMNS[4:])


class Run(NamedTuple):
    """What a run left."""

    script: str
    config: dict[str, Any]
    rows: list[dict[str, str]]  # of metrics.csv

    @property
    def settings(self) -> Settings:
        """The settings."""
        return from_json(self.config["settings"], EXPERIMENTS[self.script].options)

    def read(self, column: str) -> list[float]:
        """Returns a column, a number an epoch."""
        return [float(row[column]) for row in self.rows]


def read_run(folder: Path, script: str = "mnist") -> Run:
    """Reads the folder of a run.

    Raises:
      ValueError: if the run has not ended.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    training = config["settings"]["training"]
    epochs, target = training["epochs"], training.get("target")
    last = float(rows[-1]["validation_error"] or 100) if rows else 100
    reached = target is not None and 100 - last >= target - 1e-6
    if len(rows) != epochs and not reached:
        raise ValueError(f"{folder}: {len(rows)} of {epochs} epochs; only a whole run counts")
    return Run(script, config, rows)


def read_results(folder: Path) -> dict[str, list[Run]]:
    """Reads all runs of a folder: by name, in the order of their seeds."""
    script = SCRIPTS.get(folder.name, folder.name)
    return {
        named.name: [
            read_run(seed, script) for seed in sorted(named.iterdir(), key=lambda s: int(s.name))
        ]
        for named in (sorted(folder.iterdir()) if folder.exists() else ())
        if not (named / "test.json").exists()
    }


def read_tests(folder: Path) -> list[dict[str, Any]]:
    """Reads what the tests of an experiment's ensembles left."""
    files = sorted(folder.glob("*/test.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def make_rows(results: Mapping[str, list[Run]], column: str = "test_error") -> list[dict[str, str]]:
    """Makes a row for each name, in the order of the mean error."""
    return [make_row(name, runs, column) for name, runs in sort(results, column).items()]


def sort(results: Mapping[str, list[Run]], column: str = "test_error") -> dict[str, list[Run]]:
    """Sorts names by the mean error of their runs."""
    return dict(sorted(results.items(), key=lambda item: mean_error(item[1], column)))


def make_row(name: str, runs: list[Run], column: str) -> dict[str, str]:
    """Makes the row of the runs that differ by their seed alone."""
    first, errors = runs[0], [run.read(column)[-1] for run in runs]
    counts = [len(run.rows) for run in runs]
    epochs = " to ".join(map(str, dict.fromkeys([min(counts), max(counts)])))
    seconds = statistics.median(second for run in runs for second in run.read("seconds"))
    names, parameters = describe_network(first.config)
    row = {
        "name": name,
        "data": describe_data(first),
        "network, routing": names,
        "parameters": parameters,
        "command": f"`{make_command(first)}`",
        "error, %": format_mean(errors),
        "each seed": ", ".join(f"{error:.2f}" for error in errors),
        "epochs": f"{epochs} × {seconds:.0f} s",
        "machine": describe_machines([run.config for run in runs]),
    }
    if first.settings.training.target is not None:
        row["held out, %"] = format_mean([run.read("validation_error")[-1] for run in runs])
    return row


def make_test_row(test: Mapping[str, Any]) -> dict[str, str]:
    """Makes the row of an ensemble."""
    words = " ".join(f"runs/{name}" for name in test["weights"])
    return {
        "network, routing": "an ensemble",
        "command": f"`python experiments/mnist.py --testing --weights {words}`",
        "error, %": f"{test['test']['error']:.2f}",
        "machine": describe_machines([test]),
    }


def describe_data(run: Run) -> str:
    """Returns the name of the experiment or, where any data set may be given, of that."""
    return run.settings.images.dataset if run.script == "mnist" else run.script


def mean_error(runs: list[Run], column: str) -> float:
    """Returns the mean over seeds of the last epoch's error."""
    return statistics.mean(run.read(column)[-1] for run in runs)


def describe_network(config: dict[str, Any]) -> tuple[str, str]:
    """Returns the names of a network and of its routing, and its number of parameters."""
    network = config_from_json(config["network"], NETWORKS)
    image_shape, classes = tuple(config["image_shape"]), config.get("num_classes", 10)
    model = nnx.eval_shape(lambda: network.build(image_shape, classes, rngs=nnx.Rngs(0)))
    shapes = nnx.state(model, nnx.Param)
    parameters = sum(math.prod(shape.shape) for shape in jax.tree.leaves(shapes))
    names = [network.name, *([network.routing.name] if hasattr(network, "routing") else [])]
    return ", ".join(f"`{name}`" for name in names), f"{parameters:,}"


def make_command(run: Run) -> str:
    """Makes the command that repeats a run: a flag for each setting that is not the preset's."""
    settings = run.settings
    words = ["python", f"experiments/{run.script}.py"]
    defaults = find_defaults(EXPERIMENTS[run.script], run)
    for group, fields in to_json(settings).items():
        for name, value in fields.items():
            if value != defaults[group][name] or name == "seed":
                words += make_flag(name.replace("_", "-"), value)
    return shlex.join(words)


def make_flag(name: str, value: Any) -> list[str]:
    """Makes the words that set a flag to a value."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


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


def describe_machines(configs: Sequence[Mapping[str, Any]]) -> str:
    """Describes what runs were made on, and by which code."""
    machines = dict.fromkeys(map(describe_machine, configs))
    commits = dict.fromkeys(config["git"] or "unknown" for config in configs)
    return f"{' and '.join(machines)}, commit {', '.join(commits)}"


def describe_machine(config: Mapping[str, Any]) -> str:
    """Describes what a run was made on."""
    cores = "1 core" if config["cores"] == 1 else f"{config['cores']} cores"
    device = config["device"]
    machine = f"{cores} of {config['processor']}" if "cpu" in device else device
    return f"{machine}, JAX {config['versions']['jax']}"


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


def draw_ablation(results: Mapping[str, list[Run]]) -> Figure:
    """Draws the last epoch's errors of the networks that differ in one part."""
    runs_by_name = sort(results).items()
    return ablation.draw(
        {name: [run.read("test_error")[-1] for run in runs] for name, runs in runs_by_name}
    )


def make_tables() -> dict[tuple[Path, str], str]:
    """Makes each table, by the file and the mark where it stands."""
    tests = [make_test_row(test) for test in read_tests(RESULTS / "mnist")]
    others = [
        row
        for folder in ("multi_mnist", "affnist", "other_data")
        for row in make_rows(read_results(RESULTS / folder))
    ]
    changed = read_results(RESULTS / "ablation")
    tried = make_rows(read_results(RESULTS / "trials"), "validation_error")
    return {
        (README, "mnist"): make_table(COLUMNS, tests + make_rows(read_results(RESULTS / "mnist"))),
        (README, "others"): make_table(OTHER_COLUMNS, others),
        (README, "ablation"): make_table(ABLATION_COLUMNS, make_rows(changed)),
        (RESULTS / "trials.md", "trials"): make_table(COLUMNS, tried),
    }


def main() -> None:
    """Makes the tables and the figures, and prints the tables."""
    for (path, mark), table in make_tables().items():
        write_between_marks(path, mark, table)
        print(table)
    write(draw(read_results(RESULTS / "mnist")), RESULTS / "mnist.png")
    write(draw_ablation(read_results(RESULTS / "ablation")), RESULTS / "ablation.png")


if __name__ == "__main__":
    tyro.cli(main)
