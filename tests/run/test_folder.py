"""The folder of a run: its name, its lock, and the files that others write into it."""

import concurrent.futures
import contextlib
import errno
import os
import re
import shutil
import subprocess
import sys
from unittest import mock

import pytest

from capsjax.run import run
from capsjax.run.command_line import parse
from capsjax.run.folder import create_named_folder, lock_folder
from tiny_run import (
    EXPERIMENT,
    make_arguments,
    read_rows,
    read_tree,
    run_command,
)


def test_a_slash_in_the_name_of_a_data_set_makes_no_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = create_named_folder("emnist/letters")
    assert re.fullmatch(r"runs/emnist-letters-\d{8}-\d{6}", str(folder))
    assert folder.is_dir()


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.time", lambda: 1e9)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        folders = list(pool.map(create_named_folder, ["mnist"] * 20))
    assert len(set(folders)) == 20
    assert sorted(tmp_path.glob("runs/*")) == sorted(tmp_path / folder for folder in folders)


@pytest.mark.parametrize(
    ("save_dir", "words"),
    [
        ("file", "--save-dir file is no folder"),
        ("file/run", "--save-dir file/run cannot be made: Not a directory"),
        ("/proc/no/run", "--save-dir /proc/no/run cannot be made"),
        ("x" * 300, "cannot be made: File name too long"),
    ],
)
def test_a_folder_that_cannot_be_made_is_refused_in_words(
    start, tmp_path, monkeypatch, save_dir, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    outcome = start(save_dir=save_dir)
    assert outcome.status == 2
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert words in outcome.err
    assert read_tree(tmp_path) == {"file": b"mine"}


HOLD = """
import sys
from pathlib import Path
from capsjax.run.folder import lock_folder
with lock_folder(Path(sys.argv[1])), lock_folder(Path(sys.argv[2])):
    print("held", flush=True)
    input()
"""


@pytest.mark.slow
def test_a_folder_in_use_by_a_living_process_is_refused_until_it_dies(start, plain, base, tmp_path):
    copied, new = tmp_path / "run", tmp_path / "new"
    shutil.copytree(plain.folder, copied)
    new.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, copied, new],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"held\n"
        before = read_tree(tmp_path)
        for folder, flags in (
            (copied, {"resume": copied, "epochs": 3}),
            (copied, {"weights": copied, "testing": True}),
            (new, base | {"save_dir": new}),
        ):
            outcome = run_command(**flags)
            assert outcome.status == 2
            assert f"{folder} is in use by another process" in outcome.err
        settings = parse(make_arguments(**base, save_dir=copied), EXPERIMENT)
        with pytest.raises(ValueError, match="is in use by another process"):
            run(EXPERIMENT, settings)
        assert start(save_dir=copied).status == 2  # it holds a run anyway
        assert read_tree(tmp_path) == before
        process.kill()
        process.wait()
    assert run_command(resume=copied, epochs=3).status == 0
    assert run_command(resume=copied, epochs=4).status == 0  # the lock was released at its end


@pytest.mark.parametrize("name", ["weights.safetensors", "metrics.csv"])
def test_results_that_belong_to_no_run_are_not_written_over(start, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    outcome = start()
    assert outcome.status == 2
    assert f"holds {name}, but no config.json: move" in outcome.err
    assert (tmp_path / "run" / name).read_text() == "mine"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_reason_to_stop(start, number):
    no_locks = mock.Mock(side_effect=OSError(number, "no locks here"))

    @contextlib.contextmanager
    def lock_without_locks(folder):  # the compilation cache keeps its own
        with contextlib.ExitStack() as stack:
            with mock.patch("fcntl.flock", no_locks):
                stack.enter_context(lock_folder(folder))
            yield

    with mock.patch("capsjax.run.opening.lock_folder", lock_without_locks):
        outcome = start(epochs=1)
    assert outcome.status == 0
    assert "on a file system without locks" in outcome.out


def test_rows_that_a_spreadsheet_wrote_are_read(copied):
    path = copied / "metrics.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert run_command(resume=copied, epochs=3).status == 0
    assert [row["epoch"] for row in read_rows(copied)] == ["1", "2", "3"]
