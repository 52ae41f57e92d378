"""Whole processes, seen from outside: they train, evaluate once and save; their time and memory."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarking.contender import Contender, make_environment

_SCRIPT = Path(__file__).parents[1] / "mnist.py"


class Whole(NamedTuple):
    """What two processes took, of which one trains on more images."""

    memory: float  # peak of the larger one as the system counts it, MiB
    seconds: float  # from the start to the end of the smaller one
    images_per_second: float  # more images by more seconds


def measure_whole(contender: Contender, inputs: Path, sizes: tuple[int, int]) -> Whole:
    """Runs the processes of one contender.

    Args:
      contender: what they compute with.
      inputs: images and first parameters, for PyTorch.
      sizes: how many images the processes train on. One of them runs before, so that what capsjax
        compiles is compiled already.
    """
    few, many = sizes
    if contender.library == "capsjax":
        _run(contender, inputs, few)
    short, _ = _run(contender, inputs, few)
    long, memory = _run(contender, inputs, many)
    return Whole(memory, short, (many - few) / (long - short))


def _run(contender: Contender, inputs: Path, images: int) -> tuple[float, float]:
    """Runs a process to its end; returns its seconds and its peak in MiB.

    Raises:
      SystemExit: if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = _make_command(contender, inputs, images, Path(folder))
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.DEVNULL, env=make_environment(contender)
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}: see above")
    return seconds, usage.ru_maxrss / 2**10


def _make_command(contender: Contender, inputs: Path, images: int, folder: Path) -> list[str]:
    if contender.library == "torch":
        options = json.dumps(dataclasses.asdict(contender))
        return ["-m", "benchmarking.torch_run", options, str(images), str(inputs)]
    flags = {
        "epochs": 1,
        "train-size": images,
        "batch-size": contender.batch_size,
        "routings": contender.routings,
        "precision": contender.dtype,
        "save-dir": folder / "run",
    }
    return [str(_SCRIPT), *(word for name, n in flags.items() for word in (f"--{name}", str(n)))]
