"""Several real processes over loopback train one network: they end and continue together."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from slow_run import choose_script, wait_for_steps
from tiny_run import (
    find_newest,
    have_same_bits,
    list_steps,
    make_arguments,
    make_environment,
    make_images,
    read_arrays,
    read_params,
    read_rows,
    write_images,
)

pytestmark = pytest.mark.slow

STEPS = 5  # an epoch: 60 training images in batches of 12, which 1, 2 and 4 processes divide
EPOCHS = 4
# Slow from the step after the second epoch's first checkpoint, so that a test interferes in time
# even on a busy machine.
SLOW = (3, "trains", STEPS + 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def start(folder):
    """Starts a run in `n` processes of one device each or more."""
    data = write_images(folder / "tiny.npz")
    environment = make_environment(folder / "home")

    @contextlib.contextmanager
    def start(
        n: int, slow=None, slurm=False, of_second=None, local_devices=1, draw=False, **flags
    ) -> Iterator[list[subprocess.Popen]]:
        if not flags.keys() & {"resume", "testing"}:
            flags = {"data_dir": data, "epochs": EPOCHS, "batch_size": 12, **flags}
        if slurm:
            flags |= {"distributed": True}
        elif n > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                flags |= {"coordinator": f"127.0.0.1:{free.getsockname()[1]}", "num_processes": n}
        processes = [
            subprocess.Popen(
                [sys.executable, *choose_script(slow)]
                + make_arguments(
                    **flags | ((of_second or {}) if number else {}),
                    process_id=None if slurm or n == 1 else number,
                ),
                env=environment
                | {"JAX_NUM_CPU_DEVICES": str(local_devices)}
                | ({"DRAW": "1"} if draw else {})
                | (make_slurm_environment(n, number) if slurm else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(n)
        ]
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.communicate()

    return start


def make_slurm_environment(n: int, number: int) -> dict[str, str]:
    """Makes what `srun` tells the processes of a job on this host."""
    return {
        "SLURM_JOB_ID": str(os.getpid()),  # JAX takes the port from it
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(n),
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
    }


def wait_for(processes: list[subprocess.Popen], timeout: float = 240) -> list[tuple[int, str, str]]:
    """Returns exit status, output and errors of each process, once all have ended."""
    texts = [process.communicate(timeout=timeout) for process in processes]
    return [(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]


@pytest.fixture(scope="module")
def unbroken(start, folder):
    """Trains undisturbed runs of one and of two processes and returns their folders."""
    folders = {}
    for n in (1, 2):
        folders[n] = folder / f"unbroken-{n}"
        with start(n, save_dir=folders[n]) as processes:
            (status, out, err), *others = wait_for(processes)
            assert status == 0, err
            assert "test error" in out
            for status, out, _ in others:
                assert status == 0
                assert not re.findall(r"^(?!\[Gloo\]).+", out, re.M)  # the first speaks for all
    return folders


def wait_for_line(start: str, process: subprocess.Popen) -> None:
    assert any(line.startswith(start) for line in process.stdout)


def compute_distance(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Computes the distance of two sets of arrays relative to the norm of the second."""
    assert ours.keys() == theirs.keys()
    a, b = (np.concatenate([np.ravel(x[n]) for n in theirs]).astype("f8") for x in (ours, theirs))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def read_losses(folder: Path) -> list[list[float]]:
    names = ("train_loss", "train_margin", "test_loss", "test_margin")
    return [[float(row[name]) for name in names] for row in read_rows(folder)]


def test_four_processes_give_the_metrics_of_one(start, folder):
    one, together = folder / "one-epoch-1", folder / "one-epoch-4"
    for n, save_dir in ((1, one), (4, together)):
        with start(n, save_dir=save_dir, epochs=1, draw=True) as processes:
            assert wait_for(processes)[0][0] == 0
    np.testing.assert_allclose(read_losses(together), read_losses(one), rtol=0, atol=1e-4)
    for file in ("metrics.csv", "weights.safetensors", "reconstructions.png"):
        assert (together / file).is_file()
    assert list_steps(one) == list_steps(together) == [STEPS]
    assert 0 < compute_distance(read_params(one), read_params(together)) < 1e-5


