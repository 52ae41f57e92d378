"""How fast CapsNet trains and predicts on this machine's CPU, beside the same network in PyTorch.

python -m pip install -e ".[bench]" && python experiments/benchmark.py
"""

import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro

import benchmark_stages
import benchmark_start
from benchmark_picture import draw
from benchmark_worker import Contender, Worker
from pictures import write

PYTORCH, CAPSJAX = "PyTorch float32", "capsjax float32"
# PyTorch as it comes, and what was found to make it faster.
PEERS = {
    PYTORCH: Contender("torch", keep_memory=False),
    "PyTorch float32, allocator set": Contender("torch"),
    "PyTorch bfloat16, channels last, allocator set": Contender("torch", "bfloat16"),
    "PyTorch bfloat16, compiled, allocator set": Contender("torch", "bfloat16", compiled=True),
}
OURS = {CAPSJAX: Contender("capsjax"), "capsjax bfloat16": Contender("capsjax", "bfloat16")}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Measures train step, forward pass, stages and start; a benchmark of a few minutes.

    Every contender is a process of its own. They take turns, round by round, so that a machine that
    slows down slows all of them; medians count.
    """

    batch_size: int = 128
    """Images a step."""
    rounds: int = 5
    """Turns that each contender takes."""
    steps: int = 3
    """Steps a turn, after one that is not timed."""
    save_dir: Path = Path("runs/benchmark")
    """Folder for benchmark.json and benchmark.png."""


def main() -> None:
    settings = tyro.cli(Benchmark)
    os.environ["JAX_PLATFORMS"] = "cpu"  # PyTorch's part runs there, too
    sized = {n: dataclasses.replace(c, batch_size=settings.batch_size) for n, c in PEERS.items()}
    ours = {n: dataclasses.replace(c, batch_size=settings.batch_size) for n, c in OURS.items()}
    results: dict[str, Any] = {"machine": machine(), **dataclasses.asdict(settings)}
    results["save_dir"] = str(settings.save_dir)
    results["steps_and_forward"] = contest(sized | ours, settings)
    show_contest(results["steps_and_forward"])
    results["routings"] = contest(
        {f"routings {n}": dataclasses.replace(ours[CAPSJAX], routings=n) for n in (3, 10)},
        settings,
        ("train",),
    )
    show_growth(results["routings"])
    results["batch_sizes"] = contest(
        {
            str(size): dataclasses.replace(ours[CAPSJAX], batch_size=size)
            for size in (16, 32, 64, 128, 256, 512)
        },
        settings,
        ("train",),
    )
    show_sizes(results["batch_sizes"])
    results["stages"] = stages(settings)
    show_stages(results["stages"])
    results["start"] = benchmark_start.measure()
    compile_seconds = results["steps_and_forward"][CAPSJAX]["compile"]
    print("\nfrom the command to the first step, experiments/mnist.py, batch 100")
    for which, seconds in results["start"].items():
        print(f"  {which:24}{seconds:6.1f} s")
    print(f"  the step's compilation {compile_seconds:7.1f} s of the first start")
    settings.save_dir.mkdir(parents=True, exist_ok=True)
    path = settings.save_dir / "benchmark.json"
    path.write_text(json.dumps(results, indent=2))
    write(draw(results["steps_and_forward"], results["stages"]), path.with_suffix(".png"))
    print(f"\n{path}, {path.with_suffix('.png').name}")


def machine() -> dict[str, Any]:
    """Versions and processor; the library's are those of this environment."""
    import jax

    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "system": platform.platform(),
    }


def contest(
    contenders: Mapping[str, Contender],
    settings: Benchmark,
    tasks: tuple[str, ...] = ("train", "forward"),
) -> dict[str, dict[str, Any]]:
    """Medians of each contender's turns; those that cannot run here are left out, and named."""
    workers = {name: Worker(contender) for name, contender in contenders.items()}
    results: dict[str, dict[str, Any]] = {}
    for name, worker in workers.items():
        if worker.first is None:
            print(f"{name}: cannot run here (python -m pip install -e '.[bench]')")
        else:
            results[name] = {"losses": worker.first, "batch": contenders[name].batch_size}
    check_losses(results, contenders)
    for task in tasks:
        turns: dict[str, list[float]] = {name: [] for name in results}
        for _ in range(settings.rounds):
            for name in results:
                turns[name].append(workers[name].ask(task, settings.steps))
        for name, times in turns.items():
            results[name][task] = statistics.median(times)
        if task == "train":  # before the forward pass adds to it
            for name, result in results.items():
                result["memory"] = workers[name].ask("memory")
    for name, result in results.items():
        if contenders[name].library == "capsjax":
            result["compile"] = workers[name].ask("compile")
    for worker in workers.values():
        worker.close()
    return results


