"""How long a person waits for the first step of experiments/mnist.py."""

import os
import pty
import re
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

_MOVED = re.compile(rb"epoch 1/\d+ +[1-9]\d*%")  # the progress bar after a step


def measure() -> dict[str, float]:
    """Seconds from the command to the first step: with an empty compile cache, and after that."""
    with tempfile.TemporaryDirectory() as folder:
        return {which: first_step(Path(folder), which) for which in ("first start", "second start")}


def first_step(folder: Path, name: str) -> float:
    """Starts a training, in a terminal since its bar shows there only, and ends it at that bar."""
    script = Path(__file__).with_name("mnist.py")
    command = [sys.executable, str(script), "--train-size", "5000"]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    begin = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--save-dir", str(folder / name)],
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"XDG_CACHE_HOME": str(folder)},
    )
    os.close(theirs)
    seen = b""
    try:
        while not _MOVED.search(seen):
            if not (output := os.read(ours, 4096)):
                raise EOFError
            seen += output
        return time.perf_counter() - begin
    except (EOFError, OSError) as error:  # the terminal closed
        raise SystemExit(
            f"{' '.join(command)} ended before its first step:\n{seen.decode()}"
        ) from error
    finally:
        process.kill()
        process.wait()
        os.close(ours)
