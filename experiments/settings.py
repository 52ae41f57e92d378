"""The settings of a run: one dataclass, from which the command line and config.json follow."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import run_folder
from capsjax.presets import PRESETS, Preset

PresetName = Literal["seed", "paper"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Train CapsNet on images, test it, and draw what it learnt.

    Defaults are those of the preset. MNIST needs no download: it comes with the package.
    """

    preset: PresetName = "seed"
    """Recipe. seed: the widespread re-implementation. paper: the authors' released code."""
    routings: int = 3
    """Iterations of routing by agreement."""
    epochs: int = PRESETS["seed"].epochs
    """Passes over the training images."""
    batch_size: int = PRESETS["seed"].batch_size
    """Images a step, over all devices."""
    lr: float = PRESETS["seed"].lr
    """Adam's first learning rate."""
    lr_decay: float | None = PRESETS["seed"].lr_decay
    """Factor on the learning rate each epoch. None: 0.96^150 spread over all epochs (paper)."""
    lam_recon: float | None = None
    """Weight of the reconstruction loss. None: 0.0005·H·W·C (paper: 0.01·H·W·C)."""
    shift_pixels: int = PRESETS["seed"].shift_pixels
    """Largest random shift of a training image either way, pixels."""

    dataset: str = "mnist"
    """mnist, fashion_mnist, kmnist, emnist/letters or any other name in TensorFlow Datasets."""
    data_dir: Path | None = None
    """Where the images are: a TFDS folder, IDX files, an .npz, or train/CLASS/*.png and test/…"""
    download: bool = False
    """Have TensorFlow Datasets download and prepare the data set."""
    train_size: int | None = None
    """Train on so many images only, drawn at random: a quick look. None: all."""
    validation: int = 0
    """Hold out so many training images; the best epoch on them is then the result."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in. Parameters and sums are float32 always."""
    seed: int = 0
    """Of first values, order and shifts: same seed, same machine, same bits."""
    devices: int | None = None
    """Devices to split a batch over. None: the largest number that divides it."""

    save_dir: Path | None = None
    """New folder for this run. None: runs/DATASET-TIME."""
    checkpoint_steps: int = 200
    """Steps between checkpoints; each epoch's end makes one, too."""
    weights: Path | None = None
    """Folder of a run whose weights to start from or to test."""
    testing: bool = False
    """Test --weights and draw its pictures again, with that run's settings; no training."""
    resume: Path | None = None
    """Folder of a run to go on with, with its settings; --epochs may be raised."""

    def __post_init__(self):
        for name in ("routings", "epochs", "batch_size", "checkpoint_steps"):
            _require(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))
        for name in ("train_size", "devices"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, "1 or more", value)
        for name in ("shift_pixels", "validation", "seed"):
            _require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        _require(0 < self.lr < math.inf, "lr", "a number above 0", self.lr)
        decay, lam = self.lr_decay, self.lam_recon
        _require(decay is None or 0 < decay <= 1, "lr_decay", "above 0 and at most 1", decay)
        _require(lam is None or 0 <= lam < math.inf, "lam_recon", "a number of 0 or more", lam)
        if self.testing and self.weights is None:
            raise ValueError("--testing needs --weights RUN: the folder of a trained run")
        if self.resume is not None and (self.testing or self.weights is not None):
            raise ValueError("--resume goes on with a run's own weights: no --weights, no --testing")


def _require(holds: bool, name: str, expected: str, came: object) -> None:
    if not holds:
        raise ValueError(f"--{name.replace('_', '-')} must be {expected}, got {came}")


@dataclasses.dataclass(frozen=True)
class Source:
    """The flags that decide where the defaults of all the others come from."""

    preset: PresetName = "seed"
    weights: Path | None = None
    testing: bool = False
    resume: Path | None = None


Flags = tyro.conf.FlagCreatePairsOff


def parse(args: Sequence[str] | None, presets: Mapping[str, Preset]) -> Settings:
    """Reads the command line; a resumed or tested run's config.json gives the defaults.

    Raises:
      SystemExit: with status 2 and a message in words, for anything that cannot be meant.
    """
    args = sys.argv[1:] if args is None else list(args)
    source, _ = tyro.cli(
        Annotated[Source, Flags], args=args, return_unknown_args=True, add_help=False
    )
    with refusals():
        default = _defaults(source, presets)
    settings = tyro.cli(Annotated[Settings, Flags], args=args, default=default, prog="mnist.py")
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


def _defaults(source: Source, presets: Mapping[str, Preset]) -> Settings:
    if source.resume is not None:
        saved = from_json(run_folder.read_config(source.resume)["settings"])
        return dataclasses.replace(saved, resume=source.resume, weights=None)
    if source.testing and source.weights is not None:
        saved = from_json(run_folder.read_config(source.weights)["settings"])
        return dataclasses.replace(saved, save_dir=None)
    return from_preset(source.preset, presets[source.preset])


def _refuse_changes(settings: Settings, saved: Settings) -> None:
    for field in dataclasses.fields(Settings):
        now, then = getattr(settings, field.name), getattr(saved, field.name)
        if now != then and not (field.name == "epochs" and now > then):
            raise ValueError(
                f"--{field.name.replace('_', '-')} {now} beside --resume: this run has {then}; "
                "only --epochs may change, to more"
            )


def from_preset(name: PresetName, preset: Preset) -> Settings:
    """The settings of a preset."""
    return Settings(
        preset=name,
        epochs=preset.epochs,
        batch_size=preset.batch_size,
        lr=preset.lr,
        lr_decay=preset.lr_decay,
        shift_pixels=preset.shift_pixels,
    )


def to_json(settings: Settings) -> dict[str, Any]:
    """Settings as JSON holds them: paths as strings."""
    fields = dataclasses.asdict(settings)
    return {name: str(v) if isinstance(v, Path) else v for name, v in fields.items()}


def from_json(fields: Mapping[str, Any]) -> Settings:
    """The inverse of `to_json`."""
    paths = {"data_dir", "save_dir", "weights", "resume"}
    known = {
        name: Path(value) if name in paths and value is not None else value
        for name, value in fields.items()
    }
    return Settings(**known)