def check_losses(results: Mapping[str, Any], contenders: Mapping[str, Contender]) -> None:
    """Refuses to time what does not compute the same: losses of three steps, each from the last."""
    for name, result in results.items():
        same = [c for n, c in contenders.items() if n in results]
        reference = results[next(iter(results))]["losses"]
        tolerance = 1e-3 if contenders[name].dtype == "float32" else 2e-2
        alike = len({(c.batch_size, c.routings) for c in same}) == 1
        if alike and any(
            abs(ours - theirs) > tolerance * theirs
            for ours, theirs in zip(result["losses"], reference, strict=True)
        ):
            raise SystemExit(f"{name} computes something else: losses {result['losses']}")


def stages(settings: Benchmark) -> dict[str, dict[str, float]]:
    """Milliseconds of each stage in both libraries, with what it must cost."""
    workers = {
        library: Worker(Contender(library, batch_size=settings.batch_size, stages=True))
        for library in ("capsjax", "torch")
    }
    costs = benchmark_stages.costs(settings.batch_size)
    results: dict[str, dict[str, float]] = {name: cost._asdict() for name, cost in costs.items()}
    for library, worker in workers.items():
        for name in worker.first or ():
            results[name][library] = statistics.median(
                worker.ask(name, settings.steps) for _ in range(settings.rounds)
            )
        worker.close()
    return results


def show_contest(results: Mapping[str, Mapping[str, Any]]) -> None:
    print(f"\n{'':48}{'loss':>8}{'train':>9}{'':>8}{'forward':>10}{'':>8}{'memory':>10}")
    base = results.get(PYTORCH) or results[CAPSJAX]
    for name, result in results.items():
        train, forward = (base[task] / result[task] for task in ("train", "forward"))
        print(
            f"{name:48}{result['losses'][0]:8.5f}{1e3 * result['train']:6.0f} ms{train:7.2f}×"
            f"{1e3 * result['forward']:7.0f} ms{forward:7.2f}×{result['memory']:6.0f} MiB"
        )


def show_growth(results: Mapping[str, Mapping[str, Any]]) -> None:
    few, many = (result["train"] for result in results.values())
    print(
        f"\nroutings 3 -> 10: {1e3 * few:.0f} -> {1e3 * many:.0f} ms a step, {many / few - 1:+.0%}"
    )


def show_sizes(results: Mapping[str, Mapping[str, Any]]) -> None:
    print("\nbatch size    " + "".join(f"{size:>8}" for size in results))
    speeds = [result["batch"] / result["train"] for result in results.values()]
    print("images/s      " + "".join(f"{speed:8.0f}" for speed in speeds))
    print("of the best   " + "".join(f"{speed / max(speeds):8.0%}" for speed in speeds))


def show_stages(results: Mapping[str, Mapping[str, float]]) -> None:
    """A line a stage; rates count the direct algorithm, so a fast one may pass the peak."""
    flops = results["matrix product"]["flop"] / results["matrix product"]["capsjax"]
    bandwidth = results["copy"]["bytes"] / results["copy"]["capsjax"]
    print(f"\npeaks: {flops / 1e9:.0f} GFLOP/s (product), {bandwidth / 1e9:.1f} GB/s (copy)")
    print(f"{'stage':40}{'ms':>7}{'PyTorch':>9}{'GFLOP/s':>9}{'GB/s':>7}{'floors, ms':>16}")
    for name, r in results.items():
        if name in ("matrix product", "copy"):
            continue
        torch = f"{1e3 * r['torch']:9.1f}" if "torch" in r else f"{'-':>9}"
        print(
            f"{name:40}{1e3 * r['capsjax']:7.1f}{torch}{r['flop'] / r['capsjax'] / 1e9:9.0f}"
            f"{r['bytes'] / r['capsjax'] / 1e9:7.1f}"
            f"{1e3 * r['flop'] / flops:9.1f}{1e3 * r['bytes'] / bandwidth:7.1f}"
        )


if __name__ == "__main__":
    main()
