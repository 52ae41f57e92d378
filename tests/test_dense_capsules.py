"""The capsule layer without the votes, and routing by agreement as the value that it takes."""

import dataclasses
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import capsjax
import platforms
from capsjax import Agreement
from capsjax._routing import _dense_votes

J, N, D, K = 3, 5, 4, 2  # output and input capsules, and their dimensions


def float64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


@pytest.fixture
def bias(rng):
    return jnp.asarray(rng.normal(size=(J, D)), jnp.float32)


# test_routings.py compares classes in turn; with a gradient through all iterations both are below.
def test_classes_together_have_routings_value_and_gradients(rng, bias, monkeypatch):
    monkeypatch.setattr(_dense_votes, "_map_by_platform", _dense_votes._map_together)
    weight = jnp.asarray(rng.normal(size=(J, N, D, K)), jnp.float32)
    u = jnp.asarray(rng.normal(size=(2, N, K)), jnp.float32)
    cotangent = jnp.asarray(rng.normal(size=(2, J, D)), jnp.float32)

    def layer(u, weight, bias):
        v = capsjax.dense_capsules(u, weight, bias=bias)
        return jnp.vdot(v, cotangent), v

    def composed(u, weight, bias):
        v = capsjax.routing(capsjax.predictions(u, weight), bias=bias)
        return jnp.vdot(v, cotangent), v

    results = [
        jax.jit(jax.grad(function, (0, 1, 2), has_aux=True))(u, weight, bias)
        for function in (layer, composed)
    ]
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("classes", "scale", "leak", "dtype"),
    [
        pytest.param(J, 1, False, jnp.float32, id="few"),
        pytest.param(J, 1, False, jnp.bfloat16, id="few, bfloat16"),
        pytest.param(J, 1, True, jnp.float32, id="few, leaky"),
        pytest.param(1, 1, True, jnp.float32, id="one, leaky"),
        pytest.param(J, 300, True, jnp.float32, id="powers that must not overflow, leaky"),
        pytest.param(40, 1, False, jnp.float32, id="too many to write out"),
        pytest.param(40, 1, False, jnp.bfloat16, id="too many to write out, bfloat16"),
    ],
)
def test_a_gpus_form_of_the_layer_has_the_same_value_and_gradients(
    rng, classes, scale, leak, dtype, monkeypatch
):
    weight = jnp.asarray(rng.normal(size=(classes, N, D, K)) * scale, dtype)
    u = jnp.asarray(rng.normal(size=(2, N, K)), dtype)
    cotangent = jnp.asarray(rng.normal(size=(2, classes, D)), jnp.float32)

    def differentiate():
        def layer(u, weight):
            votes = capsjax.DenseVotes(u, weight)
            state = capsjax.routing_state(votes, 2, leak=leak, stop_gradient=False)
            return jnp.vdot(state.capsules.astype(jnp.float32), cotangent), state

        return jax.jit(jax.grad(layer, (0, 1), has_aux=True))(u, weight)

    here = differentiate()
    platforms.take_path("cuda", monkeypatch)
    # Sums in another order round differently.
    rounding = 2.0 ** (-6 if dtype == jnp.bfloat16 else -16)
    for actual, expected in zip(*map(jax.tree.leaves, (differentiate(), here)), strict=True):
        chex.assert_trees_all_close(actual, expected, atol=rounding * jnp.abs(expected).max())


@pytest.mark.parametrize("routings", [1, 2])
def test_the_state_keeps_64_bits_after_any_number_of_iterations(rng, routings):
    with jax.enable_x64(True):
        votes = capsjax.DenseVotes(rng.normal(size=(2, N, K)), rng.normal(size=(J, N, D, K)))
        state = capsjax.routing_state(votes, routings)
        chex.assert_type([state.logits, state.couplings, state.capsules], jnp.float64)


def lower(classes, dtype=jnp.float32, *, differentiate=False) -> dict[str, str]:
    """Lowers the class capsules of MNIST for each platform."""
    u = jax.ShapeDtypeStruct((2, 1152, 8), dtype)
    weight = jax.ShapeDtypeStruct((classes, 1152, 16, 8), dtype)
    layer: Any = capsjax.dense_capsules
    if differentiate:
        layer = jax.grad(lambda u, w: capsjax.dense_capsules(u, w).sum(), (0, 1))
    traced = jax.jit(layer).trace(u, weight)
    return {
        platform: traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    }


