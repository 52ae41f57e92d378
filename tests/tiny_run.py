"""The experiment with a tiny network on tiny images; as a script, for tests that need a process."""

import contextlib
import csv
import dataclasses
import functools
import io
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import machine
import mnist
from capsjax import presets
from capsjax.checkpoint import Checkpoints
from capsjax.nn import CapsNet
from data_files import digits, write_npz

# 60 training images in batches of 10 are six steps an epoch.
STEPS = 6
PRESETS = {
    name: dataclasses.replace(
        preset,
        model=dataclasses.replace(
            preset.model, channels=4, kernel_size=3, types=2, dim_class=4, hidden=(8,)
        ),
        epochs=2,
        batch_size=10,
    )
    for name, preset in presets.PRESETS.items()
}


@dataclasses.dataclass
class Ended:
    """What a call of the experiment left."""

    folder: Path
    out: str
    err: str
    status: Any  # the exit status; 0 if it returned
    drawn: list[CapsNet]  # the networks that pictures were asked of, where none were made


def experiment(*, pictures: bool = False, **flags: Any) -> Ended:
    """Runs the experiment in this process: `lr_decay=0.5` is `--lr-decay 0.5`."""
    out, err, status, drawn = io.StringIO(), io.StringIO(), 0, []
    args = command_line(**flags)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        # The allocator and the compile cache of this process are the test suite's.
        stack.enter_context(mock.patch.object(machine, "prepare"))
        if not pictures:
            write = lambda folder, model, *rest: drawn.append(model)  # noqa: E731
            stack.enter_context(mock.patch.object(mnist, "write_pictures", write))
        try:
            mnist.main(args, PRESETS)
        except SystemExit as end:
            status = end.code
    folder = Path(flags.get("save_dir") or flags.get("resume") or flags.get("weights") or "")
    return Ended(folder, out.getvalue(), err.getvalue(), status, drawn)


def command_line(**flags: Any) -> list[str]:
    """True stands for a flag without a value, None for a flag that is not given."""
    given = {f"--{name.replace('_', '-')}": v for name, v in flags.items() if v is not None}
    return [
        word
        for flag, value in given.items()
        for word in ([flag] if value is True else [flag, str(value)])
    ]


def environment_of(home: Path) -> dict[str, str]:
    """Of processes that compile each step once for all of them, into a folder."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONUNBUFFERED": "1",
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@functools.cache
def images() -> dict[str, np.ndarray]:
    """The middles of real digits, every other pixel: uint8 [60, 10, 10] and [23, 10, 10]."""
    arrays = digits(60, 23)
    return {name: a[:, 4:24:2, 4:24:2] if a.ndim == 3 else a for name, a in arrays.items()}


def write_images(path: Path, **changed: np.ndarray) -> Path:
    return write_npz(path, images() | changed)


def steps_in(folder: Path) -> list[int]:
    """The steps of a run's checkpoints."""
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    """The last checkpoint of a run: every parameter, Adam's moments, the step, the sums."""
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoint = checkpoints.last()
    assert checkpoint is not None
    return checkpoint.arrays


def params_of(folder: Path) -> dict[str, np.ndarray]:
    """The parameters in a run's last checkpoint."""
    return {name: a for name, a in arrays_of(folder).items() if name.startswith("params.")}


def same_bits(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    return ours.keys() == theirs.keys() and all(
        (ours[name].dtype, ours[name].shape, ours[name].tobytes())
        == (theirs[name].dtype, theirs[name].shape, theirs[name].tobytes())
        for name in ours
    )


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without their times, which no two runs share."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    times = ("seconds", "images_per_second")
    return [{name: v for name, v in row.items() if name not in times} for row in rows]


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder: the content of files, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


if __name__ == "__main__":
    mnist.main(presets=PRESETS)