def test_after_four_epochs_the_metrics_of_two_are_still_those_of_one(unbroken):
    np.testing.assert_allclose(
        read_losses(unbroken[2]), read_losses(unbroken[1]), rtol=0, atol=1e-4
    )


def test_two_processes_with_two_devices_each_never_wait_for_each_other(start, folder, unbroken):
    save_dir = folder / "two-by-two"
    with start(2, local_devices=2, save_dir=save_dir) as processes:
        results = wait_for(processes)
    assert [status for status, *_ in results] == [0, 0]
    assert "devices   4 of 4 × cpu" in results[0][1]
    np.testing.assert_allclose(read_losses(save_dir), read_losses(unbroken[1]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("killed", [0, 1], ids=["coordinator", "other"])
def test_a_killed_process_ends_the_others_and_the_run_goes_on_with_any_number(
    start, folder, unbroken, killed
):
    save_dir = folder / f"killed-{killed}"
    with start(2, SLOW, save_dir=save_dir, checkpoint_steps=2) as processes:
        wait_for_steps(save_dir, STEPS + 2, processes[1 - killed])
        processes[killed].kill()
        (status, _, err) = wait_for([processes[1 - killed]])[0]
    # Whichever comes first: a failed step, a failed checkpoint, or JAX's service, which aborts.
    assert status in (1, -signal.SIGABRT)
    assert re.search(
        "error: process . of 2 failed or lost another one|another task died"
        r"|a checkpoint cannot be written \(or another process is gone\)",
        err,
    ), err
    assert "Traceback" not in err
    assert STEPS + 2 <= find_newest(save_dir) < EPOCHS * STEPS
    alone = folder / f"killed-{killed}-alone"
    shutil.copytree(save_dir, alone)
    for n, resumed in ((2, save_dir), (1, alone)):
        with start(n, resume=resumed) as processes:
            status, out, err = wait_for(processes)[0]
        assert status == 0, err
        assert "resume    step" in out
    # The same number of processes adds up in the same order, another number in another.
    assert have_same_bits(read_arrays(save_dir), read_arrays(unbroken[2]))
    assert read_rows(save_dir) == read_rows(unbroken[2])
    assert 0 < compute_distance(read_params(alone), read_params(unbroken[2])) < 1e-4
    np.testing.assert_allclose(read_losses(alone), read_losses(unbroken[2]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("number", "to", "statuses"),
    [(signal.SIGTERM, [1], [143, 143]), (signal.SIGINT, [0, 1], [130, 130])],
    ids=["SIGTERM to one", "SIGINT to all"],
)
def test_a_signal_ends_all_after_the_same_step_with_a_checkpoint(
    start, folder, unbroken, number, to, statuses
):
    save_dir = folder / f"{number.name}-{len(to)}"
    with start(2, SLOW, save_dir=save_dir, checkpoint_steps=2) as processes:
        wait_for_steps(save_dir, STEPS + 2, processes[0])
        for process in to:
            processes[process].send_signal(number)
        results = wait_for(processes)
    assert [status for status, _, _ in results] == statuses, results
    assert STEPS + 2 < list_steps(save_dir)[-1] < EPOCHS * STEPS
    with start(2, resume=save_dir) as processes:
        assert wait_for(processes)[0][0] == 0
    assert have_same_bits(read_arrays(save_dir), read_arrays(unbroken[2]))
    assert read_rows(save_dir) == read_rows(unbroken[2])


def test_a_signal_in_the_last_evaluation_ends_all_and_it_is_done_again(start, folder, unbroken):
    save_dir = folder / "evaluation"
    shutil.copytree(unbroken[2], save_dir)
    with start(2, (3, "evaluates", 1), resume=save_dir, epochs=EPOCHS + 1) as processes:
        wait_for_line("evaluates", processes[0])
        processes[0].send_signal(signal.SIGTERM)
        assert [status for status, *_ in wait_for(processes)] == [143, 143]
    assert list_steps(save_dir)[-1] == (EPOCHS + 1) * STEPS
    with start(2, resume=save_dir) as processes:
        assert wait_for(processes)[0][0] == 0
    assert [row["epoch"] for row in read_rows(save_dir)] == [str(n + 1) for n in range(EPOCHS + 1)]


def test_a_signal_after_the_last_evaluation_ends_all_at_once(start, folder):
    with start(2, (600, "draws", 1), save_dir=folder / "pictures", epochs=1) as processes:
        wait_for_line("draws", processes[0])
        for process in processes:
            process.send_signal(signal.SIGTERM)
        results = wait_for(processes)
    assert [status for status, *_ in results] == [-signal.SIGTERM] * 2, results


def test_one_process_alone_ends_by_a_signal_before_its_first_step(start, folder):
    with start(1, (600, "begins", 1), save_dir=folder / "alone", slurm=True) as processes:
        wait_for_line("begins", processes[0])
        processes[0].send_signal(signal.SIGTERM)
        status, _, _ = wait_for(processes)[0]
    assert status == -signal.SIGTERM


def test_a_batch_that_the_devices_do_not_divide_ends_all_in_words(start, folder):
    with start(2, save_dir=folder / "odd", batch_size=15) as processes:
        results = wait_for(processes)
    assert all(status for status, *_ in results)
    assert "2 devices do not divide a batch of 15 images evenly" in results[0][2]
    assert not (folder / "odd").exists()


def test_distributed_finds_the_others_under_slurm_and_they_validate_and_test_as_one_does(
    start, folder
):
    tested = []
    for n in (1, 2):
        flags = {"save_dir": folder / f"slurm-{n}", "validation": 12, "slurm": n > 1}
        with start(n, **flags) as processes:
            results = wait_for(processes)
        assert [status for status, *_ in results] == [0] * n, results
        with start(n, slurm=n > 1, testing=True, weights=folder / f"slurm-{n}") as processes:
            tested.append(wait_for(processes)[0][1].splitlines()[-1])
        assert tested[-1] == results[0][1].splitlines()[-1]
    one, two = (read_rows(folder / f"slurm-{n}") for n in (1, 2))
    names = [name for name in one[0] if name.endswith(("loss", "margin"))]
    values = [[[float(row[name]) for name in names] for row in rows] for rows in (one, two)]
    np.testing.assert_allclose(*values, rtol=0, atol=1e-4)


def test_a_signal_before_the_first_step_of_a_resumed_run_is_not_lost(start, folder, unbroken):
    save_dir = folder / "early"
    shutil.copytree(unbroken[2], save_dir)
    resumed = {"resume": save_dir, "epochs": EPOCHS + 2}
    with start(2, (3, "begins", 1), **resumed) as processes:
        wait_for_line("begins", processes[0])
        processes[1].send_signal(signal.SIGTERM)
        assert [status for status, *_ in wait_for(processes)] == [143, 143]
    assert list_steps(save_dir)[-1] < (EPOCHS + 2) * STEPS


@pytest.mark.parametrize(
    ("differently", "what"), [({"lr": 0.5}, "settings"), ({"data_dir": "other"}, "images")]
)
def test_processes_with_different_settings_or_images_are_refused(start, folder, differently, what):
    arrays = make_images()
    other = write_images(folder / "other.npz", y_train=arrays["y_train"][::-1].copy())
    changed = {name: other if v == "other" else v for name, v in differently.items()}
    with start(2, save_dir=folder / "differ", of_second=changed) as processes:
        results = wait_for(processes)
    assert all(status for status, *_ in results)
    assert f"error: the 2 processes have different {what}: " in results[0][2] + results[1][2]
    assert not (folder / "differ").exists()


def test_distributed_without_a_launcher_is_refused_in_words(start, folder):
    with start(1, save_dir=folder / "none", distributed=True) as processes:
        status, _, err = wait_for(processes)[0]
    assert status == 2
    assert re.search("^error: the launcher .* does not say who .*: give --coordinator", err, re.M)
    assert err.count("\n") == 2
