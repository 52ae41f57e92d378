"""Trains the tiny network as `tiny_run.py` does, but slowly, so that a test can interfere.

python slow_run.py SECONDS FLAGS

Each step and each evaluation of a batch is announced by a line and then takes that many seconds
longer. The pictures are announced, take as long, and are not drawn.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from capsjax.run import loop, main
from hooks import stand_in
from tiny_run import EXPERIMENT


def slow_down(function: Callable, line: str, seconds: float) -> Callable:
    """Makes a function print a line and wait before it does its work."""

    def slowed(*args: Any) -> Any:
        print(line, flush=True)
        time.sleep(seconds)
        return function(*args)

    return slowed


def train_slowly(seconds: float, args: list[str]) -> None:
    """Runs the command line with slow steps."""
    jit_steps = loop.jit_steps

    def jit_slow_steps(*args: Any) -> tuple[Callable, Callable]:
        train, evaluate = jit_steps(*args)
        return (
            stand_in(train, slow_down(train, "trains", seconds)),
            stand_in(evaluate, slow_down(evaluate, "evaluates", seconds)),
        )

    draw = slow_down(lambda *_: None, "draws", seconds)
    with (
        mock.patch.object(loop, "jit_steps", jit_slow_steps),
        mock.patch("capsjax.run.lifecycle.write_pictures", draw),
    ):
        main(EXPERIMENT, args)


def wait_for_steps(folder: Path, steps: int, process: subprocess.Popen) -> None:
    """Waits until the run of a process has a checkpoint of that many steps."""
    end = time.monotonic() + 120
    while not (folder / "checkpoints").is_dir() or not [
        step for step in (folder / "checkpoints").iterdir() if step.name == str(steps)
    ]:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)


def choose_script(seconds: float) -> list[str]:
    """Returns the script that trains at that speed, with its first arguments."""
    folder = Path(__file__).parent
    slow = [str(folder / "slow_run.py"), str(seconds)]
    return slow if seconds else [str(folder / "tiny_run.py")]


if __name__ == "__main__":
    train_slowly(float(sys.argv[1]), sys.argv[2:])
