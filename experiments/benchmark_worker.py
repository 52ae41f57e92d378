"""A process that measures one thing when it is told to; `benchmark.py` starts several.

Tasks come as lines of its input, results go out as lines of JSON.
"""

import dataclasses
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import machine

Task = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Contender:
    """What a process measures."""

    library: str  # "capsjax" or "torch"
    dtype: str = "float32"
    keep_memory: bool = True  # the allocator's setting that experiments/mnist.py makes
    compiled: bool = False  # torch.compile
    batch_size: int = 128
    routings: int = 3
    stages: bool = False  # the parts of a step instead of the step


class Worker:
    """A contender's process, seen from outside."""

    def __init__(self, contender: Contender):
        command = [sys.executable, __file__, json.dumps(dataclasses.asdict(contender))]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.first = self._read()  # None if it could not start

    def ask(self, task: str, repeats: int = 1) -> Any:
        """A figure, or the seconds that a task takes, the median of `repeats` after one untimed."""
        print(json.dumps([task, repeats]), file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        self._process.communicate()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None


def network(routings: int) -> Any:
    """The same first parameters for all."""
    from flax import nnx

    from capsjax.nn import CapsNet

    return CapsNet(routings=routings, rngs=nnx.Rngs(0))


def images(batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    from capsjax import data

    mnist = data.load()
    return mnist.x_train[:batch_size], mnist.y_train[:batch_size]


def capsjax_tasks(contender: Contender) -> tuple[dict[str, Task], dict[str, Task]]:
    """What can be timed, and figures that it knows by itself."""
    import jax
    import optax

    from capsjax import sharding
    from capsjax.train import Recipe, create, jit_steps

    optimizer = optax.adam(1e-3)
    graphdef, state = create(network(contender.routings), optimizer)
    mesh = sharding.make_mesh(contender.batch_size, 1)
    recipe = Recipe(graphdef, optimizer, lam_recon=0.392, shift_pixels=0, dtype=contender.dtype)
    step: Any
    step, evaluate = jit_steps(recipe, mesh)
    x, y = (sharding.replicate(mesh, array) for array in images(contender.batch_size))
    indices, key = np.arange(contender.batch_size, dtype=np.int32), jax.random.key(0)
    lowered = step.lower(state, key, x, y, indices)
    begin = time.perf_counter()
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - begin

    def train() -> float:
        nonlocal state
        state, report = compiled(state, key, x, y, indices)
        jax.block_until_ready(state)
        return float(report.metrics.margin + 0.392 * report.metrics.reconstruction) / len(indices)

    def forward() -> None:
        jax.block_until_ready(evaluate(state.params, x, y, indices, indices >= 0))

    return {"train": train, "forward": forward}, {"compile": lambda: compile_seconds}


def torch_tasks(contender: Contender) -> tuple[dict[str, Task], dict[str, Task]]:
    """The same of the network in PyTorch."""
    import jax
    import torch
    from flax import nnx

    import torch_capsnet

    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(network(contender.routings))[1]))
    net: Any = torch_capsnet.CapsNet(params, contender.routings)
    low = contender.dtype == "bfloat16"
    pixels, classes = images(contender.batch_size)
    x = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    y = torch.from_numpy(classes).long()
    if low:
        net = net.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    if contender.compiled:
        net = torch.compile(net)

    def train() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            lengths, reconstruction = net(x, y)
        value = torch_capsnet.loss(lengths.float(), y, x, reconstruction.float())
        value.backward()
        optimizer.step()
        return value.item()

    def forward() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            net(x)

    return {"train": train, "forward": forward}, {}


def main() -> None:
    contender = Contender(**json.loads(sys.argv[1]))
    if contender.keep_memory:
        machine.keep_freed_memory()
    figures: dict[str, Task] = {}
    if contender.stages:
        import benchmark_stages

        tasks = benchmark_stages.TASKS[contender.library](contender.batch_size)
        print(json.dumps(list(tasks)), flush=True)
    else:
        build = {"capsjax": capsjax_tasks, "torch": torch_tasks}[contender.library]
        tasks, figures = build(contender)
        print(json.dumps([tasks["train"]() for _ in range(3)]), flush=True)  # losses
    figures["memory"] = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # MiB
    for line in sys.stdin:
        name, repeats = json.loads(line)
        result = figures[name]() if name in figures else seconds(tasks[name], repeats)
        print(json.dumps(result), flush=True)


def seconds(task: Task, repeats: int) -> float:
    """The median time of a task, after one call that is not timed."""
    task()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        task()
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


if __name__ == "__main__":
    main()
