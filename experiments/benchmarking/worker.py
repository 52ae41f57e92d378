"""A process that measures one thing when it is told to; `benchmark.py` starts several.

Tasks come as lines of its input, results go out as lines of JSON. Images and first parameters come
from a file, so that a process of PyTorch does not hold JAX, too.
"""

import dataclasses
import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import allocator

_NOT_INSTALLED = 3  # exit status

Task = Callable[[], Any]
Inputs = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Contender:
    """What a process measures."""

    library: str  # "capsjax" or "torch"
    dtype: str = "float32"
    keep_memory: bool = True  # freed memory is treated as experiments/mnist.py does
    channels_last: bool = False
    compiled: bool = False  # torch.compile
    rewritten: bool = False  # an einsum for the predictions, a fused Adam
    batch_size: int = 128
    routings: int = 3
    stages: bool = False  # the parts of a step instead of the step


class Worker:
    """A contender's process, seen from outside."""

    def __init__(self, contender: Contender, inputs: Path):
        self._contender, pipe = contender, subprocess.PIPE
        command = [sys.executable, __file__, json.dumps(dataclasses.asdict(contender)), str(inputs)]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        line = self._process.stdout.readline() if self._process.stdout else ""
        self.first = json.loads(line) if line else None  # None if it could not start
        if not line:
            self.close()
        self.installed = self._process.returncode != _NOT_INSTALLED

    def ask(self, task: str, repeats: int = 1) -> Any:
        """A figure, or the seconds that a task takes, the median of `repeats` after one untimed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps([task, repeats]), file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())
        except (BrokenPipeError, ValueError) as error:
            status = self._process.wait()
            raise SystemExit(
                f"{self._contender} ended in the middle of {task}, status {status}: see above"
            ) from error

    def close(self) -> None:
        self._process.communicate()


def write_inputs(path: Path, images: int) -> None:
    """The same images and first parameters for all."""
    from flax import nnx

    from capsjax import data
    from capsjax._trees import named_leaves

    params = nnx.to_pure_dict(nnx.split(network())[1])
    mnist = data.load()
    arrays: dict[str, Any] = {"x": mnist.x_train[:images], "y": mnist.y_train[:images]}
    np.savez(path, **arrays, **dict(named_leaves(params)))


def network(routings: int = 3) -> Any:
    from flax import nnx

    from capsjax.nn import CapsNet

    return CapsNet(routings=routings, rngs=nnx.Rngs(0))


def capsjax_tasks(contender: Contender, inputs: Inputs) -> tuple[dict[str, Task], dict[str, Task]]:
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
    x, y = (sharding.replicate(mesh, inputs[n][: contender.batch_size]) for n in ("x", "y"))
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


def torch_tasks(contender: Contender, inputs: Inputs) -> tuple[dict[str, Task], dict[str, Task]]:
    """The same of the network in PyTorch."""
    import torch

    import torch_capsnet

    net: Any = torch_capsnet.CapsNet(inputs, contender.routings, contender.rewritten)
    low = contender.dtype == "bfloat16"
    pixels = inputs["x"][: contender.batch_size].transpose(0, 3, 1, 2).astype(np.float32) / 255
    x, y = torch.from_numpy(pixels), torch.from_numpy(inputs["y"][: contender.batch_size]).long()
    if contender.channels_last:
        net = net.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=contender.rewritten or None)
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
    if contender.library == "torch" and importlib.util.find_spec("torch") is None:
        raise SystemExit(_NOT_INSTALLED)
    with np.load(sys.argv[2]) as file:
        inputs = dict(file)
    if contender.keep_memory:
        allocator.keep_freed_memory()
    figures: dict[str, Task] = {}
    if contender.stages:
        import benchmark_stages

        tasks = benchmark_stages.TASKS[contender.library](inputs, contender.batch_size)
        print(json.dumps(list(tasks)), flush=True)
    else:
        build = {"capsjax": capsjax_tasks, "torch": torch_tasks}[contender.library]
        tasks, figures = build(contender, inputs)
        losses = [tasks["train"]()]
        if contender.keep_memory:
            allocator.give_back_freed_memory()
        losses += [tasks["train"]() for _ in range(2)]
        print(json.dumps(losses), flush=True)
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
