"""Signals end a real process with a checkpoint, and even SIGKILL loses no bit of its run."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest

from slow_run import choose_script, wait_for_steps
from tiny_run import (
    STEPS,
    find_newest,
    have_same_bits,
    list_steps,
    make_arguments,
    make_environment,
    read_arrays,
    read_rows,
    write_images,
)

pytestmark = pytest.mark.slow

EPOCHS = 4
# Slow from the step after the second epoch's first checkpoint, so that a test interferes in time
# even on a busy machine.
SLOW = (3, "trains", STEPS + 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("survival")


def kill_all(process: subprocess.Popen) -> None:
    """Kills a process and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def time_limit(process: subprocess.Popen) -> Iterator[None]:
    """Kills a process that has not done within 300 seconds what a test waits for."""
    timer = threading.Timer(300, kill_all, [process])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@pytest.fixture(scope="module")
def run(folder):
    """Starts a run in a process of its own on one device, slowed down or not."""
    images = write_images(folder / "tiny.npz")
    environment = make_environment(folder / "home")

    @contextlib.contextmanager
    def run(slow=None, resume=None, before=(), **flags) -> Iterator[subprocess.Popen]:
        new = {"data_dir": images, "epochs": EPOCHS, **flags}
        args = make_arguments(resume=resume, **({} if resume else new))
        process = subprocess.Popen(
            [*before, sys.executable, *choose_script(slow), *args],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            kill_all(process)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                pipe.close()

    return run


@pytest.fixture(scope="module")
def unbroken(run, folder):
    """Trains a run that nobody disturbs and returns its folder."""
    with run(save_dir=folder / "unbroken") as process:
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert (folder / "home/cache/capsjax").is_dir()
    return folder / "unbroken"


def assert_resumed(run, folder: Path, unbroken: Path) -> None:
    """Resumes a run and compares all that it leaves with the undisturbed one."""
    with run(resume=folder) as process:
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "resume    step" in out
    assert have_same_bits(read_arrays(folder), read_arrays(unbroken))
    assert read_rows(folder) == read_rows(unbroken)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_ends_the_run_with_a_checkpoint_that_resume_continues(
    run, folder, unbroken, number, status
):
    save_dir = folder / number.name
    with run(SLOW, save_dir=save_dir, checkpoint_steps=2) as process:
        wait_for_steps(save_dir, STEPS + 2, process)
        process.send_signal(number)
        out, _ = process.communicate(timeout=300)
    assert process.returncode == status
    assert f"{number.name}: ends after this step, with a checkpoint" in out
    assert "Traceback" not in out
    assert STEPS + 2 < list_steps(save_dir)[-1] < EPOCHS * STEPS
    assert_resumed(run, save_dir, unbroken)


def test_a_second_interrupt_ends_the_run_at_once(run, folder, unbroken):
    save_dir = folder / "twice"
    with run((600, "trains", 2), save_dir=save_dir, checkpoint_steps=1) as process:
        wait_for_steps(save_dir, 1, process)
        process.send_signal(signal.SIGINT)
        with time_limit(process):
            assert any("SIGINT: ends after this step" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=300)  # the step takes 600 s
    assert process.returncode == -signal.SIGINT
    assert_resumed(run, save_dir, unbroken)


@pytest.mark.parametrize("steps", [2, STEPS + 4])
def test_a_killed_run_is_resumed_to_the_same_bits(run, folder, unbroken, steps):
    save_dir = folder / f"killed-{steps}"
    with run((3, "trains", steps + 1), save_dir=save_dir, checkpoint_steps=2) as process:
        wait_for_steps(save_dir, steps, process)
        process.kill()
        process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert_resumed(run, save_dir, unbroken)


def test_a_dozen_kills_at_random_moments_lose_nothing(run, folder):
    undisturbed, killed = folder / "ten-epochs", folder / "killed-often"
    with run(save_dir=undisturbed, epochs=10) as process:
        assert process.wait(timeout=300) == 0
    rng, saved = np.random.default_rng(0), [0]
    for number in range(12):
        begun = (killed / "config.json").exists()
        new = {"save_dir": killed, "epochs": 10, "checkpoint_steps": 1}
        # While it starts, in a step, or in the save that follows each.
        with run((1, "trains", 1), **{"resume": killed} if begun else new) as process:
            if number % 2:
                wait_for_steps(killed, saved[-1] + 1, process)
            time.sleep(rng.uniform(0, 3))
            process.kill()
            assert process.wait(timeout=300) == -signal.SIGKILL, process.communicate()[0]
        saved.append(find_newest(killed))
    assert len(set(saved)) > 6
    assert_resumed(run, killed, undisturbed)
    assert [row["epoch"] for row in read_rows(killed)] == [str(n + 1) for n in range(10)]


# A file system of 3 MiB that lives as long as the shell, which waits for a line at the end.
SMALL_DISK = """
mount -t tmpfs -o size=3m none "$0" || exit 9
"$@"
echo "status $?"
read line
"""


def fill_up(disk: Path, left: int) -> None:
    """Fills a disk except for `left` bytes, or wholly if something else writes meanwhile."""
    sizes = os.statvfs(disk)
    with (disk / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        file.write(bytes(max(0, sizes.f_bavail * sizes.f_frsize - left)))


def read_to_status(output: TextIO) -> list[str]:
    """Reads the lines up to the one in which the shell says how its command ended."""
    lines = []
    for line in output:
        lines.append(line)
        if line.startswith("status"):
            break
    return lines


@pytest.mark.parametrize("left", [0, 48 * 1024], ids=["nothing", "48 KiB"])
def test_a_full_disk_ends_the_run_in_words_and_keeps_what_was_sound(run, folder, unbroken, left):
    disk = folder / f"disk-{left}"
    disk.mkdir()
    small = ["unshare", "--mount", "--map-root-user", "sh", "-c", SMALL_DISK, str(disk)]
    if subprocess.run([*small, "true"], input=b"\n", capture_output=True).returncode:
        pytest.skip("this system lets no user mount a file system of their own")
    with run(SLOW, before=small, save_dir=disk / "run", checkpoint_steps=2) as process:
        inside = Path(f"/proc/{process.pid}/root{disk}")
        wait_for_steps(inside / "run", STEPS + 2, process)
        with time_limit(process), ThreadPoolExecutor() as pool:
            reading = pool.submit(read_to_status, process.stdout)
            # Again and again: the run may be about to delete a checkpoint, which makes room.
            while not reading.done():
                fill_up(inside, left)
                time.sleep(0.01)
        (inside / "filler").unlink()
        shutil.copytree(inside / "run", folder / f"rescued-{left}")
        process.communicate("\n", timeout=60)
    *_, error, status = lines = reading.result()
    assert status == "status 1\n", lines
    assert re.match("error: .*No space left on device.*kept in", error), lines
    assert_resumed(run, folder / f"rescued-{left}", unbroken)
