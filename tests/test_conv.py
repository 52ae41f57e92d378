import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_shape
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from capsjax._conv import _patches, conv
from capsjax._conv._matrices import POINTS, build_matrices
from capsjax._conv._tiling import plan_axes
from convolutions import (
    NATIVE,
    PATCHES,
    TOLERANCE,
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

# The Toom-Cook algorithm convolves these images with this kernel in both dtypes.
IMAGE, KERNEL = (8, 9, 32), (5, 5, 32, 64)


def plan(image, kernel, strides=(1, 1), dtype="float32"):
    return plan_axes(image[-3:-1], kernel, strides, dtype)


@pytest.mark.parametrize("case", TOOM_COOK)
def test_toom_cook_gives_the_convolution_and_its_gradients(case, dtype):
    image, kernel, strides = TOOM_COOK[case]
    assert plan(image, kernel, strides, dtype.__name__)
    arrays = sample(*TOOM_COOK[case], dtype)
    actual = value_and_gradients(strides, *arrays)
    assert all(a.dtype == dtype for a in actual)
    assert_close(actual, definition(strides, *arrays), TOLERANCE[dtype.__name__])


@pytest.mark.parametrize("case", [*PATCHES, *NATIVE])
def test_other_algorithms_give_the_convolution_and_its_gradients(case, dtype):
    image, kernel, strides = (PATCHES | NATIVE)[case]
    assert plan(image, kernel, strides, dtype.__name__) is None
    arrays = sample(image, kernel, strides, dtype)
    actual = value_and_gradients(strides, *arrays)
    assert all(a.dtype == dtype for a in actual)
    # Only sums in float32 lose digits, and in bfloat16 the rounding of the result.
    tolerance = {"float32": 1e-6, "bfloat16": 2**-8}[dtype.__name__]
    assert_close(actual, definition(strides, *arrays), tolerance)


@pytest.mark.parametrize("case", ["primary capsules", "several tiles"])
def test_toom_cook_agrees_with_patches_times_kernel(case, dtype):
    strides, (x, w, b, dy) = TOOM_COOK[case][2], sample(*TOOM_COOK[case], dtype)

    @jax.jit
    def direct(x, w, dy):
        return _patches.convolve(strides, x, w), *_patches.compute_gradients(strides, x, w, dy)

    *actual, _ = value_and_gradients(strides, x, w, jnp.zeros_like(b), dy)
    assert_close(actual, direct(x, w, dy), TOLERANCE[dtype.__name__])


@pytest.mark.parametrize("size", [(1, 8, 9, 64), (1, 8, 9, 2)], ids=["toom-cook", "patches"])
def test_the_convolution_agrees_with_the_platforms_own(size):
    arrays = sample(size, (3, 4, size[-1], 64), (1, 1))
    assert bool(plan(size, arrays[1].shape, (1, 1))) == (size[-1] == 64)
    y, gradients = jax.vjp(functools.partial(platform_conv, (1, 1)), *arrays[:3])
    assert_close(value_and_gradients((1, 1), *arrays), (y, *gradients(arrays[3])), 1e-5)


@settings(max_examples=8)
@given(sizes(), st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_sizes_of_all_kinds_give_the_convolution_and_its_gradients(case, dtype):
    arrays = sample(*case, dtype)
    actual = value_and_gradients(case[2], *arrays)
    assert_close(actual, definition(case[2], *arrays), TOLERANCE[dtype.__name__])


@given(
    outputs=st.integers(1, 8),
    taps=st.integers(1, 11),
    points=st.sampled_from(list(POINTS.values())),
    seed=st.integers(0, 9),
)
def test_the_three_matrices_compute_a_convolution_along_one_axis(outputs, taps, points, seed):
    A, B, C = build_matrices(outputs, taps, *points)
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=outputs + taps - 1), rng.normal(size=taps)
    # In float64 only the rounding of the matrices themselves is left.
    A, B, C = (m.astype(np.float64) for m in (A, B, C))
    np.testing.assert_allclose(A @ ((B @ x) * (C @ w)), np.correlate(x, w), atol=1e-5)


def test_capsnets_second_convolution_needs_484_products_instead_of_2916():
    rows, columns = plan((20, 20, 256), (9, 9, 256, 256), (2, 2))
    assert (rows.tiles, columns.tiles, rows.outputs, columns.outputs) == (1, 1, 6, 6)
    assert len(rows.B) * len(columns.B) * rows.stride * columns.stride == 484
    assert rows.outputs * columns.outputs * 9 * 9 == 2916


def test_capsnets_second_convolution_loses_few_digits(dtype):
    arrays = sample((1, 20, 20, 256), (9, 9, 256, 256), (2, 2), dtype)
    actual = value_and_gradients((2, 2), *arrays)
    tolerance = {"float32": 6e-6, "bfloat16": 8e-3}[dtype.__name__]
    assert_close(actual, definition((2, 2), *arrays), tolerance)


def test_tiny_images_and_gradients_lose_no_digits(dtype):
    # The powers of the points reach 1e7 for this kernel. Without matrices whose rows all have the
    # same length, products of small numbers with their inverses would underflow.
    strides, (x, w, b, dy) = (
        TOOM_COOK["a long kernel"][2],
        sample(*TOOM_COOK["a long kernel"], dtype),
    )
    scale = jnp.asarray(2.0 ** {"float32": -90, "bfloat16": -100}[dtype.__name__], dtype)
    y, dx, dw, _ = value_and_gradients(strides, x, w, jnp.zeros_like(b), dy)
    tiny_y, _, tiny_dw, _ = value_and_gradients(strides, scale * x, w, jnp.zeros_like(b), dy)
    np.testing.assert_array_equal(tiny_y, scale * y)
    np.testing.assert_array_equal(tiny_dw, scale * dw)
    _, tiny_dx, tiny_dw, _ = value_and_gradients(strides, x, w, jnp.zeros_like(b), scale * dy)
    np.testing.assert_array_equal(tiny_dx, scale * dx)
    np.testing.assert_array_equal(tiny_dw, scale * dw)


def test_capsnets_first_convolution_uses_patches_times_kernel():
    assert plan((28, 28, 1), (9, 9, 1, 256), (1, 1)) is None


@pytest.mark.parametrize("case", [*TOOM_COOK, *PATCHES, *NATIVE])
def test_a_cpu_gets_the_platforms_own_convolution_only_where_that_is_as_good(case):
    image, kernel, strides = (TOOM_COOK | PATCHES | NATIVE)[case]
    arrays = sample(image, kernel, strides)
    text = value_and_gradients.lower(strides, *arrays).as_text()
    assert ("stablehlo.convolution" in text) == (case in NATIVE)


def test_toom_cook_takes_kernels_of_up_to_30_taps():
    assert plan((36, 8, 64), (30, 3, 64, 64), (1, 1)) is not None
    assert plan((36, 8, 64), (31, 3, 64, 64), (1, 1)) is None


def test_leading_axes_are_kept(lead, call):
    x, w, b, _ = sample((*lead, *IMAGE), KERNEL, (1, 1))
    y = call(lambda x: conv(x, w, b), x)
    assert_shape(y, (*lead, 4, 5, 64))
    direct = platform_conv((1, 1), x.reshape(-1, *x.shape[-3:]), w, b)
    assert error(y, direct.reshape(y.shape)) < 1e-5


def test_a_scan_convolves_each_image():
    x, w, b, _ = sample((3, *IMAGE), KERNEL, (1, 1))
    _, y = jax.lax.scan(lambda carry, image: (carry, conv(image, w, b)), None, x)
    assert error(y, platform_conv((1, 1), x, w, b)) < 1e-5


def test_float32_parameters_get_float32_gradients_from_bfloat16_images():
    x, w, b, dy = sample((1, *IMAGE), KERNEL, (1, 1))
    x, dy = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16)
    actual = value_and_gradients((1, 1), x, w, b, dy)
    assert [a.dtype for a in actual] == [jnp.bfloat16] * 2 + [jnp.float32] * 2
    assert_close(actual, definition((1, 1), x, w, b, dy), 2e-2)


