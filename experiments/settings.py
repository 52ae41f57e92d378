"""The settings of a run: dataclasses, from which the command line and config.json follow."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import tyro

import run_folder
from capsjax import weights
from capsjax.presets import SEED, Preset

PresetName = Literal["seed", "paper"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The defaults are the preset's: see also --preset paper --help."""

    preset: PresetName = "seed"
    """seed: the widespread re-implementation. paper: the authors' released code."""
    routings: int = 3
    """Iterations of routing by agreement."""
    epochs: int = SEED.epochs
    """Passes over the training images."""
    batch_size: int = SEED.batch_size
    """Images a step, over all devices."""
    lr: float = SEED.lr
    """Adam's first learning rate."""
    lr_decay: float | None = SEED.lr_decay
    """Factor on the learning rate each epoch. None: 0.96^150 spread over all epochs (paper)."""
    lam_recon: float | None = None
    """Weight of the reconstruction loss. None: 0.0005·H·W·C (paper: 0.01·H·W·C)."""
    shift_pixels: int = SEED.shift_pixels
    """Largest random shift of a training image either way, pixels."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in. Parameters and sums are float32 always."""
    seed: int = 0
    """Of first values, order and shifts: same seed, same machine, same bits."""

    def __post_init__(self):
        for name in ("routings", "epochs", "batch_size"):
            _require(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))
        _require(self.shift_pixels >= 0, "shift_pixels", "0 or more", self.shift_pixels)
        _require(0 <= self.seed < 2**63, "seed", "from 0 to 2^63 - 1", self.seed)
        _require(0 < self.lr < math.inf, "lr", "a number above 0", self.lr)
        decay, lam = self.lr_decay, self.lam_recon
        _require(decay is None or 0 < decay <= 1, "lr_decay", "above 0 and at most 1", decay)
        _require(lam is None or 0 <= lam < math.inf, "lam_recon", "a number of 0 or more", lam)


@dataclasses.dataclass(frozen=True)
class Images:
    """MNIST comes with the package; it needs no download."""

    dataset: str = "mnist"
    """mnist, fashion_mnist, kmnist, emnist/letters or any other name in TensorFlow Datasets."""
    data_dir: Path | None = None
    """Where the images are: a TFDS folder, IDX files, an .npz, or train/CLASS/*.png and test/…"""
    download: bool = False
    """Have TensorFlow Datasets download and prepare the data set."""
    train_size: int | None = None
    """Train on so many images only, drawn at random: a quick look. None: on all."""
    validation: int = 0
    """Hold out so many training images; the epoch that is best on them is then the result."""

    def __post_init__(self):
        size = self.train_size
        _require(size is None or size >= 1, "train_size", "1 or more", size)
        _require(self.validation >= 0, "validation", "0 or more", self.validation)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder holds its settings, metrics, checkpoints and pictures."""

    save_dir: Path | None = None
    """New folder for this run. None: runs/DATASET-TIME."""
    checkpoint_steps: int = 200
    """Steps between checkpoints; each epoch's end makes one, too."""
    devices: int | None = None
    """Devices to split a batch over. None: the largest number that divides it."""
    resume: Path | None = None
    """Folder of a run to go on with; only --devices and, to more, --epochs may change."""
    weights: Path | None = None
    """Weights to start from, or to test: folder of a run, .safetensors, or PyTorch's .pt, .pkl."""
    testing: bool = False
    """Test --weights and draw its pictures, a run's with that run's settings; no training."""

    @property
    def network(self) -> Path | None:
        """The file that says which network it is; None: preset and images say it."""
        given = self.resume or self.weights
        if given is None or given.is_file():
            return given
        begun_with = given / run_folder.START
        return begun_with if begun_with.is_file() else None

    def __post_init__(self):
        _require(self.checkpoint_steps >= 1, "checkpoint_steps", "1 or more", self.checkpoint_steps)
        _require(self.devices is None or self.devices >= 1, "devices", "1 or more", self.devices)
        if self.testing and self.weights is None:
            raise ValueError("--testing needs --weights: the folder of a trained run, or a file")
        if self.resume is not None and (self.testing or self.weights is not None):
            raise ValueError(
                "--resume goes on with a run's own weights: no --weights, no --testing"
            )


@dataclasses.dataclass(frozen=True)
class Processes:
    """The same command on each of several hosts trains one network on the devices of all. They need
    the same images and one folder that all can write."""

    coordinator: str | None = None
    """HOST:PORT where process 0 listens to the others."""
    num_processes: int | None = None
    """How many processes take part."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    distributed: bool = False
    """Take these three from the launcher: SLURM or Open MPI, one task a GPU, or a TPU pod."""

    def __post_init__(self):
        match self.coordinator, self.num_processes, self.process_id:
            case None, None, None:
                return
            case str(coordinator), int(n), int(i):
                host, _, port = coordinator.rpartition(":")
                known = host and port.isdecimal() and 0 < int(port) < 2**16
                _require(bool(known), "coordinator", "HOST:PORT", coordinator)
                _require(n >= 1, "num_processes", "1 or more", n)
                _require(0 <= i < n, "process_id", f"from 0 to {n - 1}", i)
            case _:
                raise ValueError("--coordinator, --num-processes and --process-id go together")
        if self.distributed:
            raise ValueError("--distributed finds out what --coordinator and the others would say")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Train CapsNet on images, test it, and draw what it learnt."""

    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    images: Images = dataclasses.field(default_factory=Images)
    run: Run = dataclasses.field(default_factory=Run)
    processes: Processes = dataclasses.field(default_factory=Processes)


