"""The convolution of platforms other than the CPU: its values here, its operations there."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import AxisType, PartitionSpec

import platforms
from capsjax._conv import conv
from convolutions import (
    PATCHES,
    TOOM_COOK,
    assert_close,
    definition,
    error,
    platform_conv,
    sample,
    second_derivative,
    sizes,
    value_and_gradients,
)

# Only sums in float32 lose digits, and in bfloat16 the rounding of the result.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-8}
CASES = (
    TOOM_COOK
    | PATCHES
    | {
        "a stride beyond the kernel": ((2, 14, 17, 3), (2, 3, 3, 4), (3, 5)),
        "pixels that no patch covers": ((2, 25, 21, 3), (4, 3, 3, 5), (2, 3)),
        "more outputs than taps": ((2, 16, 20, 3), (3, 3, 3, 4), (1, 2)),
    }
)


@pytest.fixture(params=["cuda"])
def _accelerator(request, monkeypatch):
    platforms.take_path(request.param, monkeypatch)


def compile_anew(strides, *arrays):
    """Returns outputs and gradients, compiled for this call alone: the platform is patched."""
    return jax.jit(functools.partial(value_and_gradients.__wrapped__, strides))(*arrays)


@pytest.mark.usefixtures("_accelerator")
@pytest.mark.parametrize("case", CASES)
def test_the_librarys_operations_give_the_convolution_and_its_gradients(case, dtype):
    strides, arrays = CASES[case][2], sample(*CASES[case], dtype)
    actual = compile_anew(strides, *arrays)
    assert all(a.dtype == dtype for a in actual)
    assert_close(actual, definition(strides, *arrays), TOLERANCE[dtype.__name__])


@pytest.mark.usefixtures("_accelerator")
@pytest.mark.parametrize("_accelerator", ["tpu"], indirect=True)
@pytest.mark.parametrize("case", ["primary capsules", "few channels"])
def test_jaxs_gradients_on_a_tpu_are_the_same(case, dtype):
    strides, arrays = CASES[case][2], sample(*CASES[case], dtype)
    actual = compile_anew(strides, *arrays)
    assert_close(actual, definition(strides, *arrays), TOLERANCE[dtype.__name__])


@pytest.mark.usefixtures("_accelerator")
@settings(max_examples=8)
@given(sizes(), st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_sizes_of_all_kinds_give_the_convolution_and_its_gradients(case, dtype):
    arrays = sample(*case, dtype)
    actual = compile_anew(case[2], *arrays)
    assert_close(actual, definition(case[2], *arrays), TOLERANCE[dtype.__name__])


@pytest.mark.usefixtures("_accelerator")
def test_the_gradient_is_differentiable():
    strides, (*arrays, _) = (2, 3), sample((1, 11, 9, 2), (4, 3, 2, 3), (2, 3))
    expected = second_derivative(functools.partial(platform_conv, strides), *arrays)
    actual = second_derivative(functools.partial(conv, strides=strides), *arrays)
    assert error(actual, expected) < 1e-6


@pytest.mark.usefixtures("_accelerator")
@pytest.mark.parametrize("strides", [(2, 2), (5, 3)], ids=["", "beyond-the-kernel"])
def test_shard_map_sums_the_gradients_of_kernel_and_bias_over_the_devices(strides):
    arrays = sample((16, 9, 11, 3), (3, 4, 3, 5), strides)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(
        functools.partial(value_and_gradients.__wrapped__, strides),
        mesh=mesh,
        in_specs=(split, whole, whole, split),
        out_specs=(split, split, whole, whole),
    )
    assert_close(jax.jit(sharded)(*arrays), definition(strides, *arrays), 1e-6)


@pytest.mark.usefixtures("_accelerator")
def test_an_export_accepts_any_number_of_images():
    (batch,) = export.symbolic_shape("batch")
    strides, (x, w, b, dy) = (2, 1), sample((3, 9, 8, 2), (4, 3, 2, 5), (2, 1))
    shapes = [jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for a in (x, dy)]
    exported = export.export(
        jax.jit(functools.partial(value_and_gradients.__wrapped__, strides)),
        platforms=("cpu", "cuda", "tpu"),
    )(shapes[0], w, b, shapes[1])
    assert_close(exported.call(x, w, b, dy), definition(strides, x, w, b, dy), 1e-6)


def list_operations(function, *arrays, platform) -> list[str]:
    """Lists what is lowered for a platform: convolutions, and what the CPU's algorithms need."""
    text = jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
    return re.findall(r"stablehlo\.(convolution|dot_general|optimization_barrier)\b", text)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0][0]])
def test_other_platforms_get_their_own_convolution_and_nothing_of_the_cpus(platform, case):
    _, kernel, strides = CASES[case]
    *arrays, dy = sample(*CASES[case])

    def differentiate(*arrays):
        y, pull_back = jax.vjp(functools.partial(conv, strides=strides), *arrays)
        return y, pull_back(dy)

    # The kernel is rounded once; then come the convolution forward, one for the kernel's gradient,
    # and for the input's on a GPU one for each residue of the stride that has taps.
    residues = min(strides[0], kernel[0]) * min(strides[1], kernel[1]) if platform == "cuda" else 1
    found = list_operations(differentiate, *arrays, platform=platform)
    assert found == ["optimization_barrier"] + ["convolution"] * (2 + residues)
