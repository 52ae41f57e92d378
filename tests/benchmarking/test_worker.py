"""A worker holds one library, and glibc keeps its freed memory where the contender says so."""

import platform
import re
import subprocess
import sys

import psutil
import pytest

from benchmarking.contender import KEEP_FREED_MEMORY, Contender, Worker, make_environment
from capsjax.run import machine

NO_GLIBC = platform.libc_ver()[0] != "glibc"

# Minor page faults of a second buffer of 64 MiB, after the first was freed.
COUNT_FAULTS = """
import resource
def count(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
b"x" * 2**26
before = count()
b"x" * 2**26
print(count() - before)
"""


@pytest.fixture
def start(inputs):
    """Starts workers of a batch of 2, and ends them after the test."""
    workers = []

    def start_worker(library: str, **options) -> Worker:
        workers.append(Worker(Contender(library, batch_size=2, **options), inputs))
        return workers[-1]

    yield start_worker
    for worker in workers:
        worker.close()


@pytest.mark.slow
@pytest.mark.parametrize("stages", [False, True])
@pytest.mark.parametrize(("library", "other"), [("capsjax", "torch"), ("torch", "jax")])
def test_a_worker_imports_its_own_library_alone(capfd, monkeypatch, start, library, other, stages):
    if library == "torch":
        pytest.importorskip("torch", reason="PyTorch is installed for the benchmark only")
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    assert start(library, stages=stages).first
    imported = set(re.findall(r"\| +(\S+)$", capfd.readouterr().err, re.MULTILINE))
    assert library in imported
    assert other not in imported


@pytest.mark.slow
@pytest.mark.parametrize("library", ["capsjax", "torch"])
def test_the_allocator_of_a_worker_is_as_its_contender_says(monkeypatch, start, library):
    if library == "torch":
        pytest.importorskip("torch", reason="PyTorch is installed for the benchmark only")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")  # of the shell: no contender inherits it
    for keep_memory in (True, False):
        worker = start(library, keep_memory=keep_memory, stages=True)  # they start in seconds
        environment = psutil.Process(worker.process.pid).environ()
        found = {name: environment[name] for name in KEEP_FREED_MEMORY if name in environment}
        assert found == (KEEP_FREED_MEMORY if keep_memory else {})


def test_the_variables_are_the_values_that_a_run_sets(monkeypatch):
    calls = {}
    monkeypatch.setattr(machine, "_find_in_glibc", lambda name: calls.__setitem__)
    machine.keep_freed_memory()
    numbers = {  # malloc.h
        "MALLOC_TRIM_THRESHOLD_": -1,
        "MALLOC_TOP_PAD_": -2,
        "MALLOC_MMAP_MAX_": -4,
        "MALLOC_ARENA_MAX": -8,
    }
    assert calls == {numbers[name]: int(value) for name, value in KEEP_FREED_MEMORY.items()}


@pytest.mark.skipif(NO_GLIBC, reason="the variables are glibc's")
def test_a_process_with_the_variables_reuses_freed_memory_without_page_faults():
    def count_faults(keep_memory: bool) -> int:
        environment = make_environment(Contender("capsjax", keep_memory=keep_memory))
        command = [sys.executable, "-c", COUNT_FAULTS]
        return int(subprocess.check_output(command, env=environment, text=True))

    assert count_faults(keep_memory=True) < 10 < count_faults(keep_memory=False)
