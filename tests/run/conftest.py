"""Shares runs and compiled steps between these tests, whatever the worker."""

import functools
import pickle
import re
import shutil

import jax
import pytest
from filelock import FileLock
from jax.experimental.compilation_cache import compilation_cache

from tiny_run import Outcome, run_command, write_images


@pytest.fixture(scope="module", autouse=True)
def _compile_cache(shared_folder):
    """Keeps all that a test compiled: compiling takes far longer than the tiny steps."""
    settings = {
        "jax_compilation_cache_dir": str(shared_folder / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def base(shared_folder):
    """Writes the images and returns the flags that every run shares."""
    path = shared_folder / "tiny.npz"
    with FileLock(shared_folder / "tiny.lock"):
        if not path.exists():
            write_images(path)
    return {"data_dir": path, "devices": 1}


@pytest.fixture
def start(tmp_path, base):
    """Starts a run in a folder of its own."""

    def start(name="run", **flags) -> Outcome:
        return run_command(**base | {"save_dir": tmp_path / name} | flags)

    return start


# Not of the session, whose fixtures are made before a module's compilation cache.
@pytest.fixture(scope="module")
def trained(shared_folder, base):
    """Trains a run to its end, once for all tests, which may only read it.

    The one without flags has its pictures.
    """

    @functools.cache
    def trained(**flags) -> Outcome:
        name = "run" + re.sub(r"\W+", "-", "".join(f" {n} {v}" for n, v in flags.items()))
        folder, pickled = shared_folder / name, shared_folder / f"{name}.pickle"
        with FileLock(shared_folder / f"{name}.lock"):
            if not pickled.exists():
                outcome = run_command(pictures=not flags, **base | {"save_dir": folder} | flags)
                assert outcome.status == 0, outcome.err
                pickled.write_bytes(pickle.dumps(outcome))
            return pickle.loads(pickled.read_bytes())

    return trained


@pytest.fixture(scope="module")
def plain(trained):
    """Trains a run with every default of the tiny preset, with its pictures."""
    return trained()


@pytest.fixture
def copied(tmp_path, plain):
    """Copies the plain run, to be changed."""
    return shutil.copytree(plain.folder, tmp_path / "copied")
