"""The benchmark runs, with PyTorch and without, and times nothing that computes something else."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import benchmark
import benchmark_picture
import benchmark_stages
import benchmark_start
from benchmark_worker import Contender

SHORT = benchmark.Benchmark(batch_size=2, rounds=1, steps=1)
TORCH = importlib.util.find_spec("torch") is not None


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "inputs.npz"
    benchmark.write_inputs(path, 2)
    return path


@pytest.mark.slow
def test_contenders_take_turns_and_a_missing_library_is_named(capsys, inputs):
    contenders = {
        benchmark.PYTORCH: Contender("torch", batch_size=2),
        benchmark.CAPSJAX: Contender("capsjax", batch_size=2),
        "bfloat16": Contender("capsjax", "bfloat16", batch_size=2),
    }
    results = benchmark.contest(contenders, SHORT, inputs)
    assert list(results) == list(contenders)[0 if TORCH else 1 :]
    for name, result in results.items():
        assert len(result["losses"]) == 3
        assert min(result["train"], result["forward"], result["memory"]) > 0
        assert ("compile" in result) == (name != benchmark.PYTORCH)
    benchmark.show_contest(results)
    out = capsys.readouterr().out
    assert (f"{benchmark.PYTORCH}: cannot run here" in out) == (not TORCH)


@pytest.mark.slow
def test_every_stage_is_timed_and_drawn(capsys, tmp_path, inputs):
    stages = benchmark.stages(SHORT, inputs)
    assert all(stage["capsjax"] > 0 for stage in stages.values())
    benchmark.show_stages(stages)
    assert len(capsys.readouterr().out.splitlines()) == 3 + len(stages) - 2
    contest = {benchmark.CAPSJAX: {"batch": 2, "train": 0.1, "forward": 0.05}}
    benchmark_picture.draw(contest, stages).savefig(tmp_path / "benchmark.png")
    json.dumps(stages)


@pytest.mark.slow
def test_the_second_start_finds_the_compiled_step():
    seconds = benchmark_start.measure()
    assert list(seconds) == ["first start", "second start"]
    assert min(seconds.values()) > 0.5


def test_losses_that_differ_stop_the_benchmark():
    contenders = {"a": Contender("torch"), "b": Contender("capsjax")}
    same = {"a": {"losses": [0.9, 0.8, 0.7]}, "b": {"losses": [0.9, 0.8, 0.7001]}}
    benchmark.check_losses(same, contenders)
    with pytest.raises(SystemExit, match="b computes something else"):
        benchmark.check_losses(same | {"b": {"losses": [0.9, 0.8, 0.71]}}, contenders)
    with pytest.raises(SystemExit, match="b computes something else"):
        benchmark.check_losses(same | {"b": {"losses": [0.9, 0.8, float("nan")]}}, contenders)


def test_losses_of_other_batch_sizes_are_not_compared():
    contenders = {"a": Contender("capsjax"), "b": Contender("capsjax", batch_size=16)}
    benchmark.check_losses({"a": {"losses": [0.9]}, "b": {"losses": [0.5]}}, contenders)


def flop(function, *shapes) -> float:
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*shapes).cost_analysis()["flops"]


def test_arithmetic_is_counted_as_the_compiler_counts_the_direct_algorithm():
    costs = benchmark_stages.costs(4)

    def conv(stride):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lambda x, w: lax.conv_general_dilated(
            x, w, (stride, stride), "VALID", dimension_numbers=numbers
        )

    first = flop(conv(1), (4, 28, 28, 1), (9, 9, 1, 256))
    second = flop(conv(2), (4, 20, 20, 256), (9, 9, 256, 256))
    assert costs["conv1 forward"].flop == pytest.approx(first, rel=0.01)
    assert costs["conv2 forward"].flop == pytest.approx(second, rel=0.01)
    layers = (4, 160), (160, 512), (512, 1024), (1024, 784)
    decoder = flop(lambda x, a, b, c: x @ a @ b @ c, *layers)
    assert costs["decoder with gradients"].flop == pytest.approx(3 * decoder, rel=0.01)
