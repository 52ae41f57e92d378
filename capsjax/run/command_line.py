"""The command line: which flags there are, where their defaults come from, what is refused."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

from capsjax import weights
from capsjax.presets import check
from capsjax.run.experiment import Experiment
from capsjax.run.settings import Settings, find_weights, is_run, read_settings, refuse_changes


@dataclasses.dataclass(frozen=True)
class Source:
    """The flags that decide where the defaults of all others come from."""

    preset: str | None = None
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
    settings = tyro.cli(
        Settings, args=args, default=default, config=config, description=experiment.description
    )
    with refusals():
        if source.resume is not None:
            refuse_changes(settings, default)
    return settings


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turns an error that the user can mend into one message and exit status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _find_defaults(source: Source, experiment: Experiment) -> Settings:
    if source.resume is not None:
        saved = read_settings(source.resume)
        run = dataclasses.replace(saved.run, weights=(), resume=source.resume)
        return dataclasses.replace(saved, run=run)
    files = tuple(map(find_weights, source.weights))
    for file in files:
        if not file.exists():
            raise ValueError(f"--weights {file}: there is no such file or folder")
    if not files:
        return _preset_defaults(source, experiment, None, None)
    if not is_run(files[0]):
        return _preset_defaults(source, experiment, *_describe(files[0]))
    saved = read_settings(files[0])
    if not source.testing:
        return _preset_defaults(source, experiment, saved.recipe.preset, saved.recipe.routings)
    if len(files) > 1:  # the others may have other routings
        return dataclasses.replace(saved, recipe=dataclasses.replace(saved.recipe, routings=None))
    return saved


def _preset_defaults(
    source: Source, experiment: Experiment, preset_of_weights: str | None, routings: int | None
) -> Settings:
    """Returns the defaults of the preset that is asked for, or else of the weights' preset."""
    names = list(experiment.presets)
    expected = " or ".join(map(repr, names))
    if source.preset is not None:
        check(source.preset in names, "preset", expected, repr(source.preset))
    known = preset_of_weights if preset_of_weights in names else None
    if source.preset and known and source.preset != known:
        raise ValueError(
            f"--preset {source.preset}, but {source.weights[0]} is of --preset {known}"
        )
    settings = experiment.settings(source.preset or known)
    if len(source.weights) > 1:
        routings = None  # each has its own
    elif not source.weights:
        routings = _iterations(experiment.presets[settings.recipe.preset].network)
    return dataclasses.replace(
        settings, recipe=dataclasses.replace(settings.recipe, routings=routings)
    )


def _describe(file: Path) -> tuple[str | None, int | None]:
    """Returns the preset and the iterations of routing that a weights file tells, if any.

    A damaged file tells anything; it is refused when it is loaded.
    """
    about = weights.describe(file)
    if about is None:
        return None, 3
    return about.notes.get("preset"), _iterations(about.config)


def _iterations(config: Any) -> int | None:
    """Returns the iterations of a network's routing; None if it has none."""
    return getattr(getattr(config, "routing", None), "iterations", None)
