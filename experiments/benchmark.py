"""Times CapsNet's training and prediction on this machine's CPU, beside the same in PyTorch.

With --compile-for it shows what the compiler makes of the train step for a GPU or a TPU instead.

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
from typing import Any, Literal

import tyro

from benchmarking.capsjax_tasks import write_inputs
from benchmarking.chips import CHIPS, make_mesh_of
from benchmarking.compiled import inspect_step
from benchmarking.contender import Contender, Worker
from benchmarking.picture import draw_results
from benchmarking.routings import time_routings
from benchmarking.stages import count_costs
from benchmarking.start import measure_start
from benchmarking.tables import (
    show_compiled,
    show_contest,
    show_growth,
    show_routings,
    show_sizes,
    show_stages,
    show_whole,
)
from benchmarking.whole import measure_whole
from capsjax.run.folder import find_processor
from capsjax.run.pictures import write

PYTORCH, CAPSJAX = "PyTorch float32", "capsjax float32"
# PyTorch with its defaults, then what was found to make it faster. The allocator is set as
# capsjax.run sets it, for both libraries, unless the name says otherwise.
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

# Other networks have few of them: as it comes, and with all that made CapsNet faster. Matrix
# capsules are routed in float32 whatever their poses are.
BOTH = (PYTORCH, "PyTorch bfloat16, allocator set, rewritten", CAPSJAX, "capsjax bfloat16")
FLOAT32 = (PYTORCH, "PyTorch float32, allocator set, rewritten", CAPSJAX)
NETWORKS = {"efficient": BOTH, "matrix": FLOAT32, "cnn": BOTH}

SIZES = (16, 32, 64, 128, 256, 512)

# Of these the whole process is measured, too: training on so many images, evaluating, saving.
WHOLE = BOTH
WHOLE_SIZES = (2560, 10240)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Measures train step, forward pass, stages, start and whole runs, in about 20 minutes.

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
    network: Literal["efficient", "matrix", "cnn"] | None = None
    """Only time this network's step, beside the same network in PyTorch."""
    routings: bool = False
    """Only time every routing, with votes that are never made and with an array of votes."""
    compile_for: Literal["h100", "v5e", "v5e:2x2", "v5e:4x4"] | None = None
    """Only compile the train step for chips that need not be here, and show its cost."""


def main() -> None:
    """Measures what the command line asks for, prints it and saves it."""
    settings = tyro.cli(Benchmark)
    if settings.compile_for is not None:
        compile_for(settings.compile_for, settings.batch_size)
        return
    os.environ["JAX_PLATFORMS"] = "cpu"  # PyTorch's part runs there, too
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # compilations are timed
    if settings.routings:
        compare_routings(settings)
        return
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.npz"
        write_inputs(inputs, max(settings.batch_size, *SIZES, *WHOLE_SIZES))
        if settings.network is not None:
            time_network(settings.network, settings, inputs)
            return
        results = measure(settings, inputs)
    save(results, settings.save_dir)


def compile_for(chips: str, batch: int) -> None:
    """Compiles the train step for one chip or several, and prints what the compiler made of it.

    Raises:
      SystemExit: if their compiler is missing, or they do not divide the batch.
    """
    name, *topology = chips.split(":")
    mesh = make_mesh_of(name, *topology)
    if batch % mesh.size:
        raise SystemExit(f"--batch-size {batch}: {mesh.size} chips do not divide it evenly")
    programs = {dtype: inspect_step(mesh, dtype, batch) for dtype in ("float32", "bfloat16")}
    kind = mesh.devices.flat[0].device_kind
    show_compiled(CHIPS[name], kind, mesh.size, batch, programs)


def measure(settings: Benchmark, inputs: Path) -> dict[str, Any]:
    """Measures everything, and prints each table as soon as it is complete."""
    results: dict[str, Any] = {"environment": describe_environment()}
    results |= dataclasses.asdict(settings) | {"save_dir": str(settings.save_dir)}
    sized = {
        name: dataclasses.replace(contender, batch_size=settings.batch_size)
        for name, contender in CONTENDERS.items()
    }
    results["contest"] = compare(sized, settings, inputs)
    show_contest(results["contest"])
    print(f"the step of {CAPSJAX} compiles in {results['contest'][CAPSJAX]['compile']:.1f} s")
    ours = sized[CAPSJAX]
    results["networks"] = {n: time_network(n, settings, inputs) for n in NETWORKS}
    more = {f"{n} routings": dataclasses.replace(ours, routings=n) for n in (3, 10)}
    results["routings"] = compare(more, settings, inputs, ("train",))
    show_growth(results["routings"])
    sizes = {str(n): dataclasses.replace(ours, batch_size=n) for n in SIZES}
    results["batch_sizes"] = compare(sizes, settings, inputs, ("train",))
    show_sizes(results["batch_sizes"])
    results["votes"] = compare_routings(settings)
    results["stages"] = time_stages(settings, inputs)
    show_stages(results["stages"])
    results["start"] = measure_start()
    for which, seconds in results["start"].items():
        print(f"{which}: {seconds:.1f} s from the command to the first step of mnist.py")
    results["whole"] = {
        name: measure_whole(sized[name], inputs, WHOLE_SIZES)._asdict()
        for name in WHOLE
        if name in results["contest"]
    }
    show_whole(results["whole"], WHOLE_SIZES)
    return results