def test_the_gradient_is_differentiable():
    *arrays, _ = sample((1, *IMAGE), KERNEL, (1, 1))
    expected = second_derivative(functools.partial(platform_conv, (1, 1)), *arrays)
    assert error(second_derivative(conv, *arrays), expected) < 1e-5


def test_these_tests_try_the_toom_cook_algorithm():
    assert plan(IMAGE, KERNEL)
    assert plan(IMAGE, KERNEL, dtype="bfloat16")


def gradients(*arrays):
    return jax.grad(lambda *arrays: jnp.sum(conv(*arrays) ** 2), (0, 1, 2))(*arrays)


SIZES = pytest.mark.parametrize(
    ("taps", "channels"), [(5, 32), (5, 2), (3, 16)], ids=["toom-cook", "patches", "shifts"]
)


@SIZES
def test_eight_devices_share_the_batch(taps, channels):
    *arrays, _ = sample((16, 8, 9, channels), (taps, taps, channels, 64), (1, 1))
    expected = jax.jit(gradients)(*arrays)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    actual = jax.jit(gradients)(*jax.device_put(tuple(arrays), (split, whole, whole)))
    assert actual[0].sharding.is_equivalent_to(split, 4)
    assert_close(actual, expected, 1e-5)


@SIZES
def test_shard_map_sums_the_gradients_of_kernel_and_bias_over_the_devices(taps, channels):
    *arrays, _ = sample((16, 8, 9, channels), (taps, taps, channels, 64), (1, 1))
    expected = jax.jit(gradients)(*arrays)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("data"), PartitionSpec()
    specs = (split, whole, whole)
    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=specs)
    assert_close(jax.jit(sharded)(*arrays), expected, 1e-5)


