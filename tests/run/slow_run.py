"""Trains the tiny network as `tiny_run.py` does, but slowly, so that a test can interfere.

python slow_run.py SECONDS LINE NUMBER FLAGS

Lines announce the loop ("begins"), each step ("trains"), each evaluation of a batch ("evaluates")
and the pictures ("draws"), which are not drawn. What is announced takes that many seconds longer,
from the time on that LINE is announced for the NUMBER-th time.
"""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from capsjax.run import loop, main
from hooks import stand_in
from tiny_run import EXPERIMENT, find_newest


@dataclasses.dataclass
class Brake:
    """Announces what is called, and makes it take longer once a line was announced often enough."""

    seconds: float
    line: str
    number: int

    def slow_down(self, function: Callable, line: str) -> Callable:
        """Makes a function print a line, and wait if it is time, before it does its work."""

        def slowed(*args: Any) -> Any:
            print(line, flush=True)
            self.number -= line == self.line
            if self.number <= 0:
                time.sleep(self.seconds)
            return function(*args)

        return slowed


def train_slowly(brake: Brake, args: list[str]) -> None:
    """Runs the command line with slow steps."""
    jit_steps = loop.jit_steps

    def jit_slow_steps(*args: Any) -> tuple[Callable, Callable]:
        train, evaluate = jit_steps(*args)
        return (
            stand_in(train, brake.slow_down(train, "trains")),
            stand_in(evaluate, brake.slow_down(evaluate, "evaluates")),
        )

    train = brake.slow_down(loop.Runner.train, "begins")
    draw = brake.slow_down(lambda *_: None, "draws")
    with (
        mock.patch.object(loop.Runner, "train", train),
        mock.patch.object(loop, "jit_steps", jit_slow_steps),
        mock.patch("capsjax.run.lifecycle.write_pictures", draw),
    ):
        main(EXPERIMENT, args)


def wait_for_steps(folder: Path, steps: int, process: subprocess.Popen) -> None:
    """Waits until the run of a process has a checkpoint of that many steps or more."""
    end = time.monotonic() + 300
    while find_newest(folder) < steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)


def choose_script(slow: tuple[float, str, int] | None) -> list[str]:
    """Returns the script that trains at that speed, with its first arguments."""
    folder = Path(__file__).parent
    if slow is None:
        return [str(folder / "tiny_run.py")]
    return [str(folder / "slow_run.py"), *map(str, slow)]


if __name__ == "__main__":
    seconds, line, number, *args = sys.argv[1:]
    train_slowly(Brake(float(seconds), line, int(number)), args)