def time_network(network: str, settings: Benchmark, inputs: Path) -> dict[str, dict[str, Any]]:
    """Times a network's step beside the same network in PyTorch, and prints the table."""
    sized = {
        name: dataclasses.replace(CONTENDERS[name], network=network, batch_size=settings.batch_size)
        for name in NETWORKS[network]
    }
    print(f"\n{network}")
    results = compare(sized, settings, inputs)
    show_contest(results)
    return results


def compare_routings(settings: Benchmark) -> dict[str, Any]:
    """Times every routing in both forms, and prints the table."""
    results = time_routings(settings.batch_size, settings.rounds, settings.steps)
    show_routings(results)
    return {name: [cost._asdict() for cost in costs] for name, costs in results.items()}


def save(results: Mapping[str, Any], folder: Path) -> None:
    """Writes the results as JSON and as a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_text(json.dumps(results, indent=2))
    write(draw_results(results["contest"], results["stages"]), folder / "benchmark.png")
    print(f"\n{folder / 'benchmark.json'}, benchmark.png")


def describe_environment() -> dict[str, Any]:
    """Returns versions and processor."""
    packages = ("jax", "numpy", "torch")
    found = {dist.name for dist in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in packages if name in found}
    machine = {"cores": os.cpu_count(), "processor": find_processor()}
    return {"python": platform.python_version(), **versions, **machine}


def compare(
    contenders: Mapping[str, Contender],
    settings: Benchmark,
    inputs: Path,
    tasks: tuple[str, ...] = ("train", "forward"),
) -> dict[str, dict[str, Any]]:
    """Returns medians of each contender's turns, without those that cannot run here.

    Raises:
      SystemExit: if capsjax cannot run, or a contender computes something else.
    """
    workers = _start_workers(contenders, inputs)
    results = {
        name: {"losses": worker.first, "batch": contenders[name].batch_size}
        for name, worker in workers.items()
    }
    check_losses(results, contenders)
    for task in tasks:
        for name, seconds in _take_turns(workers, task, settings).items():
            results[name][task] = seconds
        if task == "train":  # before the forward pass adds to it
            for name, worker in workers.items():
                results[name]["memory"] = worker.ask("memory")
    for name, worker in workers.items():
        if contenders[name].library == "capsjax":
            results[name]["compile"] = worker.ask("compile")
        worker.close()
    return results


def _start_workers(contenders: Mapping[str, Contender], inputs: Path) -> dict[str, Worker]:
    """Starts all contenders one after the other; names those that cannot run here."""
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
    return workers


def _take_turns(workers: Mapping[str, Worker], task: str, settings: Benchmark) -> dict[str, float]:
    """Returns the median seconds of each worker's turns."""
    turns: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(settings.rounds):
        for name, worker in workers.items():
            turns[name].append(worker.ask(task, settings.steps))
    return {name: statistics.median(times) for name, times in turns.items()}


def check_losses(results: Mapping[str, Any], contenders: Mapping[str, Contender]) -> None:
    """Compares the losses of three steps, each of which starts from the one before.

    Raises:
      SystemExit: if a contender computes something else than the first of the same problem.
    """
    references: dict[tuple[int, int], list[float]] = {}
    for name, result in results.items():
        contender = contenders[name]
        problem = contender.batch_size, contender.routings
        reference = references.setdefault(problem, result["losses"])
        tolerance = 1e-3 if contender.dtype == "float32" else 2e-2
        for ours, theirs in zip(result["losses"], reference, strict=True):
            if not abs(ours - theirs) <= tolerance * theirs:  # also if it is no number
                raise SystemExit(f"{name} computes something else: losses {result['losses']}")


def time_stages(settings: Benchmark, inputs: Path) -> dict[str, dict[str, float]]:
    """Returns the seconds of each stage in both libraries, beside its cost."""
    workers = {
        library: Worker(Contender(library, batch_size=settings.batch_size, stages=True), inputs)
        for library in ("capsjax", "torch")
    }
    costs = count_costs(settings.batch_size)
    results: dict[str, dict[str, float]] = {name: cost._asdict() for name, cost in costs.items()}
    for library, worker in workers.items():
        for name in worker.first or ():
            results[name][library] = statistics.median(
                worker.ask(name, settings.steps) for _ in range(settings.rounds)
            )
        worker.close()
    return results


if __name__ == "__main__":
    main()
