"""The costs of the stages are those of the direct algorithm."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarking.stages import count_costs, count_step


def count_flop(function, *shapes) -> float:
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*shapes).cost_analysis()["flops"]


def make_conv(stride):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lambda x, w: lax.conv_general_dilated(
        x, w, (stride, stride), "VALID", dimension_numbers=numbers
    )


def test_arithmetic_is_counted_as_the_compiler_counts_the_direct_algorithm():
    costs = count_costs(4)
    first = count_flop(make_conv(1), (4, 28, 28, 1), (9, 9, 1, 256))
    second = count_flop(make_conv(2), (4, 20, 20, 256), (9, 9, 256, 256))
    assert costs["conv1 forward"].flop == pytest.approx(first, rel=0.01)
    assert costs["conv2 forward"].flop == pytest.approx(second, rel=0.01)
    layers = (4, 160), (160, 512), (512, 1024), (1024, 784)
    decoder = count_flop(lambda x, a, b, c: x @ a @ b @ c, *layers)
    assert costs["decoder with gradients"].flop == pytest.approx(3 * decoder, rel=0.01)


def test_a_step_has_the_arithmetic_of_both_convolutions_and_halves_what_is_not_the_optimisers():
    first, second = 2 * 20 * 20 * 81 * 256, 2 * 6 * 6 * 81 * 256 * 256
    exact, rounded = (count_step(3, dtype) for dtype in ("float32", "bfloat16"))
    # The images' gradient of the first is not needed.
    assert exact.flop == rounded.flop == 3 * (2 * first + 3 * second)
    optimiser = count_costs(3)["optimiser"].bytes
    assert rounded.bytes - optimiser == (exact.bytes - optimiser) / 2
