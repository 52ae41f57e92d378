"""How fast CapsNet trains and predicts on this machine's CPU, beside the same network in PyTorch.

python -m pip install -e ".[bench]" && python experiments/benchmark.py
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro

import benchmark_stages
import benchmark_start
from benchmark_picture import draw
from benchmark_stages import COPY, PEAKS, PRODUCT
from benchmark_worker import Contender, Worker, write_inputs
from pictures import write

PYTORCH, CAPSJAX = "PyTorch float32", "capsjax float32"
# PyTorch as it comes, then what was found to make it faster; the allocator is set as
# experiments/mnist.py sets it, for both libraries, unless the name says otherwise.
CONTENDERS = {
    PYTORCH: Contender("torch", keep_memory=False),
    "PyTorch float32, allocator set": Contender("torch"),
    "PyTorch bfloat16, allocator set": Contender("torch", "bfloat16", channels_last=True),
    "PyTorch bfloat16, allocator set, compiled": Contender(
        "torch", "bfloat16", channels_last=True, compiled=True
    ),
    "PyTorch float32, allocator set, rewritten": Contender("torch", rewritten=True),
    "PyTorch bfloat16, allocator set, rewritten": Contender(
        "torch", "bfloat16", channels_last=True, rewritten=True
    ),
    "capsjax float32, allocator as it comes": Contender("capsjax", keep_memory=False),
    CAPSJAX: Contender("capsjax"),
    "capsjax bfloat16": Contender("capsjax", "bfloat16"),
}

SIZES = (16, 32, 64, 128, 256, 512)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Measures train step, forward pass, stages and start, in about twelve minutes.

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
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # compilations are timed
    results: dict[str, Any] = {"environment": environment(), **dataclasses.asdict(settings)}
    results["save_dir"] = str(settings.save_dir)
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.npz"
        write_inputs(inputs, max(settings.batch_size, *SIZES))
        sized = {
            name: dataclasses.replace(contender, batch_size=settings.batch_size)
            for name, contender in CONTENDERS.items()
        }
        results["contest"] = contest(sized, settings, inputs)
        show_contest(results["contest"])
        ours = sized[CAPSJAX]
        more = {f"{n} routings": dataclasses.replace(ours, routings=n) for n in (3, 10)}
        results["routings"] = contest(more, settings, inputs, ("train",))
        show_growth(results["routings"])
        sizes = {str(n): dataclasses.replace(ours, batch_size=n) for n in SIZES}
        results["batch_sizes"] = contest(sizes, settings, inputs, ("train",))
        show_sizes(results["batch_sizes"])
        results["stages"] = stages(settings, inputs)
        show_stages(results["stages"])
    results["start"] = benchmark_start.measure()
    for which, seconds in results["start"].items():
        print(f"{which}: {seconds:.1f} s from the command to the first step of mnist.py")
    save(results, settings.save_dir)


def save(results: Mapping[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_text(json.dumps(results, indent=2))
    write(draw(results["contest"], results["stages"]), folder / "benchmark.png")
    print(f"\n{folder / 'benchmark.json'}, benchmark.png")


def environment() -> dict[str, Any]:
    """Versions and processor."""
    packages = ("jax", "numpy", "torch")
    found = {dist.name for dist in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in packages if name in found}
    return {"python": platform.python_version(), **versions, "cores": os.cpu_count()} | _processor()


def _processor() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else []
    return {"processor": next((s.split(":")[1].strip() for s in lines if "model name" in s), "?")}


def contest(
    contenders: Mapping[str, Contender],
    settings: Benchmark,
    inputs: Path,
    tasks: tuple[str, ...] = ("train", "forward"),
) -> dict[str, dict[str, Any]]:
    """Medians of each contender's turns; those that cannot run here are left out, and named."""
    workers = {}
    for name, contender in contenders.items():
        worker = Worker(contender, inputs)
        if worker.first is not None:
            workers[name] = worker
        elif contender.library == "capsjax":
            raise SystemExit(f"{name} ended before its first step: see above")
        else:
            remedy = "see above" if worker.installed else "python -m pip install -e '.[bench]'"
            print(f"{name}: cannot run here ({remedy})")
    results = {
        name: {"losses": worker.first, "batch": contenders[name].batch_size}
        for name, worker in workers.items()
    }
    check_losses(results, contenders)
    for task in tasks:
        turns: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(settings.rounds):
            for name, worker in workers.items():
                turns[name].append(worker.ask(task, settings.steps))
        for name, times in turns.items():
            results[name][task] = statistics.median(times)
        if task == "train":  # before the forward pass adds to it
            for name, worker in workers.items():
                results[name]["memory"] = worker.ask("memory")
    for name, worker in workers.items():
        if contenders[name].library == "capsjax":
            results[name]["compile"] = worker.ask("compile")
        worker.close()
    return results


def check_losses(results: Mapping[str, Any], contenders: Mapping[str, Contender]) -> None:
    """Refuses to time what does not compute the same: losses of three steps, each from the last."""
    references: dict[tuple[int, int], list[float]] = {}
    for name, result in results.items():
        contender = contenders[name]
        problem = contender.batch_size, contender.routings
        reference = references.setdefault(problem, result["losses"])
        tolerance = 1e-3 if contender.dtype == "float32" else 2e-2
        for ours, theirs in zip(result["losses"], reference, strict=True):
            if not abs(ours - theirs) <= tolerance * theirs:  # also if it is no number
                raise SystemExit(f"{name} computes something else: losses {result['losses']}")


def stages(settings: Benchmark, inputs: Path) -> dict[str, dict[str, float]]:
    """Seconds of each stage in both libraries, with what it must cost."""
    workers = {
        library: Worker(Contender(library, batch_size=settings.batch_size, stages=True), inputs)
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
    """A line a contender; × is how much faster than the first line."""
    print(f"\n{'':45}{'loss':>8}{'train':>9}{'':>7}{'forward':>10}{'':>7}{'memory':>10}")
    base = next(iter(results.values()))
    for name, result in results.items():
        train, forward = (base[task] / result[task] for task in ("train", "forward"))
        print(
            f"{name:45}{result['losses'][0]:8.5f}{1e3 * result['train']:6.0f} ms{train:6.1f}×"
            f"{1e3 * result['forward']:7.0f} ms{forward:6.1f}×{result['memory']:6.0f} MiB"
        )
    print(f"the step of {CAPSJAX} compiles in {results[CAPSJAX]['compile']:.1f} s")


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
    flops = results[PRODUCT]["flop"] / results[PRODUCT]["capsjax"]
    bandwidth = results[COPY]["bytes"] / results[COPY]["capsjax"]
    print(f"\npeaks: {flops / 1e9:.0f} GFLOP/s (product), {bandwidth / 1e9:.1f} GB/s (copy)")
    print(f"{'stage':40}{'ms':>7}{'PyTorch':>9}{'GFLOP/s':>9}{'GB/s':>7}{'floors, ms':>16}")
    for name, r in results.items():
        if name in PEAKS:
            continue
        torch = f"{1e3 * r['torch']:9.1f}" if "torch" in r else f"{'-':>9}"
        print(
            f"{name:40}{1e3 * r['capsjax']:7.1f}{torch}{r['flop'] / r['capsjax'] / 1e9:9.0f}"
            f"{r['bytes'] / r['capsjax'] / 1e9:7.1f}"
            f"{1e3 * r['flop'] / flops:9.1f}{1e3 * r['bytes'] / bandwidth:7.1f}"
        )


if __name__ == "__main__":
    main()
