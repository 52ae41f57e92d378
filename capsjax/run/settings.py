"""The settings of a run: dataclasses, from which the command line and config.json follow."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from capsjax._pretrained import PRETRAINED
from capsjax.presets import Training, check
from capsjax.run.folder import FINAL_WEIGHTS, INITIAL_WEIGHTS, read_config

# Of no path, tyro would show the default as nothing at all.
_Paths = Annotated[tuple[Path, ...], tyro.conf.arg(help_behavior_hint="(default: none)")]


def find_weights(weights: Path) -> Path:
    """Returns what `--weights` names: a run or a file; or else a pretrained network's file."""
    return weights if weights.exists() else PRETRAINED.get(str(weights), weights)


def is_run(weights: Path) -> bool:
    """Returns whether `--weights` names a run, not a file."""
    return not weights.is_file()


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The preset gives the defaults here and of the training options: see --preset NAME --help."""

    preset: str = "seed"
    """Recipe: one of the presets named above."""
    network: str | None = None
    """capsnet, efficient, matrix or cnn, with its first preset. None: as --preset says."""
    routing: str | None = None
    """agreement, self_attention, uniform or random. None: as the preset's network has it."""
    routings: int | None = None
    """Iterations of routing. None: as the network has it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format of the network's computations. Parameters and sums are always float32."""
    seed: int = 0
    """Random seed of weights, batches, warps, and the choice of training images."""

    def __post_init__(self) -> None:
        routings = self.routings
        check(routings is None or routings >= 1, "routings", "1 or more", routings)
        check(0 <= self.seed < 2**32, "seed", "from 0 to 2^32 - 1", self.seed)


@dataclasses.dataclass(frozen=True)
class Images:
    """MNIST comes with the package and needs no download. Give your own images a name of their own,
    since 28×28 images named mnist get the names of its classes."""

    dataset: str = "mnist"
    """mnist, fashion_mnist, kmnist, emnist/letters, another TFDS name, or a name for your data."""
    data_dir: Path | None = None
    """A TFDS folder, IDX or smallNORB files, an .npz, or train/CLASS/ and test/CLASS/ of images."""
    download: bool = False
    """Download the data set, of the MNIST family, and prepare it as TensorFlow Datasets does."""
    train_size: int | None = None
    """Train on this many images, chosen at random, for a quick look. None: on all of them."""
    validation: int = 0
    """Training images held out for validation. The epoch that is best on them gives the result."""

    def __post_init__(self) -> None:
        size = self.train_size
        check(size is None or size >= 1, "train_size", "1 or more", size)
        check(self.validation >= 0, "validation", "0 or more", self.validation)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder holds its settings, metrics, checkpoints and pictures."""

    save_dir: Path | None = None
    """New folder for this run. None: runs/DATASET-TIME."""
    checkpoint_steps: int = 200
    """Steps between checkpoints; one more is made at the end of each epoch."""
    devices: int | None = None
    """Devices to split a batch over. None: as many as divide it evenly."""
    resume: Path | None = None
    """Folder of a run to continue. --devices and --data-dir may change, --epochs may be raised."""
    weights: _Paths = ()
    """Start from, or test: a run, a .safetensors, .pt, .pth or .pkl, or e.g. efficient-mnist."""
    testing: bool = False
    """Test --weights and draw pictures, with the settings of their run; several: as an ensemble."""

    def __post_init__(self) -> None:
        steps, devices = self.checkpoint_steps, self.devices
        check(steps >= 1, "checkpoint_steps", "1 or more", steps)
        check(devices is None or devices >= 1, "devices", "1 or more", devices)
        if self.testing and not self.weights:
            raise ValueError("--testing needs --weights: the folder of a trained run, or a file")
        if len(self.weights) > 1 and not self.testing:
            raise ValueError("several --weights are an ensemble, only to be tested: add --testing")
        if self.resume is not None and (self.testing or self.weights or self.save_dir):
            raise ValueError(
                "--resume continues with a run's own weights in its own folder: no --weights, no "
                "--testing, no --save-dir"
            )
        object.__setattr__(self, "weights", tuple(map(find_weights, self.weights)))

    @property
    def weights_folder(self) -> Path | None:
        """The run whose weights are taken; None if they come from files or are not given."""
        return self.weights[0] if len(self.weights) == 1 and is_run(self.weights[0]) else None

    @property
    def network_files(self) -> tuple[Path, ...]:
        """The files that tell which network it is; none: the preset and the images tell it.

        Raises:
          ValueError: if a run of an ensemble has not left its weights yet.
        """
        folder = self.resume or self.weights_folder
        if folder is not None:
            begun_with = folder / INITIAL_WEIGHTS
            return (begun_with,) if begun_with.is_file() else ()
        files = tuple(path / FINAL_WEIGHTS if is_run(path) else path for path in self.weights)
        for file in files:
            if not file.is_file():
                raise ValueError(f"{file.parent} holds no {file.name}: that run has not ended")
        return files


@dataclasses.dataclass(frozen=True)
class Processes:
    """Start the same command on several hosts to train one network on all their devices, whose
    number must divide the batch size. The hosts need the same images and a folder to which all
    can write. If one process dies, the others end within a minute. --resume continues with any
    number of processes: with the same number to the bit (on CPUs), else up to rounding."""

    coordinator: str | None = None
    """HOST:PORT where process 0 listens to the others."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Index of this process, counted from 0."""
    distributed: bool = False
    """Get these three from SLURM, Open MPI (5: with mpi4py) or a TPU pod: one task per GPU."""

    def __post_init__(self) -> None:
        match self.coordinator, self.num_processes, self.process_id:
            case None, None, None:
                return
            case str(coordinator), int(n), int(i):
                host, _, port = coordinator.rpartition(":")
                known = host and port.isdecimal() and 0 < int(port) < 2**16
                check(bool(known), "coordinator", "HOST:PORT", coordinator)
                check(n >= 1, "num_processes", "1 or more", n)
                check(0 <= i < n, "process_id", f"from 0 to {n - 1}", i)
            case _:
                raise ValueError("--coordinator, --num-processes and --process-id go together")
        if self.distributed:
            raise ValueError("--distributed finds --coordinator and the others: leave them out")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run."""

    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    training: Training = dataclasses.field(default_factory=Training)
    images: Images = dataclasses.field(default_factory=Images)
    run: Run = dataclasses.field(default_factory=Run)
    processes: Processes = dataclasses.field(default_factory=Processes)
    options: tyro.conf.Suppress[Any] = None  # of an experiment that has some


# The groups that a run's folder keeps. It does not keep how many processes there are, because a
# run may continue with another number, nor where it lies, because it may be moved.
SAVED_GROUPS = {"recipe": Recipe, "training": Training, "images": Images, "run": Run}
# The preset, and config.json beside the settings, tell the network.
_NOT_SAVED = ("save_dir", "resume", "testing", "network")


def to_json(settings: Settings) -> dict[str, Any]:
    """Returns settings as JSON holds them; paths are absolute, so that any folder may resume."""

    def write(value: Any) -> Any:
        if isinstance(value, tuple):
            return [write(item) for item in value]
        return str(value.absolute()) if isinstance(value, Path) else value

    return {
        group: {n: write(value) for n, value in fields.items() if n not in _NOT_SAVED}
        for group, fields in _fields(settings).items()
    }


def shared_settings(settings: Settings) -> dict[str, dict[str, Any]]:
    """Returns what must be the same in all processes of a run: all but where files are."""

    def share(value: Any) -> Any:
        return len(value) if isinstance(value, tuple) else isinstance(value, Path) or value

    return {
        group: {n: share(value) for n, value in fields.items() if n != "data_dir"}
        for group, fields in _fields(settings).items()
    }


def from_json(groups: Mapping[str, Mapping[str, Any]], options: Any = None) -> Settings:
    """Inverts `to_json`, for a single process; `options` are any of the experiment's."""

    def read(kind: type, fields: Mapping[str, Any]) -> Any:
        given = dict(fields)
        for field in dataclasses.fields(kind):
            if field.type == Path | None and given.get(field.name):
                given[field.name] = Path(given[field.name])
            elif field.type == _Paths:
                given[field.name] = tuple(map(Path, given[field.name]))
        return kind(**given)

    kinds = SAVED_GROUPS if options is None else SAVED_GROUPS | {"options": type(options)}
    return Settings(**{name: read(kind, groups[name]) for name, kind in kinds.items()})


