"""What a run asks of its process before JAX starts: its allocator and compilation cache."""

import os
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from benchmarking.whole import run_measured
from capsjax.run import Experiment, loop, machine, main
from data_files import digits, write_npz

MNIST = str(Path(__file__).parents[2] / "experiments" / "mnist.py")


@pytest.fixture
def cache_folder():
    """Returns the cache's folder as JAX has it; puts back what `machine.configure` may change."""
    names = "jax_compilation_cache_dir", "jax_cpu_enable_async_dispatch"
    before = [jax.config.values[name] for name in names]
    jax.config.update(names[0], None)
    yield lambda: jax.config.values[names[0]]
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


@pytest.fixture
def c_library(monkeypatch):
    """Stands in for the C library, so that this process keeps its allocator's settings."""
    library = mock.Mock()
    monkeypatch.setattr(machine.ctypes, "CDLL", library)
    return library


def test_main_configures_the_process_first():
    fail = mock.patch.object(machine, "configure", side_effect=MemoryError)
    with fail, pytest.raises(MemoryError):
        main(Experiment(), ["--no-such-flag"])


def test_compiled_code_is_kept_below_xdg_cache_home(cache_folder, c_library, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine.configure()
    assert Path(cache_folder()).parent == tmp_path / "capsjax"
    assert jax.__version__ in cache_folder()


@pytest.mark.parametrize("value", [None, ""], ids=["unset", "empty"])
def test_without_xdg_cache_home_compiled_code_is_kept_in_the_home_folder(
    cache_folder, c_library, tmp_path, monkeypatch, value
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME")
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    machine.configure()
    assert Path(cache_folder()).parent == tmp_path / ".cache" / "capsjax"


def test_steps_on_a_cpu_are_dispatched_synchronously(cache_folder, c_library):
    jax.config.update("jax_cpu_enable_async_dispatch", True)
    machine.configure()
    assert not jax.config.values["jax_cpu_enable_async_dispatch"]


def test_a_compile_cache_that_the_user_set_stays(cache_folder, c_library, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    machine.configure()
    assert cache_folder() == str(tmp_path)


def test_the_allocator_is_set_on_linux_only(cache_folder, c_library, monkeypatch):
    monkeypatch.setattr(machine.sys, "platform", "linux")
    machine.configure()
    assert c_library.return_value.mallopt.call_count == 4
    machine.return_freed_memory()
    c_library.return_value.malloc_trim.assert_called_once_with(0)
    c_library.reset_mock()
    for platform in ("darwin", "win32"):
        monkeypatch.setattr(machine.sys, "platform", platform)
        machine.configure()
        machine.return_freed_memory()
    c_library.assert_not_called()


def test_another_c_library_is_left_alone(cache_folder, monkeypatch):
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: object())
    machine.configure()
    machine.return_freed_memory()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_resident_memory_grows_with_what_is_written():
    before = machine.measure_resident_memory()
    held = np.ones(2**24)
    assert machine.measure_resident_memory() - before == pytest.approx(held.nbytes, rel=0.05)


def test_without_proc_resident_memory_is_unknown_and_no_error(monkeypatch):
    monkeypatch.setattr(machine, "Path", mock.Mock(side_effect=FileNotFoundError))
    assert machine.measure_resident_memory() == 0


def test_memory_is_returned_after_first_calls_and_whenever_a_large_buffer_moved(monkeypatch):
    runner = mock.Mock(_calls=Counter(), _resident=0)
    levels, returned = [900, 900, 901, 900, 900, 1200, 900, 930, 1230], []
    for call, level in enumerate(levels):
        monkeypatch.setattr(loop, "measure_resident_memory", lambda level=level: level * 2**20)
        monkeypatch.setattr(loop, "return_freed_memory", lambda call=call: returned.append(call))
        loop.Runner._settle(runner, "train")
    assert returned == [0, 1, 2, 3, 5, 8]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_whole_run_of_mnist_peaks_below_1300_mib(precision, tmp_path):
    images = digits(train=60_000, test=1280)  # every training image, as in a user's process
    flags = ["--data-dir", str(write_npz(tmp_path / "digits.npz", images)), "--epochs", "1"]
    flags += ["--train-size", "1280", "--batch-size", "128", "--routings", "3"]
    # Nothing is compiled yet, as in a user's first run.
    environ = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    _, peak = run_measured([MNIST, *flags, "--precision", precision], tmp_path, environ)
    assert 300 < peak < 1300