@dataclasses.dataclass(frozen=True)
class Source:
    """The flags that decide where the defaults of all the others come from."""

    preset: PresetName | None = None
    resume: Path | None = None
    weights: Path | None = None
    testing: bool = False


def parse(args: Sequence[str] | None, presets: Mapping[str, Preset]) -> Settings:
    """Reads the command line; a resumed or tested run's config.json gives the defaults.

    Raises:
      SystemExit: with status 2 and a message in words, for anything that cannot be meant.
    """
    args = sys.argv[1:] if args is None else list(args)
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    source, _ = tyro.cli(Source, args=args, return_unknown_args=True, add_help=False, config=config)
    with refusals():
        default = _defaults(source, presets)
    settings = tyro.cli(Settings, args=args, default=default, config=config)
    with refusals():
        if source.resume is not None:
            _refuse_changes(settings, default)
    return settings


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turns an error that is the user's to mend into one message and exit status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def to_json(settings: Settings) -> dict[str, Any]:
    """Settings as JSON holds them: paths as strings, whatever folder a run is resumed from.

    How many processes there are is left out: a run may go on with another number.
    """
    groups = dataclasses.asdict(settings)
    del groups["processes"]
    return {
        group: {n: str(v.absolute()) if isinstance(v, Path) else v for n, v in fields.items()}
        for group, fields in groups.items()
    }


def in_common(settings: Settings) -> dict[str, dict[str, Any]]:
    """What has to be the same in all processes of a run: everything but where files are."""
    groups = dataclasses.asdict(settings)
    del groups["processes"]
    return {
        group: {n: isinstance(v, Path) or v for n, v in fields.items() if n != "data_dir"}
        for group, fields in groups.items()
    }


def from_json(groups: Mapping[str, Mapping[str, Any]]) -> Settings:
    """The inverse of `to_json`, for one process."""

    def read(kind: type, fields: Mapping[str, Any]) -> Any:
        paths = {field.name for field in dataclasses.fields(kind) if field.type == Path | None}
        given = {name: Path(v) if v and name in paths else v for name, v in fields.items()}
        return kind(**given)

    return Settings(
        read(Recipe, groups["recipe"]), read(Images, groups["images"]), read(Run, groups["run"])
    )


def _defaults(source: Source, presets: Mapping[str, Preset]) -> Settings:
    if source.resume is not None:
        saved = _saved(source.resume)
        run = dataclasses.replace(saved.run, weights=None, resume=source.resume)
        return dataclasses.replace(saved, run=run)
    preset_name, routings = _origin(source.weights)
    if source.testing and source.weights is not None and not source.weights.is_file():
        saved = _saved(source.weights)
        return dataclasses.replace(saved, run=dataclasses.replace(saved.run, save_dir=None))
    if source.preset and preset_name and source.preset != preset_name:
        raise ValueError(
            f"--preset {source.preset}, but {source.weights} is of --preset {preset_name}"
        )
    name = source.preset or preset_name or "seed"
    preset = presets[name]
    recipe = Recipe(
        preset=name,
        routings=routings,
        epochs=preset.epochs,
        batch_size=preset.batch_size,
        lr=preset.lr,
        lr_decay=preset.lr_decay,
        shift_pixels=preset.shift_pixels,
    )
    return Settings(recipe)


def _origin(path: Path | None) -> tuple[PresetName | None, int]:
    """Preset, if it has one, and iterations of routing of the weights in a folder or a file."""
    if path is None:
        return None, 3
    if not path.exists():
        raise ValueError(f"--weights {path}: there is no such file or folder")
    if not path.is_file():
        recipe = _saved(path).recipe
        return recipe.preset, recipe.routings
    preset, routings = weights.describe(path) or (None, None)
    # A damaged file says anything; it is refused when it is loaded.
    known = next((name for name in get_args(PresetName) if name == preset), None)
    return known, routings if isinstance(routings, int) else 3


def _saved(folder: Path) -> Settings:
    config = run_folder.read_config(folder)
    try:
        return from_json(config["settings"])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / 'config.json'} is damaged or of another version of capsjax: {error}"
        ) from error


def _refuse_changes(settings: Settings, saved: Settings) -> None:
    for group in ("recipe", "images", "run"):
        now, then = getattr(settings, group), getattr(saved, group)
        for name in (field.name for field in dataclasses.fields(now)):
            ours, theirs = getattr(now, name), getattr(then, name)
            allowed = name == "devices" or (name == "epochs" and ours > theirs)
            if ours != theirs and not allowed:
                raise ValueError(
                    f"--{name.replace('_', '-')} {ours} beside --resume, but this run has {theirs};"
                    " only --epochs may change, to more, and --devices"
                )


def _require(holds: bool, name: str, expected: str, came: object) -> None:
    if not holds:
        raise ValueError(f"--{name.replace('_', '-')} must be {expected}, got {came}")
