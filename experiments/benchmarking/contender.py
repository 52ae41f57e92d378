"""What a process of the benchmark measures, and that process as its parent sees it."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Tasks = dict[str, Callable[[], Any]]
Inputs = dict[str, np.ndarray]

LAM_RECON = 0.392
NOT_INSTALLED = 3  # exit status

# glibc reads these as the process starts. They ask for the same as `keep_freed_memory` of
# capsjax.run.machine, which no process can call without holding JAX.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(2**28),
    "MALLOC_ARENA_MAX": "1",
}


@dataclasses.dataclass(frozen=True)
class Contender:
    """What a process measures."""

    library: str  # "capsjax" or "torch"
    dtype: str = "float32"
    keep_memory: bool = True  # glibc keeps freed memory, as in capsjax.run
    channels_last: bool = False
    compiled: bool = False  # torch.compile
    rewritten: bool = False  # an einsum for the predictions, a fused Adam
    batch_size: int = 128
    network: str = "capsnet"
    routings: int = 3  # of CapsNet
    stages: bool = False  # the parts of a step instead of the step


def parameters_of(network: str, inputs: Inputs) -> Inputs:
    """Returns the initial parameters of a network by their path."""
    first = f"{network}/"
    return {name.removeprefix(first): a for name, a in inputs.items() if name.startswith(first)}


class Worker:
    """A contender's process.

    Attributes:
      process: of `benchmarking.worker`.
      first: the first line that it sent, losses or names of stages; None if it could not start.
      installed: whether it found its library.
    """

    def __init__(self, contender: Contender, inputs: Path):
        self._contender, pipe = contender, subprocess.PIPE
        arguments = [json.dumps(dataclasses.asdict(contender)), str(inputs)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarking.worker", *arguments],
            stdin=pipe,
            stdout=pipe,
            text=True,
            env=make_environment(contender),
        )
        line = self.process.stdout.readline() if self.process.stdout else ""
        self.first = json.loads(line) if line else None
        if not line:
            self.close()
        self.installed = self.process.returncode != NOT_INSTALLED

    def ask(self, task: str, repeats: int = 1) -> Any:
        """Returns a figure, or a task's median seconds over `repeats` calls after an untimed one.

        Raises:
          SystemExit: if the process ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps([task, repeats]), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, ValueError) as error:
            status = self.process.wait()
            raise SystemExit(
                f"{self._contender} ended in the middle of {task}, status {status}: see above"
            ) from error

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()


def make_environment(contender: Contender) -> dict[str, str]:
    """Returns this process's environment, with allocator and dispatch as the contender has them."""
    inherited = {name: value for name, value in os.environ.items() if name not in KEEP_FREED_MEMORY}
    paths = (str(Path(__file__).parents[1]), inherited.get("PYTHONPATH"))
    inherited["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    inherited["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"  # as capsjax.run has it
    return inherited | (KEEP_FREED_MEMORY if contender.keep_memory else {})
