"""A process that measures one contender when it is told to; `benchmark.py` starts several.

Tasks come as lines of its input, results go out as lines of JSON. Images and initial parameters
come from a file, so that a process of PyTorch does not hold JAX, too.
"""

import ctypes
import importlib
import importlib.util
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarking.contender import NOT_INSTALLED, Contender, Inputs, Tasks


def main() -> None:
    """Sends losses or names of stages, then answers requests until its input ends."""
    contender = Contender(**json.loads(sys.argv[1]))
    if contender.library == "torch" and importlib.util.find_spec("torch") is None:
        raise SystemExit(NOT_INSTALLED)
    with np.load(sys.argv[2]) as file:
        inputs = dict(file)
    prepare = _prepare_stages if contender.stages else _prepare_steps
    first, tasks, figures = prepare(contender, inputs)
    print(json.dumps(first), flush=True)
    _answer(tasks, figures | {"memory": _read_peak_memory})


def _prepare_stages(contender: Contender, inputs: Inputs) -> tuple[list[str], Tasks, Tasks]:
    tasks = _import_tasks(contender).make_stage_tasks(inputs, contender.batch_size)
    return list(tasks), tasks, {}


def _prepare_steps(contender: Contender, inputs: Inputs) -> tuple[list[float], Tasks, Tasks]:
    """Does three steps; returns their losses, tasks to time, and figures known without timing."""
    tasks, figures = _import_tasks(contender).make_step_tasks(contender, inputs)
    losses = [tasks["train"]()]
    if contender.keep_memory:
        _return_freed_memory()
    losses += [tasks["train"]() for _ in range(2)]
    return losses, tasks, figures


def _import_tasks(contender: Contender) -> Any:
    """Imports the tasks of one library, and so that library alone."""
    return importlib.import_module(f"benchmarking.{contender.library}_tasks")


def _answer(tasks: Tasks, figures: Tasks) -> None:
    for line in sys.stdin:
        name, repeats = json.loads(line)
        result = figures[name]() if name in figures else time_calls(tasks[name], repeats)
        print(json.dumps(result), flush=True)


def time_calls(task: Callable[[], Any], repeats: int) -> float:
    """Returns the median seconds of a task, after one call that is not timed."""
    task()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        task()
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def _return_freed_memory() -> None:
    """Returns to the system what is free now, as capsjax.run does, which would import JAX."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def _read_peak_memory() -> float:
    """Returns the largest resident size so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
