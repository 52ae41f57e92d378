"""Convolutional capsules: a capsule layer at every position, and three of them in a row."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import capsjax
from capsjax.nn import ConvCaps


def apply(layer, u):
    graphdef, params = nnx.split(layer)
    return jax.jit(lambda params, u: nnx.merge(graphdef, params)(u))(params, u)


@pytest.mark.slow
@pytest.mark.parametrize(
    "routing", [2, capsjax.Agreement(bias=True), capsjax.Uniform(), capsjax.SelfAttention()]
)
def test_a_layer_is_a_capsule_layer_at_every_position(rng, routing):
    layer = ConvCaps(2, 3, 4, 5, routing, kernel_size=2, strides=2, rngs=nnx.Rngs(0))
    u = jnp.asarray(rng.normal(size=(2, 4, 6, 2, 3)), jnp.float32)
    v = apply(layer, u)
    assert v.shape == (2, 2, 3, 4, 5)
    bias = None if layer.bias is None else layer.bias[...]
    for y, x in np.ndindex(2, 3):
        window = u[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].reshape(2, 8, 3)
        expected = layer.routing(window, layer.weight[...], bias)
        np.testing.assert_allclose(v[:, y, x], expected, rtol=1e-4, atol=1e-6)


def test_windows_of_nothing_are_refused():
    with pytest.raises(ValueError, match="ConvCaps: windows of 0 × 0"):
        capsjax.nn.ConvCaps(2, 4, 3, 4, kernel_size=0, rngs=nnx.Rngs(0))


def test_a_shift_of_the_input_by_a_stride_shifts_the_output(rng):
    layer = ConvCaps(2, 3, 4, 5, strides=2, rngs=nnx.Rngs(0))
    u = jnp.asarray(rng.normal(size=(9, 5, 2, 3)), jnp.float32)
    np.testing.assert_allclose(
        apply(layer, u[2:])[:2], apply(layer, u[:7])[1:], rtol=1e-5, atol=1e-6
    )


class Stack(nnx.Module):
    """Three layers, whose last position holds a capsule for each class."""

    def __init__(self, rngs: nnx.Rngs):
        sizes: Any = [(3, 4, 4, 6), (4, 6, 4, 6), (4, 6, 2, 8)]
        self.layers = nnx.List(ConvCaps(*size, 2, rngs=rngs) for size in sizes)

    def __call__(self, u: jax.Array) -> list[jax.Array]:
        outputs = [u]
        for layer in self.layers:
            outputs.append(layer(outputs[-1]))
        return outputs[1:]


@pytest.mark.slow
def test_three_layers_in_a_row_learn_and_diagnostics_finds_the_dead_capsules(rng):
    labels = np.arange(32) % 2
    patterns = rng.normal(size=(2, 7, 7, 3, 4))
    u = jnp.asarray(patterns[labels] + rng.normal(size=(32, 7, 7, 3, 4)), jnp.float32)
    u = capsjax.squash(u)
    graphdef, params = nnx.split(Stack(nnx.Rngs(0)))
    optimizer = optax.adam(0.01)

    def find_loss(params):
        v = nnx.merge(graphdef, params)(u)[-1]
        assert v.shape == (32, 1, 1, 2, 8)
        return jnp.mean(capsjax.margin_loss(capsjax.length(v[:, 0, 0]), labels))

    @jax.jit
    def step(params, opt_state):
        loss, gradient = jax.value_and_grad(find_loss)(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    losses, opt_state = [], optimizer.init(params)
    for _ in range(30):
        params, opt_state, loss = step(params, opt_state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 5
    stack = nnx.merge(graphdef, params)
    weight = stack.layers[1].weight
    weight[...] = weight[...].at[1].set(0)  # kills type 1 of the second layer at all positions
    first, second, _ = (
        np.asarray(capsjax.diagnostics.dead(capsjax.length(v))) for v in apply(stack, u)
    )
    assert first.shape == (5, 5, 4)
    assert not first.any()
    assert second.shape == (3, 3, 4)
    np.testing.assert_array_equal(second, np.broadcast_to(np.arange(4) == 1, (3, 3, 4)))
