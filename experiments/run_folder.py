"""The folder of a run: config.json, written first, and metrics.csv, a row an epoch."""

import contextlib
import csv
import datetime
import errno
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from filelock import FileLock, Timeout
from jax.experimental import multihost_utils

from capsjax._files import write_atomically

START = "start.safetensors"  # the weights that a run began with, if it was given some
_SPLITS = ("train", "validation", "test")
_FIGURES = ("loss", "margin", "reconstruction", "error")
COLUMNS = (
    *("epoch", "step", "learning_rate"),
    *(f"{split}_{figure}" for split in _SPLITS for figure in _FIGURES),
    *("seconds", "images_per_second"),
)


def named_after(dataset: str) -> Path:
    """The folder of a run that was given no name: called after the data set and the time."""
    # Of several processes each has its own clock.
    seconds = multihost_utils.broadcast_one_to_all(np.uint32(time.time()))
    moment = datetime.datetime.fromtimestamp(int(seconds)).strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{dataset.replace('/', '-')}-{moment}"


def create(folder: Path) -> None:
    """Makes the folder of a new run.

    Raises:
      ValueError: if it is a file, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"--save-dir {folder} is a file; name a folder") from error
    except OSError as error:
        raise ValueError(f"--save-dir {folder} cannot be made: {error.strerror}") from error


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder; the kernel lets go of it however this one ends.

    Raises:
      ValueError: if a living process is in it.
    """
    # The soft one is a file, which would outlive a process that is killed.
    lock = FileLock(folder / ".lock", fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ValueError(
            f"{folder} is in use by another process: wait for its end, or name another folder"
        ) from error
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        print(f"{folder} is on a file system without locks: nothing keeps another run out of it")
    try:
        yield
    finally:
        lock.release()


def refuse_a_run(folder: Path) -> None:
    """Raises ValueError if the folder holds a run already."""
    if (folder / "config.json").exists():
        raise ValueError(
            f"{folder} holds a run already: go on with it (--resume {folder}) or name another "
            "folder (--save-dir)"
        )


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Writes config.json, whole or not at all."""
    _write(folder / "config.json", lambda file: json.dump(config, file, indent=2))


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json.

    Raises:
      ValueError: if there is none, or it cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run: there is no config.json in it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    try:
        _ = config["settings"]["recipe"]["epochs"], config["data"]["crc32"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: it must hold settings and data") from error
    return config


def read_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, an epoch each; none if there is no such file yet.

    Raises:
      ValueError: if they are not what `write_rows` wrote.
    """
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    try:
        # With the mark that spreadsheets put before UTF-8, or without.
        table = csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines())
        rows = list(table)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    uneven = any(None in row or None in row.values() for row in rows)
    if uneven or tuple(table.fieldnames or ()) != COLUMNS:
        raise ValueError(f"{path} is damaged: its columns must be {', '.join(COLUMNS)}")
    return rows


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Writes metrics.csv, whole or not at all."""

    def write(file: TextIO) -> None:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)

    _write(folder / "metrics.csv", write)


def provenance() -> dict[str, Any]:
    """What made a run, besides its settings: versions, machine, revision of the code."""
    packages = ("capsjax", "jax", "jaxlib", "flax", "optax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version(), **versions},
        "device": f"{jax.device_count()} × {device.platform} ({device.device_kind})",
        "cores": os.cpu_count(),
        "git": _git_revision(),
    }


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _write(path: Path, write: Callable[[TextIO], None]) -> None:
    """Writes beside the file, then takes its place: a reader never sees half of it."""
    with write_atomically(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        write(file)