def refuse_changes(settings: Settings, saved: Settings) -> None:
    """Raises ValueError if a run cannot be continued with other settings than its own."""
    now, then = _fields(settings), _fields(saved)
    for group, fields in now.items():
        for name, ours in fields.items():
            theirs = then[group][name]
            allowed = name in ("devices", "data_dir") or (name == "epochs" and ours > theirs)
            if ours != theirs and not allowed:
                raise ValueError(
                    f"--{name.replace('_', '-')} {_show(ours)} beside --resume, but this run has "
                    f"{_show(theirs)}; --devices and --data-dir may change, --epochs may be raised"
                )


def read_settings(folder: Path, options: Any = None) -> Settings:
    """Reads the settings that a run was started with; `options` are any of the experiment's.

    Raises:
      ValueError: if there is no run, or its config.json is damaged.
    """
    config = read_config(folder)
    saved = config.get("settings", {}).get("options", {})
    known = [field.name for field in dataclasses.fields(options)] if options is not None else []
    if set(saved) != set(known):
        raise ValueError(f"{folder} is the run of another experiment: use the script that began it")
    try:
        return from_json(config["settings"], options)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / 'config.json'} is damaged or of another version of capsjax: {error}"
        ) from error


def _show(value: Any) -> str:
    """Writes a setting as the command line does."""
    return (" ".join(map(str, value)) or "None") if isinstance(value, tuple) else str(value)


def _fields(settings: Settings) -> dict[str, dict[str, Any]]:
    groups = (*SAVED_GROUPS, "options") if settings.options is not None else SAVED_GROUPS
    return {group: dataclasses.asdict(getattr(settings, group)) for group in groups}
