"""Damaged checkpoints are found, passed over and named; a save that is killed leaves none."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from capsjax.checkpoint import CheckpointError, Checkpoints
from small_states import NOTES, holds, list_steps, make_state, read_last, save_all


def damage(path: Path, kind: str) -> None:
    """Removes, empties or truncates a file."""
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes({"emptied": b"", "truncated": content[: len(content) // 2]}[kind])


def list_files(folder: Path) -> list[Path]:
    """Lists all files in a folder and in its subfolders."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["missing", "emptied", "truncated"])
def test_a_checkpoint_with_a_damaged_file_is_passed_over_and_named(tmp_path, kind):
    folder = tmp_path / "run"
    save_all(folder, (1, 0.5), (2, 0.3), (3, 0.1))
    assert list_steps(folder) == [2, 3]
    passed_over = 0
    for number, path in enumerate(list_files(folder / "3")):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        damage(copy / path.relative_to(folder), kind)
        with Checkpoints(copy) as checkpoints:
            found = read_last(checkpoints)
            assert holds(found, make_state(found.step))
            assert found.notes == NOTES
            assert found.unsound == [3][: 3 - found.step]
            passed_over += found.step == 2
            # Training goes on from there: its next checkpoint replaces the damaged one.
            checkpoints.save(make_state(found.step + 1), {}, 0.2)
            checkpoints.wait()
            assert holds(read_last(checkpoints), make_state(found.step + 1))
            assert read_last(checkpoints).unsound == []
    assert passed_over >= 4  # manifest, array, its description, the notes


def test_a_step_before_a_damaged_one_is_saved(tmp_path):
    folder = tmp_path / "run"
    save_all(folder, (10, None), (20, None))
    for path in list_files(folder / "20" / "state"):
        damage(path, "emptied")
    with Checkpoints(folder) as checkpoints:
        assert read_last(checkpoints).step == 10
        checkpoints.save(make_state(15), {})
    with Checkpoints(folder) as checkpoints:
        assert holds(read_last(checkpoints), make_state(15))
        assert read_last(checkpoints).unsound == []
    assert list_steps(folder) == [10, 15]


@pytest.mark.slow
def test_a_flipped_bit_anywhere_is_harmless_or_found(tmp_path):
    folder = tmp_path / "run"
    save_all(folder, (1, 0.5), (2, 0.3))
    rng = np.random.default_rng(0)
    harmless: list[str] = []
    found: list[str] = []
    for path in list_files(folder / "2"):
        content = path.read_bytes()
        for position in rng.permutation(len(content))[:12]:
            flipped = bytearray(content)
            flipped[position] ^= 1 << rng.integers(8)
            path.write_bytes(flipped)
            with Checkpoints(folder) as checkpoints:
                checkpoint = read_last(checkpoints)
            assert holds(checkpoint, make_state(checkpoint.step)), (path, position)
            assert checkpoint.notes == NOTES
            (harmless if checkpoint.step == 2 else found).append(path.name)
        path.write_bytes(content)
    largest = max(list_files(folder / "2"), key=lambda path: path.stat().st_size)
    assert {"metadata", largest.name} <= set(found)
    assert "metadata" not in harmless


@pytest.mark.parametrize("kind", ["emptied", "truncated"])
def test_when_all_are_damaged_it_is_an_error_in_words(tmp_path, kind):
    folder = tmp_path / "run"
    save_all(folder, (1, 0.5), (2, 0.3))
    for path in list_files(folder):
        damage(path, kind)
    with Checkpoints(folder) as checkpoints:
        message = r"all checkpoints in .*run are damaged: steps \[2, 1\]"
        with pytest.raises(CheckpointError, match=message):
            checkpoints.last()
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoints.best()


def test_a_damaged_best_is_an_error_and_no_other_in_its_place(tmp_path):
    folder = tmp_path / "run"
    save_all(folder, (1, 0.1), (2, 0.3))
    for path in list_files(folder / "1" / "state"):
        damage(path, "truncated")
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(CheckpointError, match="step 1 cannot be read"):
            checkpoints.best()
        assert read_last(checkpoints).step == 2


ENDLESS = """
import sys
from pathlib import Path
import numpy as np
from capsjax.checkpoint import Checkpoints
from capsjax.train import TrainState, zero_sums
with Checkpoints(Path(sys.argv[1])) as checkpoints:
    step = getattr(checkpoints.last(), "step", 0)
    while True:
        step += 1
        kernel = np.random.default_rng(step).normal(size=200_000).astype(np.float32)
        state = TrainState(np.int32(step), {"kernel": kernel}, {}, {}, (), zero_sums(("loss",)))
        checkpoints.save(state, {}, 1 / step)
        print(step, flush=True)
"""


@pytest.mark.slow
def test_a_save_that_is_killed_never_becomes_a_checkpoint(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    folder, before, left_behind = tmp_path / "run", 0, 0
    for delay in np.random.default_rng(0).uniform(0, 0.1, size=5):
        process = subprocess.Popen(
            [sys.executable, "-c", ENDLESS, str(folder)], stdout=subprocess.PIPE, text=True, env=env
        )
        assert process.stdout is not None
        while int(process.stdout.readline()) < before + 3:
            pass
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        left_behind += not all(path.name.isdigit() for path in folder.iterdir())
        with Checkpoints(folder) as checkpoints:
            checkpoint = read_last(checkpoints)
            assert checkpoint.unsound == []
            assert checkpoint.step > before
            for found in (checkpoint, checkpoints.best()):
                kernel = np.random.default_rng(found.step).normal(size=200_000)
                np.testing.assert_array_equal(
                    found.arrays["params.kernel"], kernel.astype(np.float32)
                )
        before = checkpoint.step
    assert left_behind  # at least one was killed while it saved
