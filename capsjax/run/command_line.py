"""The command line: which flags there are, where their defaults come from, what is refused."""

import contextlib
import dataclasses
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from capsjax import weights
from capsjax.networks._config_json import with_routing
from capsjax.presets import check
from capsjax.run.experiment import Experiment
from capsjax.run.folder import read_config
from capsjax.run.settings import (
    Settings,
    find_weights,
    is_run,
    read_settings,
    refuse_changes,
)


@dataclasses.dataclass(frozen=True)
class Source:
    """The flags that decide where the defaults of all others come from."""

    preset: str | None = None
    network: str | None = None
    routing: str | None = None
    resume: Path | None = None
    weights: tuple[Path, ...] = ()
    testing: bool = False


def parse(args: Sequence[str] | None, experiment: Experiment) -> Settings:
    """Reads the command line; a resumed or tested run's config.json gives the defaults.

    Raises:
      SystemExit: with status 2 and a message, for any value that makes no sense.
    """
    args = sys.argv[1:] if args is None else list(args)
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    source, _ = tyro.cli(Source, args=args, return_unknown_args=True, add_help=False, config=config)
    with refusals():
        default = _find_defaults(source, experiment)
    settings = _ask(args, default, config, _describe_experiment(experiment))
    with refusals():
        if source.resume is not None:
            refuse_changes(settings, default)
    return settings


def _describe_experiment(experiment: Experiment) -> str:
    """Returns the first lines of the help, which tyro leaves as they are if a space begins them."""
    words = f"{experiment.description} Presets: {', '.join(experiment.presets)}."
    return "\n ".join(textwrap.wrap(words, shutil.get_terminal_size().columns - 1))


def _ask(args: Sequence[str], default: Settings, config: Any, description: str) -> Settings:
    """Reads all flags, those of the options too, whose type only the experiment knows."""
    kind: Any = Settings
    options = default.options
    if options is not None:
        field = ("options", type(options), dataclasses.field(default=options))
        kind = dataclasses.make_dataclass("Settings", [field], bases=(Settings,), frozen=True)
    names = [field.name for field in dataclasses.fields(Settings)]
    first = kind(**{name: getattr(default, name) for name in names})
    asked = tyro.cli(kind, args=args, default=first, config=config, description=description)
    return Settings(**{name: getattr(asked, name) for name in names})


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turns an error that the user can mend into one message and exit status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


class _Told(NamedTuple):
    """What weights tell of the network that they are for, and of how it was trained."""

    preset: str | None = None
    network: str | None = None
    routing: str | None = None
    routings: int | None = None


def _find_defaults(source: Source, experiment: Experiment) -> Settings:
    if source.resume is not None:
        return _resume_defaults(source, source.resume, experiment)
    files = tuple(map(find_weights, source.weights))
    for file in files:
        if not file.exists():
            raise ValueError(f"--weights {file}: there is no such file or folder")
    if not files:
        return _preset_defaults(source, experiment, None)
    if not is_run(files[0]):
        return _preset_defaults(source, experiment, _describe(files[0]))
    saved = read_settings(files[0], experiment.options)
    network = _check_names(source, files[0])
    if not source.testing:
        recipe = saved.recipe
        told = _Told(recipe.preset, network, recipe.routing, recipe.routings)
        return _preset_defaults(source, experiment, told)
    if len(files) > 1:  # the others may have another routing
        recipe = dataclasses.replace(saved.recipe, routing=None, routings=None)
        return dataclasses.replace(saved, recipe=recipe)
    return saved


def _resume_defaults(source: Source, folder: Path, experiment: Experiment) -> Settings:
    saved = read_settings(folder, experiment.options)
    _check_names(source, folder)
    recipe = dataclasses.replace(
        saved.recipe, network=source.network, routing=source.routing or saved.recipe.routing
    )
    run = dataclasses.replace(saved.run, weights=(), resume=folder)
    return dataclasses.replace(saved, recipe=recipe, run=run)


def _check_names(source: Source, run: Path) -> str | None:
    """Returns the name of a run's network.

    Raises:
      ValueError: if another network or another routing is asked for.
    """
    network = read_config(run)["network"]
    name, routing = network.get("name"), (network.get("routing") or {}).get("name")
    if source.network not in (None, name):
        raise ValueError(f"--network {source.network}: the network of {run} is {name}")
    if source.routing not in (None, routing):
        raise ValueError(
            f"--routing {source.routing}: the network of {run} was trained with {routing}"
        )
    return name


def _preset_defaults(source: Source, experiment: Experiment, told: _Told | None) -> Settings:
    """Returns the defaults of the preset that is asked for, or else of what the weights tell."""
    settings = experiment.settings(_choose_preset(source, experiment, told or _Told()))
    routing, routings = None, None  # of several weights each has its own
    if told is None:
        network = experiment.presets[settings.recipe.preset].network
        routings = _iterations(with_routing(network, source.routing) if source.routing else network)
    elif len(source.weights) == 1:
        routing, routings = told.routing, told.routings
    recipe = dataclasses.replace(settings.recipe, routing=routing, routings=routings)
    return dataclasses.replace(settings, recipe=recipe)


def _choose_preset(source: Source, experiment: Experiment, told: _Told) -> str | None:
    """Returns the preset that is asked for, by name or by its network; None: the default."""
    networks = {name: preset.network.name for name, preset in experiment.presets.items()}
    known = told.preset if told.preset in networks else None
    if source.preset and known and source.preset != known:
        raise ValueError(
            f"--preset {source.preset}, but {source.weights[0]} is of --preset {known}"
        )
    preset = source.preset or known
    if preset is not None:
        expected = " or ".join(map(repr, networks))
        check(preset in networks, "preset", expected, repr(preset))
    if source.network is not None:
        expected = " or ".join(map(repr, dict.fromkeys(networks.values())))
        check(source.network in networks.values(), "network", expected, repr(source.network))
    network = source.network or told.network
    if preset is None:
        return next((name for name in networks if networks[name] == network), None)
    if source.network not in (None, networks[preset]):
        raise ValueError(
            f"--network {source.network}, but the network of --preset {preset} is "
            f"{networks[preset]}"
        )
    return preset


def _describe(file: Path) -> _Told:
    """Returns what a weights file tells; a damaged one tells anything, and is refused later."""
    about = weights.describe(file)
    if about is None:
        return _Told()
    preset = about.notes.get("preset")
    return _Told(str(preset), about.config.name, None, _iterations(about.config))


def _iterations(config: Any) -> int | None:
    """Returns the iterations of a network's routing; None if it has none."""
    return getattr(getattr(config, "routing", None), "iterations", None)
