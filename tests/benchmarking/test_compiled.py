"""What a compiled train step costs, read off its text."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import benchmark
from benchmarking import chips
from benchmarking.chips import CHIPS, Chip, make_mesh_of
from benchmarking.compiled import (
    Program,
    count_convolutions,
    count_exchanged,
    count_kernels,
    count_traffic,
)
from benchmarking.stages import PARAMETERS, count_step
from benchmarking.tables import predict_seconds

BENCHMARK = Path(__file__).parents[2] / "experiments" / "benchmark.py"

# Shapes as XLA prints them: images [2, 8, 8, 3], kernel [4, 3, 3, 3], results [2, 6, 6, 4].
PROGRAM = """HloModule step

ENTRY %main {
  %x = bf16[2,8,8,3]{3,2,1,0} parameter(0)
  %w = bf16[4,3,3,3]{3,2,1,0} parameter(1)
  %forward = (bf16[2,6,6,4]{3,2,1,0}, u8[0]{0}) custom-call(%x, %w), window={size=3x3}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %dy = bf16[2,6,6,4]{3,2,1,0} get-tuple-element(%forward), index=0
  %dx = (bf16[2,8,8,3]{3,2,1,0}, u8[0]{0}) custom-call(%dy, %w), window={size=3x3}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %dw = (bf16[4,3,3,3]{3,2,1,0}, u8[0]{0}) custom-call(%x, %dy), window={size=3x3}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  ROOT %sum = f32[] fusion(%dy), kind=kInput, calls=%fused
}
"""


def test_forward_and_both_gradients_of_a_convolution_count_the_same_arithmetic():
    assert count_convolutions(PROGRAM) == 3 * 2 * (2 * 6 * 6 * 4) * (3 * 3 * 3)


def test_operands_and_results_are_counted_in_bytes_and_each_launch_as_a_kernel():
    x, w, y = 2 * 2 * 8 * 8 * 3, 2 * 4 * 3 * 3 * 3, 2 * 2 * 6 * 6 * 4
    assert count_traffic(PROGRAM) == (x + w + y) + (y + w + x) + (x + y + w) + (y + 4)
    assert count_kernels(PROGRAM) == 4


@pytest.mark.parametrize("chip", CHIPS)
def test_a_missing_compiler_is_named_with_the_command_that_brings_it(chip, monkeypatch):
    monkeypatch.setattr(chips, "_is_installed", lambda module: False)
    with pytest.raises(SystemExit, match=rf"the {chip} is missing: .* -e '\.\[{CHIPS[chip].extra}"):
        make_mesh_of(chip)


def compile_step(named: str, batch: int) -> dict[str, list[float]]:
    """Returns GFLOP, GB, MiB, kernels, exchanged MB and images/s of the step, by its dtype."""
    chip = CHIPS[named.split(":")[0]]
    if not any(map(chips._is_installed, chip.modules)):
        pytest.skip(f"needs the compiler for the {named}, the extra {chip.extra}")
    words = [sys.executable, BENCHMARK, "--compile-for", named, "--batch-size", str(batch)]
    environment = {name: os.environ[name] for name in os.environ if name != "JAX_PLATFORMS"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    lines = re.findall(r"^(float32|bfloat16) (.*)$", done.stdout, re.MULTILINE)
    assert [dtype for dtype, _ in lines] == ["float32", "bfloat16"]
    return {
        dtype: [float(n.replace(",", "")) for n in re.findall(r"[\d.,]+", rest)]
        for dtype, rest in lines
    }


@pytest.mark.slow
@pytest.mark.parametrize("batch", [128, 512])
def test_an_h100_does_no_arithmetic_but_the_direct_convolutions(batch):
    for dtype, (gflop, moved, temporaries, kernels, *_) in compile_step("h100", batch).items():
        assert gflop == pytest.approx(count_step(batch, dtype).flop / 1e9, rel=0.05)
        assert kernels <= 110
        if (dtype, batch) == ("bfloat16", 128):
            assert temporaries < 90
            assert moved <= 1.1


@pytest.mark.slow
def test_a_v5e_does_little_arithmetic_beside_the_direct_convolutions():
    for dtype, (gflop, moved, *_) in compile_step("v5e", 128).items():
        assert gflop == pytest.approx(count_step(128, dtype).flop / 1e9, rel=0.1)
        # A copy of the whole data set would add 0.1.
        assert moved < (1.25 if dtype == "float32" else 1.3)


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "size"), [("2x2", 4), ("4x4", 16)])
def test_many_chips_exchange_the_gradient_once_and_nothing_else(topology, size):
    for dtype, (gflop, *_, exchanged, _) in compile_step(f"v5e:{topology}", 512).items():
        gradient = PARAMETERS * (2 if dtype == "bfloat16" else 4) / 1e6
        assert exchanged == pytest.approx(gradient, rel=0.01)
        assert gflop == pytest.approx(count_step(512 // size, dtype).flop / 1e9, rel=0.2)


def test_what_the_chips_send_each_other_is_counted_whatever_the_operation():
    text = """HloModule step

ENTRY %main {
  %g = f32[4,8]{1,0} parameter(0)
  %sum = (f32[4,8]{1,0:T(8,128)}, bf16[6]{0}, /*index=2*/f32[]{:T(128)}) all-reduce(%g, %b, %l), \
channel_id=1
  %all = f32[16,8]{1,0} all-gather(%g), dimensions={0}
  %begun = f32[6]{0} all-reduce-start(%b), channel_id=2
  %ended = f32[6]{0} all-reduce-done(%begun)
  ROOT %done = f32[4,8]{1,0} get-tuple-element(%sum), index=0, metadata={op_name="all-reduce"}
}
"""
    assert count_exchanged(text) == (4 * 32 + 2 * 6 + 4) + 4 * 128 + 4 * 6


def test_chips_that_do_not_divide_the_batch_are_refused(monkeypatch):
    monkeypatch.setattr(benchmark, "make_mesh_of", lambda *name: SimpleNamespace(size=4))
    with pytest.raises(SystemExit, match="--batch-size 6: 4 chips do not divide it evenly"):
        benchmark.compile_for("v5e:2x2", 6)


def test_the_predicted_time_is_the_longer_of_arithmetic_and_memory_then_the_exchange():
    chip = Chip((), "", {"float32": 100.0}, bandwidth=10.0, link=5.0)
    program = Program(flop=300.0, bytes=20.0, temporaries=0, kernels=0, exchanged=40)
    assert predict_seconds(chip, "float32", 1, program) == 3
    assert predict_seconds(chip, "float32", 4, program) == 3 + 1.5 * 40 / 5
    assert predict_seconds(chip, "float32", 1, program._replace(bytes=50.0)) == 5
