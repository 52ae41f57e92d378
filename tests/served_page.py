"""Starts the command that serves the page, as a user does."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import draw


@contextlib.contextmanager
def serve(*words: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """Yields the process and the address that it tells."""
    command = [sys.executable, draw.__file__, "--no-open", "--port", "0", *words]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process, process.stdout.readline().split()[1]
        finally:
            process.kill()
