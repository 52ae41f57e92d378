"""Trains a tiny network on tiny images, in this process or, run as a script, in another."""

import contextlib
import csv
import dataclasses
import functools
import io
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from capsjax import Network, presets, weights
from capsjax.checkpoint import Checkpoints
from capsjax.run import Experiment, main
from data_files import digits, write_npz

# 60 training images in batches of 10 are six steps an epoch.
STEPS = 6
SIZES: dict[str, dict[str, Any]] = {
    "capsnet": {"channels": 4, "kernel_size": 3, "types": 2, "dim_class": 4, "hidden": (8,)},
    "efficient": {
        "channels": (4, 8),
        "kernel_sizes": (3, 3),
        "strides": (1, 2),
        "dim_primary": 4,
        "dim_class": 4,
        "hidden": (8,),
    },
    "matrix": {"channels": 4, "types": (2, 2), "kernel_sizes": (3, 3), "strides": (2, 1)},
    "cnn": {"channels": (4, 8), "kernel_sizes": (3, 3), "hidden": (8,)},
}
EXPERIMENT = Experiment(
    presets={
        name: dataclasses.replace(
            preset,
            network=dataclasses.replace(preset.network, **SIZES[preset.network.name]),
            training=dataclasses.replace(preset.training, epochs=2, batch_size=10),
        )
        for name, preset in presets.PRESETS.items()
    }
)


@dataclasses.dataclass
class Outcome:
    """What a command printed and left."""

    folder: Path
    out: str
    err: str
    status: Any  # the exit status; 0 if it returned
    drawn: list[Network]  # the networks whose pictures were asked for, where none were made


def run_command(
    experiment: Experiment = EXPERIMENT, *, pictures: bool = False, **flags: Any
) -> Outcome:
    """Runs the command line in this process: `lr_decay=0.5` is `--lr-decay 0.5`."""
    out, err, status, drawn = io.StringIO(), io.StringIO(), 0, []
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        # The allocator and the compilation cache of this process are the test suite's.
        stack.enter_context(mock.patch("capsjax.run.machine.configure"))
        if not pictures:
            write = lambda folder, model, *rest: drawn.append(model)  # noqa: E731
            stack.enter_context(mock.patch("capsjax.run.lifecycle.write_pictures", write))
        try:
            main(experiment, make_arguments(**flags))
        except SystemExit as end:
            status = end.code
    folder = Path(flags.get("save_dir") or flags.get("resume") or flags.get("weights") or "")
    return Outcome(folder, out.getvalue(), err.getvalue(), status, drawn)


def make_arguments(**flags: Any) -> list[str]:
    """Makes a command line: True is a flag alone, None none, a tuple a flag and its values."""
    words = []
    for name, value in flags.items():
        values = () if value is True else value if isinstance(value, tuple) else (value,)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def make_environment(home: Path) -> dict[str, str]:
    """Makes the environment of processes that share a home and what they compile."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONUNBUFFERED": "1",
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


@functools.cache
def make_images() -> dict[str, np.ndarray]:
    """Cuts the middles out of real digits, every other pixel: uint8 [60 and 23, 10, 10]."""
    arrays = digits(60, 23)
    return {name: a[:, 4:24:2, 4:24:2] if a.ndim == 3 else a for name, a in arrays.items()}


def write_images(path: Path, **changed: np.ndarray) -> Path:
    """Writes the images and labels, some of them changed."""
    return write_npz(path, make_images() | changed)


def list_steps(folder: Path) -> list[int]:
    """Lists the steps of a run's checkpoints."""
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def find_newest(folder: Path) -> int:
    """Returns the step of a run's last whole checkpoint, 0 without any."""
    names = [path.name for path in folder.glob("checkpoints/*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """Reads a run's last checkpoint: every parameter, Adam's moments, the step, the sums."""
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoint = checkpoints.last()
    assert checkpoint is not None
    return checkpoint.arrays


def read_params(folder: Path, prefix: str = "params.") -> dict[str, np.ndarray]:
    """Reads the parameters in a run's last checkpoint, or their average, by their own names."""
    arrays = read_arrays(folder)
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of the file that a run leaves."""
    return weights.arrays_of(weights.load(folder / "weights.safetensors"))


def have_same_bits(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    """Returns whether names, dtypes, shapes and bytes are the same."""
    return ours.keys() == theirs.keys() and all(
        (ours[name].dtype, ours[name].shape, ours[name].tobytes())
        == (theirs[name].dtype, theirs[name].shape, theirs[name].tobytes())
        for name in ours
    )


def read_rows(folder: Path) -> list[dict[str, str]]:
    """Reads metrics.csv without its times, which no two runs share."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    times = ("seconds", "images_per_second")
    return [{name: v for name, v in row.items() if name not in times} for row in rows]


def read_json(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Reads a JSON file of a run."""
    return json.loads((folder / name).read_text(encoding="utf-8"))


def read_tree(folder: Path) -> dict[str, bytes | None]:
    """Reads everything in a folder: the content of files, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


if __name__ == "__main__":
    # Pictures take longer than the training.
    draw = EXPERIMENT.draw if "DRAW" in os.environ else lambda *_: None
    main(dataclasses.replace(EXPERIMENT, draw=draw))
