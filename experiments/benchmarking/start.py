"""The seconds that a user waits for the first step of experiments/mnist.py."""

import os
import pty
import re
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

_STEPPED = re.compile(rb"epoch 1/\d+ +[1-9]\d*%")  # the progress bar after a step


def measure_start() -> dict[str, float]:
    """Measures from the command to the first step: with an empty compile cache, and after that."""
    starts = "first start", "second start"
    with tempfile.TemporaryDirectory() as folder:
        return {name: _measure_first_step(Path(folder), name) for name in starts}


def _measure_first_step(folder: Path, name: str) -> float:
    """Starts a training in a terminal, since it shows no bar elsewhere; kills it at that bar."""
    script = Path(__file__).parents[1] / "mnist.py"
    command = [sys.executable, str(script), "--train-size", "5000"]
    ours, theirs = _open_terminal()
    begin = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--save-dir", str(folder / name)],
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"XDG_CACHE_HOME": str(folder)},
    )
    os.close(theirs)
    try:
        _wait_for_step(ours, " ".join(command))
        return time.perf_counter() - begin
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _open_terminal() -> tuple[int, int]:
    """Opens a pseudo-terminal; returns its two ends."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    return ours, theirs


def _wait_for_step(terminal: int, command: str) -> None:
    """Reads until the bar shows a step.

    Raises:
      SystemExit: with all that was read, if the command ended before.
    """
    seen = b""
    while not _STEPPED.search(seen):
        try:
            output = os.read(terminal, 4096)
        except OSError:  # Linux has this where other systems have an end of file
            output = b""
        if not output:
            raise SystemExit(f"{command} ended before its first step:\n{seen.decode()}")
        seen += output
