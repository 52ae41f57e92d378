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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from filelock import FileLock, Timeout
from jax.experimental import multihost_utils

from capsjax._files import write_atomically
from capsjax.run.metrics import Metrics

# The weights that a run was given to begin with, if any, and those it ends with.
INITIAL_WEIGHTS = "start.safetensors"
FINAL_WEIGHTS = "weights.safetensors"


def create_folder(folder: Path, *, new: bool = False) -> None:
    """Makes the folder of a run.

    Args:
      folder: its path.
      new: whether it must not be there yet.

    Raises:
      ValueError: if it is a file, or cannot be made.
      FileExistsError: if it is there and must not be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=not new)
    except FileExistsError as error:
        if new:
            raise
        raise ValueError(f"--save-dir {folder} is no folder; name another one") from error
    except OSError as error:
        raise ValueError(f"--save-dir {folder} cannot be made: {error.strerror}") from error


def create_named_folder(dataset: str) -> Path:
    """Makes a folder for one run alone, named after the data set and the time.

    Where several processes train together, the first one's clock counts, and it makes the folder.
    """
    seconds = int(time.time())
    if jax.process_index() == 0:
        while True:
            try:
                create_folder(_name_folder(dataset, seconds), new=True)
                break
            except FileExistsError:  # a loop may start several runs in one second
                seconds += 1
    return _name_folder(dataset, int(multihost_utils.broadcast_one_to_all(np.uint32(seconds))))


def _name_folder(dataset: str, seconds: int) -> Path:
    moment = datetime.datetime.fromtimestamp(seconds).strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{dataset.replace('/', '-')}-{moment}"


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keeps other processes out; released by the system even if the process is killed.

    Raises:
      ValueError: if a living process holds the lock.
    """
    # No lock-file fallback: it would survive a killed process.
    lock = FileLock(folder / ".lock", fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ValueError(
            f"{folder} is in use by another process: wait for its end, or name another folder"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print(f"{folder} is on a file system without locks: nothing keeps another run out of it")
    try:
        yield
    finally:
        lock.release()


def holds_run(folder: Path) -> bool:
    """Returns whether a run was begun in the folder."""
    return os.path.isfile(folder / "config.json")  # Path.is_file raises where a name is too long


def refuse_run(folder: Path) -> None:
    """Raises ValueError if the folder already holds a run."""
    if holds_run(folder):
        raise ValueError(
            f"{folder} holds a run already: continue it (--resume {folder}) or name another "
            "folder (--save-dir)"
        )


def refuse_results(folder: Path) -> None:
    """Raises ValueError if the folder holds what a new run would write over."""
    results = ("metrics.csv", "checkpoints", FINAL_WEIGHTS)
    if found := [name for name in results if (folder / name).exists()]:
        raise ValueError(
            f"{folder} holds {' and '.join(found)}, but no config.json: move them away, or name "
            "another folder (--save-dir)"
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
    if not holds_run(folder):
        raise ValueError(f"{folder} holds no run: there is no config.json in it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    try:
        _ = config["settings"]["training"]["epochs"], config["data"]["crc32"]
        _ = config["network"]["name"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: it must hold settings, network and data") from error
    return config


def read_rows(folder: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Reads metrics.csv, a row an epoch; no rows if there is no such file yet.

    Raises:
      ValueError: if it does not have these columns.
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
    if uneven or list(table.fieldnames or ()) != list(columns):
        raise ValueError(f"{path} is damaged: its columns must be {', '.join(columns)}")
    return rows


def write_rows(folder: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Writes metrics.csv, whole or not at all."""

    def write(file: TextIO) -> None:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)

    _write(folder / "metrics.csv", write)


def write_test(folder: Path, tested: Sequence[str], source: str, test: Metrics) -> None:
    """Writes test.json: which weights were tested, on which data, and what came out."""
    result = {"losses": test.losses, "error": test.error, "wrong": test.wrong}
    about = {
        "weights": list(tested),
        "data": source,
        "test": {**result, "examples": test.examples},
    }
    _write(
        folder / "test.json",
        lambda file: json.dump({**about, **describe_provenance()}, file, indent=2),
    )


def describe_provenance() -> dict[str, Any]:
    """Returns what made a run besides its settings: versions, machine, revision of the code."""
    packages = ("capsjax", "jax", "jaxlib", "flax", "optax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version(), **versions},
        "device": f"{jax.device_count()} × {device.platform} ({device.device_kind})",
        "processor": find_processor(),
        "cores": getattr(os, "process_cpu_count", os.cpu_count)(),  # Python 3.13: those it may use
        "git": _find_revision(),
    }


def find_processor() -> str:
    """Returns the processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _find_revision() -> str | None:
    """Returns the commit of this checkout; None for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # or git would describe the repository around it
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _write(path: Path, write: Callable[[TextIO], None]) -> None:
    with write_atomically(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        write(file)
