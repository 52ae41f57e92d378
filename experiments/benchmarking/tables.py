"""The benchmark's tables."""

from collections.abc import Mapping
from typing import Any

from benchmarking.chips import Chip
from benchmarking.compiled import Program
from benchmarking.routings import Cost
from benchmarking.stages import COPY, PEAKS, PRODUCT, count_step

Results = Mapping[str, Mapping[str, Any]]


def show_contest(results: Results) -> None:
    """Prints a line for each contender; × is the speed as a multiple of the first line's."""
    print(f"\n{'':45}{'loss':>8}{'train':>9}{'':>7}{'forward':>10}{'':>7}{'memory':>10}")
    base = next(iter(results.values()))
    for name, result in results.items():
        train, forward = (base[task] / result[task] for task in ("train", "forward"))
        print(
            f"{name:45}{result['losses'][0]:8.5f}{1e3 * result['train']:6.0f} ms{train:6.1f}×"
            f"{1e3 * result['forward']:7.0f} ms{forward:6.1f}×{result['memory']:6.0f} MiB"
        )


def show_growth(results: Results) -> None:
    """Prints what more routings cost."""
    few, many = (result["train"] for result in results.values())
    print(
        f"\nroutings 3 -> 10: {1e3 * few:.0f} -> {1e3 * many:.0f} ms a step, {many / few - 1:+.0%}"
    )


def show_routings(results: Mapping[str, tuple[Cost, Cost]]) -> None:
    """Prints what each routing takes without the array of votes, beside what it takes with it."""
    print(
        "\nclass capsules of CapsNet with gradients; temporaries; the same with an array of votes"
    )
    for name, (ours, made) in results.items():
        print(
            f"{name:27}{1e3 * ours.seconds:6.0f} ms{ours.memory:6.0f} MiB"
            f"{1e3 * made.seconds:8.0f} ms{made.memory:6.0f} MiB"
            f"{made.seconds / ours.seconds:7.1f}×{made.memory / ours.memory:6.1f}×"
        )


def show_sizes(results: Results) -> None:
    """Prints the speed at each batch size."""
    print("\nbatch size    " + "".join(f"{size:>8}" for size in results))
    speeds = [result["batch"] / result["train"] for result in results.values()]
    print("images/s      " + "".join(f"{speed:8.0f}" for speed in speeds))
    print("of the best   " + "".join(f"{speed / max(speeds):8.0%}" for speed in speeds))


def show_stages(results: Mapping[str, Mapping[str, float]]) -> None:
    """Prints a line for each stage, with the milliseconds that the peaks alone would take.

    Rates count the direct algorithm, so a fast one may exceed the peak.
    """
    flops = results[PRODUCT]["flop"] / results[PRODUCT]["capsjax"]
    bandwidth = results[COPY]["bytes"] / results[COPY]["capsjax"]
    print(f"\npeaks: {flops / 1e9:.0f} GFLOP/s (product), {bandwidth / 1e9:.1f} GB/s (copy)")
    print(f"{'stage':40}{'ms':>7}{'PyTorch':>9}{'GFLOP/s':>9}{'GB/s':>7}{'floors, ms':>16}")
    for name, result in results.items():
        if name not in PEAKS:
            print(f"{name:40}{_format_stage(result, flops, bandwidth)}")


def _format_stage(result: Mapping[str, float], flops: float, bandwidth: float) -> str:
    seconds = result["capsjax"]
    torch = f"{1e3 * result['torch']:9.1f}" if "torch" in result else f"{'-':>9}"
    return (
        f"{1e3 * seconds:7.1f}{torch}{result['flop'] / seconds / 1e9:9.0f}"
        f"{result['bytes'] / seconds / 1e9:7.1f}"
        f"{1e3 * result['flop'] / flops:9.1f}{1e3 * result['bytes'] / bandwidth:7.1f}"
    )


def show_whole(results: Results, sizes: tuple[int, int]) -> None:
    """Prints what whole processes take, seen from outside."""
    few, many = sizes
    print(f"\nwhole processes that train on {few} and on {many} images, evaluate once and save;")
    print("ours, mnist.py, also shifts the images, keeps checkpoints and draws pictures")
    print(f"{'':45}{'peak memory':>13}{f'{few} images':>14}{'images/s':>10}")
    for name, result in results.items():
        print(
            f"{name:45}{result['memory']:9.0f} MiB{result['seconds']:12.1f} s"
            f"{result['images_per_second']:10.0f}"
        )


def show_compiled(
    chip: Chip, name: str, chips: int, batch: int, programs: Mapping[str, Program]
) -> None:
    """Prints what the compiler makes of a train step, beside what its stages take directly."""
    print(f"train step of {batch} images, compiled for {chips} × {name}, never run; each chip:")
    print(
        f"\n{'':19}{'GFLOP':>7}{'moved':>10}{'temporaries':>13}{'kernels':>9}{'exchanged':>11}"
        f"{'images/s, predicted':>21}"
    )
    for dtype, program in programs.items():
        flop, moved = count_step(batch // chips, dtype)
        speed = batch / predict_seconds(chip, dtype, chips, program)
        print(f"{dtype + ', directly':19}{flop / 1e9:7.0f}{moved / 1e9:7.2f} GB")
        print(
            f"{dtype:19}{program.flop / 1e9:7.0f}{program.bytes / 1e9:7.2f} GB"
            f"{program.temporaries / 2**20:9.0f} MiB{program.kernels:9}"
            f"{program.exchanged / 1e6:8.1f} MB{speed:21,.0f}"
        )
    print(
        "\nGFLOP: of the convolutions on a GPU, of everything on a TPU. Predicted from these: the\n"
        "longer of arithmetic and memory, then the exchange, at the rates that the chip's maker\n"
        f"publishes: {chip.bandwidth / 1e9:,.0f} GB/s of memory, "
        f"{chip.link / 1e9:.0f} GB/s between chips, and\n"
        + ", ".join(f"{rate / 1e12:.0f} TFLOP/s in {dtype}" for dtype, rate in chip.flops.items())
    )


def predict_seconds(chip: Chip, dtype: str, chips: int, program: Program) -> float:
    """Estimates the seconds of a step at the chip's published rates.

    t = max(flop / rate, bytes / bandwidth) + 2 (n − 1) / n · exchanged / link

    A ring of n chips that adds up an array sends 2 (n − 1) / n of it from each.
    """
    compute = max(program.flop / chip.flops[dtype], program.bytes / chip.bandwidth)
    return compute + 2 * (chips - 1) / chips * program.exchanged / chip.link
