"""Primary capsules: their values, their grouping, their number and their gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_shape
from hypothesis import given, settings
from hypothesis import strategies as st

import capsjax
import reference

primary_capsules = jax.jit(capsjax.primary_capsules, static_argnames=("dim", "strides", "grouping"))

TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-6}  # the convolution is rounded, then the result


def float64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def draw_layer(rng, size=3, depth=2, channels=8, dtype=jnp.float32):
    """Draws a kernel and a bias."""
    kernel = rng.normal(size=(size, size, depth, channels))
    return jnp.asarray(kernel, dtype), jnp.asarray(rng.normal(size=channels), dtype)


def test_equals_the_paper(rng, lead, dtype, call):
    kernel, bias = draw_layer(rng, size=2, dtype=dtype)
    x = jnp.asarray(rng.normal(size=(*lead, 5, 6, 2)), dtype)

    groupings: list[dict[str, Any]] = [
        {"dim": 4, "coupling": 0.25, "grouping": grouping} for grouping in ("channels", "flat")
    ]

    def both(x):
        return [capsjax.primary_capsules(x, kernel, bias, **options) for options in groupings]

    for u, options in zip(call(both, x), groupings, strict=True):
        expected = reference.primary_capsules(float64(x), float64(kernel), float64(bias), **options)
        assert_shape(u, (*lead, 2 * 3 * 2, 4))
        assert u.dtype == dtype
        tolerance = TOLERANCE[dtype.__name__]
        np.testing.assert_allclose(float64(u), expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def values():
    """Feature maps of 2×3 positions and 4 channels, each value 100·row + 10·column + channel."""
    rows, columns, channels = np.meshgrid([0, 1], [0, 1, 2], [0, 1, 2, 3], indexing="ij")
    return jnp.asarray(100 * rows + 10 * columns + channels + 1000, jnp.float32)


def compute_groups(x, grouping, dim):
    """Computes the values in each capsule by a 1×1 convolution that changes nothing."""
    kernel, bias = jnp.eye(x.shape[-1])[None, None], jnp.zeros(x.shape[-1])
    options = {"dim": dim, "strides": 1, "grouping": grouping}
    u = primary_capsules(x, kernel, bias, **options)
    # v = f(|s|) s with f(n) = n / (1 + n²), so that s / s_0 = v / v_0.
    return u / u[..., :1]


def test_a_capsule_is_neighbouring_channels_at_one_position(values):
    expected = [  # (row, column, type): row major, the type fastest
        [1000, 1001],
        [1002, 1003],
        [1010, 1011],
        [1012, 1013],
        [1020, 1021],
        [1022, 1023],
        [1100, 1101],
        [1102, 1103],
        [1110, 1111],
        [1112, 1113],
        [1120, 1121],
        [1122, 1123],
    ]
    expected = np.array(expected) / np.array(expected)[:, :1]
    np.testing.assert_allclose(compute_groups(values, "channels", 2), expected, rtol=1e-6)


def test_a_flat_capsule_is_neighbouring_values_of_channels_rows_columns(values):
    expected = [  # channel 0: row 0 then row 1; then channel 1
        [1000, 1010, 1020, 1100],
        [1110, 1120, 1001, 1011],
        [1021, 1101, 1111, 1121],
        [1002, 1012, 1022, 1102],
        [1112, 1122, 1003, 1013],
        [1023, 1103, 1113, 1123],
    ]
    expected = np.array(expected) / np.array(expected)[:, :1]
    np.testing.assert_allclose(compute_groups(values, "flat", 4), expected, rtol=1e-6)


def test_flat_groups_as_view_of_a_channels_first_array_does(rng):
    x = jnp.asarray(rng.normal(size=(2, 3, 4, 8)), jnp.float32)
    options = {"dim": 8, "strides": 1, "grouping": "flat"}
    u = primary_capsules(x, jnp.eye(8)[None, None], jnp.zeros(8), **options)
    view = np.asarray(x).transpose(0, 3, 1, 2).reshape(2, -1, 8)
    np.testing.assert_allclose(u, reference.squash(view), rtol=1e-5)


def test_flat_capsules_may_reach_over_channels_that_are_no_multiple_of_their_size(rng):
    kernel, bias = draw_layer(rng, size=1, channels=3)
    x = jnp.ones((2, 4, 2))
    assert_shape(primary_capsules(x, kernel, bias, dim=8, strides=1, grouping="flat"), (3, 8))
    with pytest.raises(ValueError, match="3 channels make no capsules of 8"):
        capsjax.primary_capsules(x, kernel, bias, dim=8, strides=1)


@pytest.mark.parametrize(
    ("shape", "size", "strides", "expected"),
    [
        ((10, 10, 2), 3, 2, 4 * 4 * 2),
        ((12, 9, 2), 3, 2, 5 * 4 * 2),  # not square, and a last column that no window reaches
        ((5, 3, 2), 3, 1, 3 * 1 * 2),
        ((3, 3, 2), 3, 2, 1 * 1 * 2),  # one position
    ],
)
def test_any_size_gives_its_own_number_of_capsules(shape, size, strides, expected, rng):
    kernel, bias = draw_layer(rng, size)
    u = primary_capsules(jnp.ones(shape), kernel, bias, dim=4, strides=strides)
    assert_shape(u, (expected, 4))


@given(
    st.sampled_from([(5, 4), (4, 6)]),
    st.sampled_from([1, 2]),
    st.sampled_from(["channels", "flat"]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60)
def test_equals_the_paper_for_any_size_and_stride(size, strides, grouping, seed):
    rng = np.random.default_rng(seed)
    kernel, bias = draw_layer(rng, size=2, depth=1, channels=4)
    x = jnp.asarray(rng.normal(size=(*size, 1)), jnp.float32)
    options = {"dim": 2, "strides": strides, "grouping": grouping}
    u = primary_capsules(x, kernel, bias, **options)
    expected = reference.primary_capsules(float64(x), float64(kernel), float64(bias), **options)
    np.testing.assert_allclose(u, expected, rtol=1e-4, atol=1e-6)


def test_bfloat16_stays_bfloat16_with_parameters_in_float32(rng):
    kernel, bias = draw_layer(rng)
    u = primary_capsules(jnp.ones((5, 5, 2), jnp.bfloat16), kernel, bias, dim=4)
    assert u.dtype == jnp.bfloat16


def test_integer_pixels_are_computed_in_float32(rng):
    kernel, bias = draw_layer(rng)
    x = jnp.arange(50).reshape(5, 5, 2)
    u = primary_capsules(x, kernel, bias, dim=4)
    expected = primary_capsules(x.astype(jnp.float32), kernel, bias, dim=4)
    np.testing.assert_array_equal(u, expected)


def test_gradients_reach_images_kernel_and_bias_and_are_finite_at_zero(rng):
    kernel, bias = draw_layer(rng)

    def total(x, kernel, bias):
        return jnp.sum(capsjax.primary_capsules(x, kernel, bias, dim=4))

    x = jnp.asarray(rng.normal(size=(5, 5, 2)), jnp.float32)
    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    assert all(np.any(float64(g)) for g in gradient(x, kernel, bias))
    dead = jax.tree.map(np.zeros_like, (x, kernel, bias))
    assert all(np.isfinite(g).all() for g in gradient(*dead))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("x", "kernel", "bias", "options", "message"),
    [
        ((5, 5), (3, 3, 2, 8), (8,), {}, r"\[\.\.\., H, W, C\].*\b5, 5\b"),
        ((5, 5, 3), (3, 3, 2, 8), (8,), {}, r"2 channels.*\b3, 3, 2, 8\b.*got 3 .*\b5, 5, 3\b"),
        ((5, 5, 2), (3, 3, 8), (8,), {}, r"got shape .3, 3, 8\b"),
        ((5, 2, 2), (3, 3, 2, 8), (8,), {}, "3x3.*5x2"),
        ((5, 5, 2), (3, 3, 2, 8), (4,), {}, r"bias of shape \[8\].*got \[4\]"),
        ((5, 5, 2), (3, 3, 2, 8), (8,), {"dim": 3}, "8 channels make no capsules of 3 numbers"),
        ((5, 5, 2), (3, 3, 2, 8), (8,), {"dim": 0}, "capsules of 0 numbers"),
        ((5, 5, 2), (3, 3, 2, 8), (8,), {"dim": 5, "grouping": "flat"}, "32 flat make no capsules"),
        (
            (5, 5, 2),
            (3, 3, 2, 8),
            (8,),
            {"grouping": "row"},
            "one of .*channels.*flat.*got 'row'",
        ),
        ((5, 5, 2), (3, 3, 2, 8), (8,), {"strides": 0}, "strides.*0"),
    ],
)
def test_what_does_not_fit_is_an_error_in_words(x, kernel, bias, options, message, jit):
    def call(*arrays):
        return capsjax.primary_capsules(*arrays, **{"dim": 4, **options})

    with pytest.raises(ValueError, match=message):
        (jax.jit(call) if jit else call)(*map(jnp.ones, (x, kernel, bias)))
