"""The scripts that a user starts."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

import mnist
from capsjax.presets import PRESETS
from capsjax.run import Experiment, lifecycle, main


@pytest.mark.parametrize("script", [["-m", "capsjax.run"], ["experiments/mnist.py"]], ids=" ".join)
def test_help_of_a_script_names_its_flags(script):
    done = subprocess.run(
        [sys.executable, *script, "--help"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"COLUMNS": "80", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for flag in ("--preset", "--epochs", "--average", "--data-dir", "--resume", "--coordinator"):
        assert f"{flag} " in done.stdout


def test_mnist_is_the_experiment_that_python_m_trains():
    assert mnist.MNIST.presets == PRESETS
    assert mnist.MNIST.dataset == Experiment().dataset == "mnist"
    assert mnist.MNIST.make_task is Experiment().make_task


def test_ctrl_c_while_the_command_line_is_read_ends_without_a_traceback():
    interrupted = mock.patch.object(lifecycle, "parse", side_effect=KeyboardInterrupt)
    prepared = mock.patch.object(lifecycle.machine, "configure")
    with interrupted, prepared, pytest.raises(SystemExit) as end:
        main(Experiment(), [])
    assert end.value.code == 130
