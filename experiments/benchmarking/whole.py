"""Whole processes, seen from outside: they train, evaluate once and save; their time and memory."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
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
    """Runs two processes of one contender; capsjax twice, since it compiles in the first.

    Args:
      contender: what they compute with.
      inputs: images and first parameters, for PyTorch.
      sizes: how many images the processes train on.
    """
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2 if contender.library == "capsjax" else 1):
            (short, _), (long, memory) = (
                run_measured(
                    _make_command(contender, inputs, images),
                    Path(folder),
                    _make_environment(contender, folder),
                )
                for images in sizes
            )
    few, many = sizes
    return Whole(memory, short, (many - few) / (long - short))


def run_measured(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> tuple[float, float]:
    """Runs this Python with some arguments; returns its seconds and the peak of its memory in MiB.

    Raises:
      SystemExit: if it fails.
    """
    # The system counts to a new process what its parent held, so a small one starts it.
    command = [sys.executable, "-c", _START, sys.executable, *arguments]
    begin = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with status {done.returncode}: see above")
    return seconds, int(done.stdout.splitlines()[-1]) / 2**10


_START = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, flush=True)
sys.exit(status)
"""


def _make_environment(contender: Contender, folder: str) -> Mapping[str, str]:
    if contender.library == "torch":
        return make_environment(contender)
    return os.environ | {"XDG_CACHE_HOME": folder}  # capsjax sets its allocator by itself


def _make_command(contender: Contender, inputs: Path, images: int) -> list[str]:
    if contender.library == "torch":
        options = json.dumps(dataclasses.asdict(contender))
        return ["-m", "benchmarking.torch_run", options, str(images), str(inputs)]
    flags = {
        "epochs": 1,
        "train-size": images,
        "batch-size": contender.batch_size,
        "routings": contender.routings,
        "precision": contender.dtype,
    }
    return [str(_SCRIPT), *(word for name, n in flags.items() for word in (f"--{name}", str(n)))]
