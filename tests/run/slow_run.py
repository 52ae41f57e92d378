"""Trains the tiny network as `tiny_run.py` does, but slowly, so that a test can interfere.

python slow_run.py SECONDS LINE NUMBER FLAGS

Prints a line when the loop begins ("begins"), before each step ("trains"), each evaluation of a
batch ("evaluates") and the pictures ("draws"), which are not drawn. From the NUMBER-th time that
LINE is printed, all that is announced takes SECONDS longer.
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
    """Prints a line before each call, and once one was printed often enough, delays the calls."""

    seconds: float
    line: str
    left: int  # how often that line is still printed without a delay, and one more

    def slow_down(self, function: Callable, line: str) -> Callable:
        """Makes a function print a line, and wait if it is to be late, before it does its work."""

        def slowed(*args: Any) -> Any:
            print(line, flush=True)
            if line == self.line:
                self.left -= 1
            if self.left <= 0:
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