@SIZES
def test_an_export_accepts_any_number_of_images(taps, channels):
    (batch,) = export.symbolic_shape("batch")
    x, w, b, _ = sample((3, 8, 9, channels), (taps, taps, channels, 64), (1, 1))
    function = jax.jit(lambda *arrays: (conv(*arrays), *gradients(*arrays)))
    shape = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    exported = export.export(function, platforms=("cpu", "cuda", "tpu"))(shape, w, b)
    assert_close(exported.call(x, w, b), function(x, w, b), 1e-5)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("image", "kernel", "strides", "message"),
    [
        ((8, 3), (3, 3, 3, 4), 1, r"x must be floats \[\.\.\., H, W, C\].*\(8, 3\)"),
        ((8, 8, 3), (3, 3, 4), 1, r"kernel must be \[rows, columns, in, out\].*\(3, 3, 4\)"),
        ((8, 8, 3), (3, 3, 2, 4), 1, r"x must have 2 channels .*, got 3 in .*\[8, 8, 3\]"),
        ((8, 6, 3), (7, 7, 3, 4), 1, r"7x7 does not fit into images of 8x6"),
        ((8, 8, 3), (0, 3, 3, 4), 1, r"0x3 does not fit"),
        ((8, 8, 3), (3, 3, 3, 4), 0, r"strides .* >= 1, got \(0, 0\)"),
        ((8, 8, 3), (3, 3, 3, 4), (1, 1, 1), r"strides .* got \(1, 1, 1\)"),
    ],
)
def test_wrong_shapes_and_strides_are_rejected(image, kernel, strides, message, transform):
    arrays = jnp.zeros(image), jnp.zeros(kernel), jnp.zeros(kernel[3:])
    with pytest.raises(ValueError, match=message):
        transform(functools.partial(conv, strides=strides))(*arrays)


def test_a_bias_of_another_length_is_rejected():
    with pytest.raises(ValueError, match=r"bias must be \[4\] .* \[3, 3, 3, 4\], got \[1\]"):
        conv(jnp.zeros((8, 8, 3)), jnp.zeros((3, 3, 3, 4)), jnp.zeros(1))


def test_images_of_integers_are_rejected():
    with pytest.raises(ValueError, match=r"x must be floats .* got uint8"):
        conv(jnp.zeros((8, 8, 1), jnp.uint8), jnp.zeros((3, 3, 1, 4)), jnp.zeros(4))