@pytest.mark.parametrize(("classes", "in_turn"), [(10, ["cpu"]), (1000, ["cpu", "cuda", "tpu"])])
def test_classes_take_turns_where_they_are_many_and_on_a_cpu(classes, in_turn):
    lowered = lower(classes, differentiate=True)
    assert [name for name, text in lowered.items() if "stablehlo.while" in text] == in_turn


def test_a_gpu_has_its_softmax_written_out_and_in_16_bits_its_matrices_laid_out(dtype):
    lowered = lower(10, dtype)
    reduced = [name for name, text in lowered.items() if "applies stablehlo.maximum" in text]
    assert reduced == ["cpu", "tpu"]
    laid_out = [name for name, text in lowered.items() if "optimization_barrier" in text]
    assert laid_out == (["cuda"] if dtype == jnp.bfloat16 else [])


def test_the_layer_can_be_exported_for_every_platform(dtype):
    u, weight = jnp.ones((2, N, K), dtype), jnp.ones((J, N, D, K), dtype)
    layer = jax.jit(capsjax.dense_capsules)
    exported = export.export(layer, platforms=("cpu", "cuda", "tpu"))(u, weight)
    loaded = export.deserialize(exported.serialize())
    chex.assert_trees_all_close(loaded.call(u, weight), layer(u, weight))


def test_the_memory_of_the_capsule_layer_does_not_hold_the_predictions():
    batch, classes, inputs, d, k = 32, 200, 500, 16, 2
    u = jax.ShapeDtypeStruct((batch, inputs, k), jnp.float32)
    weight = jax.ShapeDtypeStruct((classes, inputs, d, k), jnp.float32)
    step = jax.jit(jax.grad(lambda u, w: capsjax.dense_capsules(u, w).sum(), (0, 1)))
    memory: Any = step.lower(u, weight).compile().memory_analysis()
    assert 0 < memory.temp_size_in_bytes < 4 * batch * classes * inputs * d / 2


@pytest.mark.parametrize(
    ("u", "bias", "words"),
    [((2, N + 1, K), None, "expected input capsules"), ((2, N, K), (J,), "expected a bias")],
)
def test_the_capsule_layer_refuses_shapes_that_do_not_fit(u, bias, words):
    bias = None if bias is None else jnp.zeros(bias)
    with pytest.raises(ValueError, match=words):
        jax.jit(lambda u, w: capsjax.dense_capsules(u, w, bias=bias))(
            jnp.zeros(u), jnp.zeros((J, N, D, K))
        )


def test_agreement_is_the_capsule_layer_with_its_options(rng, bias):
    weight = jnp.asarray(rng.normal(size=(J, N, D, K)), jnp.float32)
    u = jnp.asarray(rng.normal(size=(2, N, K)), jnp.float32)

    def value_and_gradient(layer):
        return jax.jit(jax.value_and_grad(lambda u: jnp.sum(jnp.sin(layer(u, weight, bias=bias)))))(
            u
        )

    agreement = Agreement(2, leak=True, stop_gradient=False)
    options = {"routings": 2, "leak": True, "stop_gradient": False}
    chex.assert_trees_all_equal(
        value_and_gradient(agreement),
        value_and_gradient(partial(capsjax.dense_capsules, **options)),
    )


def test_equal_agreements_are_one_value_and_compiled_once():
    assert Agreement(3) == Agreement() != Agreement(2)
    assert hash(Agreement(3)) == hash(Agreement())
    with pytest.raises(dataclasses.FrozenInstanceError):
        Agreement().iterations = 2  # type: ignore[misc]
    layer = chex.assert_max_traces(lambda agreement, u, w: agreement(u, w), n=1)
    once = jax.jit(layer, static_argnums=0)
    for _ in range(2):
        once(Agreement(2), jnp.ones((N, K)), jnp.ones((J, N, D, K)))


def test_agreement_asks_for_a_bias_only_if_it_has_one():
    bias = Agreement(bias=True).initial_bias(J, N, D)
    np.testing.assert_array_equal(bias, np.full((J, D), 0.1, np.float32))
    assert Agreement().initial_bias(J, N, D) is None


@pytest.mark.parametrize("iterations", [0, -1, 1.5, 3.0, True, None, "3"])
def test_agreement_refuses_what_is_no_number_of_iterations(iterations):
    with pytest.raises(ValueError, match=f"int of 1 or more, got {iterations!r}"):
        Agreement(iterations)


def test_agreement_is_known_by_its_name():
    assert capsjax.ROUTINGS[Agreement.name] is Agreement
