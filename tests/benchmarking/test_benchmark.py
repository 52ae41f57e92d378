"""The benchmark runs, with PyTorch and without, and times nothing that computes something else."""

import dataclasses
import importlib.util
import json
import os

import numpy as np
import pytest

import benchmark
from benchmarking import picture, routings, tables, whole
from benchmarking.capsjax_tasks import write_inputs
from benchmarking.contender import Contender
from benchmarking.start import measure_start
from benchmarking.whole import measure_whole, run_measured
from data_files import digits, write_npz

SHORT = benchmark.Benchmark(batch_size=2, rounds=1, steps=1)
TORCH = importlib.util.find_spec("torch") is not None
NEEDS_TORCH = pytest.mark.skipif(not TORCH, reason="needs PyTorch, the extra bench")


@pytest.mark.slow
def test_contenders_take_turns_and_a_missing_library_is_named(capsys, inputs):
    contenders = {
        benchmark.PYTORCH: Contender("torch", batch_size=2),
        benchmark.CAPSJAX: Contender("capsjax", batch_size=2),
        "bfloat16": Contender("capsjax", "bfloat16", batch_size=2),
    }
    results = benchmark.compare(contenders, SHORT, inputs)
    assert list(results) == list(contenders)[0 if TORCH else 1 :]
    for name, result in results.items():
        assert len(result["losses"]) == 3
        assert min(result["train"], result["forward"], result["memory"]) > 0
        assert ("compile" in result) == (name != benchmark.PYTORCH)
    tables.show_contest(results)
    out = capsys.readouterr().out
    assert (f"{benchmark.PYTORCH}: cannot run here" in out) == (not TORCH)


@NEEDS_TORCH
@pytest.mark.slow
@pytest.mark.parametrize("network", benchmark.NETWORKS)
def test_each_network_computes_what_it_does_in_pytorch(network, inputs):
    settings = dataclasses.replace(SHORT, batch_size=8)  # two images drift apart in bfloat16
    results = benchmark.time_network(network, settings, inputs)  # stops if the losses differ
    assert list(results) == list(benchmark.NETWORKS[network])


@pytest.mark.slow
def test_every_stage_is_timed_and_drawn(capsys, tmp_path, inputs):
    stages = benchmark.time_stages(SHORT, inputs)
    assert all(stage["capsjax"] > 0 for stage in stages.values())
    tables.show_stages(stages)
    assert len(capsys.readouterr().out.splitlines()) == 3 + len(stages) - 2
    contest = {benchmark.CAPSJAX: {"batch": 2, "train": 0.1, "forward": 0.05}}
    picture.draw_results(contest, stages).savefig(tmp_path / "benchmark.png")
    json.dumps(stages)


@pytest.mark.slow
def test_every_routing_is_timed_in_both_forms(capsys, monkeypatch):
    monkeypatch.setattr(routings, "keep_freed_memory", lambda: None)  # this process keeps its own
    results = benchmark.compare_routings(dataclasses.replace(SHORT, batch_size=32))
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(results)
    for name, (never_made, made) in results.items():
        assert min(never_made["seconds"], made["seconds"]) > 0
        assert 0 < never_made["memory"] < made["memory"], name
    json.dumps(results)


@pytest.mark.slow
def test_the_second_start_finds_the_compiled_step():
    seconds = measure_start()
    assert list(seconds) == ["first start", "second start"]
    assert min(seconds.values()) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("library", ["capsjax", pytest.param("torch", marks=NEEDS_TORCH)])
def test_a_whole_process_is_measured_from_outside(library, tmp_path, monkeypatch):
    inputs = tmp_path / "inputs.npz"
    write_inputs(inputs, 64)
    # Fewer test images than MNIST has.
    if library == "capsjax":
        flags = ["--data-dir", str(write_npz(tmp_path / "digits.npz", digits(train=64)))]
        make = whole._make_command
        monkeypatch.setattr(whole, "_make_command", lambda *a: [*make(*a), *flags])
    else:
        arrays = dict(np.load(inputs))
        few = {name: arrays[name][:100] for name in ("x_test", "y_test")}
        write_npz(inputs, arrays | few)
    result = measure_whole(Contender(library, batch_size=32), inputs, (32, 64))
    assert result.seconds > 1
    assert result.memory > 300
    tables.show_whole({library: result._asdict()}, (32, 64))


def test_the_peak_is_that_of_the_process_and_not_of_the_one_that_starts_it(tmp_path):
    held = np.ones(2**26)  # 512 MiB
    lines = "import time; held = b'x' * (200 * 2**20); time.sleep(0.3)"
    seconds, peak = run_measured(["-c", lines], tmp_path, os.environ)
    assert seconds > 0.3
    assert 200 < peak < 300 < held.nbytes / 2**20


@pytest.mark.slow
def test_a_whole_process_that_fails_is_named(tmp_path):
    contender = Contender("capsjax", batch_size=16)
    with pytest.raises(SystemExit, match=r"mnist.py .*--train-size 8 .* ended with status 2"):
        measure_whole(contender, tmp_path / "inputs.npz", (8, 16))


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
