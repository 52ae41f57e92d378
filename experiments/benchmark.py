"""How fast CapsNet trains and predicts here, beside the same network in PyTorch.

    python -m pip install -e ".[bench]"
    python experiments/benchmark.py

Every variant is a process of its own; they take turns, round by round, so that a machine that slows
down slows all of them. Medians are what counts. Results go to benchmark.json.
"""

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import machine


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Measure the train step and the forward pass; one line a variant."""

    batch_size: int = 128
    """Images a step."""
    routings: int = 3
    """Iterations of routing by agreement."""
    rounds: int = 5
    """Turns that each variant takes."""
    steps: int = 2
    """Steps a turn."""
    save_dir: Path = Path(".")
    """Folder for benchmark.json."""


_WORKER = "--worker"  # the first argument of a process that measures one variant

Task = Callable[[int], float | None]  # steps -> the last loss, if there is one

# name -> (library, dtype, keep freed memory)
VARIANTS = {
    "PyTorch float32": ("torch", "float32", False),
    "PyTorch float32, allocator set": ("torch", "float32", True),
    "PyTorch bfloat16 autocast": ("torch", "bfloat16", True),
    "capsjax float32": ("jax", "float32", True),
    "capsjax bfloat16": ("jax", "bfloat16", True),
}


def main() -> None:
    settings = tyro.cli(Benchmark)
    workers = {name: start(name, settings) for name in VARIANTS}
    results: dict[str, dict[str, Any]] = {name: {"train": [], "forward": []} for name in workers}
    for name, worker in list(workers.items()):
        first = ask(worker)
        if first is None:
            print(f"{name}: cannot run here (python -m pip install -e '.[bench]')")
            del workers[name], results[name]
        else:
            results[name] |= first
    for _ in range(settings.rounds):
        for task in ("train", "forward"):
            for name, worker in workers.items():
                results[name][task].append(ask(worker, task))
    for name, worker in workers.items():
        results[name]["memory"] = ask(worker, "memory")
        worker.communicate()
    report(results, settings)


def start(name: str, settings: Benchmark) -> subprocess.Popen:
    sizes = (str(settings.batch_size), str(settings.routings), str(settings.steps))
    command = [sys.executable, __file__, _WORKER, name, *sizes]
    on_cpu = os.environ | {"JAX_PLATFORMS": "cpu"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=on_cpu)


def ask(worker: subprocess.Popen, task: str | None = None) -> Any:
    """Has a worker do a task; None if it died."""
    if task is not None:
        print(task, file=worker.stdin, flush=True)
    assert worker.stdout is not None
    line = worker.stdout.readline()
    return json.loads(line) if line else None


def work(settings: Benchmark, library: str, dtype: str, keep_memory: bool) -> None:
    """The life of a worker: builds its variant, then does what each line of its input says."""
    if keep_memory:
        machine.keep_freed_memory()
    begin = time.perf_counter()
    build = {"jax": jax_variant, "torch": torch_variant}[library]
    tasks = build(settings, dtype)
    losses = tasks["train"](1)
    print(json.dumps({"loss": losses, "start": time.perf_counter() - begin}), flush=True)
    tasks["forward"](1)
    for line in sys.stdin:
        task = line.strip()
        if task == "memory":
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, flush=True)
            continue
        begin = time.perf_counter()
        tasks[task](settings.steps)
        print((time.perf_counter() - begin) / settings.steps, flush=True)


def network(routings: int) -> Any:
    from flax import nnx

    from capsjax.nn import CapsNet

    return CapsNet(routings=routings, rngs=nnx.Rngs(0))


def images(batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    from capsjax import data

    mnist = data.load()
    return mnist.x_train[:batch_size], mnist.y_train[:batch_size]


def jax_variant(settings: Benchmark, dtype: str) -> dict[str, Task]:
    import jax
    import optax

    from capsjax import sharding
    from capsjax.train import Recipe, create, jit_steps

    optimizer = optax.adam(1e-3)
    graphdef, state = create(network(settings.routings), optimizer)
    mesh = sharding.make_mesh(settings.batch_size, 1)
    recipe = Recipe(graphdef, optimizer, lam_recon=0.392, shift_pixels=0, dtype=dtype)
    train_step, eval_step = jit_steps(recipe, mesh)
    x, y = (sharding.replicate(mesh, array) for array in images(settings.batch_size))
    indices, key = np.arange(settings.batch_size, dtype=np.int32), jax.random.key(0)

    def train(steps: int) -> float:
        nonlocal state
        for _ in range(steps):
            state, step = train_step(state, key, x, y, indices)
        jax.block_until_ready(state)
        return float(step.metrics.margin + 0.392 * step.metrics.reconstruction) / len(indices)

    def forward(steps: int) -> None:
        for _ in range(steps):
            jax.block_until_ready(eval_step(state.params, x, y, indices, indices >= 0))

    return {"train": train, "forward": forward}


def torch_variant(settings: Benchmark, dtype: str) -> dict[str, Task]:
    import jax
    import torch
    from flax import nnx

    import torch_capsnet

    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(network(settings.routings))[1]))
    net = torch_capsnet.CapsNet(params, settings.routings)
    low = dtype == "bfloat16"
    pixels, classes = images(settings.batch_size)
    x = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    y = torch.from_numpy(classes).long()
    if low:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)

    def train(steps: int) -> float:
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                lengths, reconstruction = net(x, y)
            value = torch_capsnet.loss(lengths.float(), y, x, reconstruction.float())
            value.backward()
            optimizer.step()
        return value.item()

    def forward(steps: int) -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            for _ in range(steps):
                net(x)

    return {"train": train, "forward": forward}


def report(results: dict[str, dict[str, Any]], settings: Benchmark) -> None:
    """Prints the table, and saves it."""
    rows = []
    for name, result in results.items():
        row = {"variant": name, "first_loss": result["loss"], "memory_MiB": result["memory"]}
        for task in ("train", "forward"):
            row[f"{task}_ms"] = 1e3 * statistics.median(result[task])
            row[f"{task}_images_per_second"] = settings.batch_size / row[f"{task}_ms"] * 1e3
        rows.append(row)
    print(f"{'':32}{'loss 1':>9}{'train ms':>10}{'× ':>7}{'forward ms':>12}{'× ':>7}{'MiB':>7}")
    for row in rows:
        ratios = [rows[0][f"{task}_ms"] / row[f"{task}_ms"] for task in ("train", "forward")]
        print(
            f"{row['variant']:32}{row['first_loss']:9.5f}{row['train_ms']:10.0f}{ratios[0]:6.2f}×"
            f"{row['forward_ms']:12.0f}{ratios[1]:6.2f}×{row['memory_MiB']:7.0f}"
        )
    settings.save_dir.mkdir(parents=True, exist_ok=True)
    path = settings.save_dir / "benchmark.json"
    content = {"batch_size": settings.batch_size, "routings": settings.routings, "rows": rows}
    path.write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == [_WORKER]:
        name, batch_size, routings, steps = sys.argv[2:]
        sizes = Benchmark(int(batch_size), int(routings), steps=int(steps))
        work(sizes, *VARIANTS[name])
    else:
        main()
