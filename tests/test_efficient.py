"""Efficient-CapsNet: its sizes, its forward pass against loops, and what it refuses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import capsjax
import reference
from capsjax import Agreement, SelfAttention
from capsjax.networks import EfficientCapsNetConfig
from capsjax.presets import BEST, EFFICIENT

SMALL = {
    "channels": (3, 4),
    "kernel_sizes": (3, 2),
    "strides": (1, 2),
    "dim_primary": 2,
    "dim_class": 3,
    "hidden": (5,),
}


def make(image_shape=(6, 7, 2), num_classes=3, **sizes) -> capsjax.EfficientCapsNet:
    """Makes a small network of which every array is random, its batch statistics too."""
    net: Any = jax.eval_shape(
        lambda: capsjax.EfficientCapsNet(
            image_shape, num_classes, rngs=nnx.Rngs(0), **SMALL | sizes
        )
    )
    graphdef, state = nnx.split(net)
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.uniform(0.1, 0.5, leaf.shape), leaf.dtype)  # noqa: E731
    net = nnx.merge(graphdef, jax.tree.map(draw, state))
    net.eval()
    return net


def apply(net, images):
    graphdef, state = nnx.split(net)
    return jax.jit(lambda state, images: nnx.merge(graphdef, state)(images))(state, images)


def test_the_network_has_as_many_parameters_as_the_papers():
    net = nnx.eval_shape(lambda: capsjax.EfficientCapsNet(rngs=nnx.Rngs(0)))
    count = lambda part: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(part, nnx.Param)))  # noqa: E731
    assert count(net) - count(net.decoder) == 161_824  # "161K"
    assert count(net.decoder) == 1_411_344
    assert net.depthwise.shape == (9, 9, 128)
    assert net.class_caps.weight.shape == (10, 16, 16, 8)


def test_the_first_values_are_drawn_as_in_keras():
    net = nnx.merge(*jax.jit(lambda: nnx.split(capsjax.EfficientCapsNet(rngs=nnx.Rngs(0))))())
    stddev = {
        "conv": (net.convs[2].kernel, (2 / (9 * 64)) ** 0.5),
        "depthwise": (net.depthwise, (2 / (81 * 129)) ** 0.5),
        "W": (net.class_caps.weight, (2 / 1280) ** 0.5),
        "decoder": (net.decoder[0].kernel, (2 / 160) ** 0.5),
        "last of the decoder": (net.decoder[2].kernel, (2 / (1024 + 784)) ** 0.5),
    }
    for name, (array, expected) in stddev.items():
        assert np.std(array[...]) == pytest.approx(expected, rel=0.02), name
    for bias in (net.depthwise_bias, net.class_caps.bias, net.convs[0].bias):
        assert not np.any(bias[...])


@pytest.mark.parametrize("lead", [(), (2,)], ids=len)
def test_the_forward_pass_equals_the_papers_as_loops(rng, lead):
    net: Any = make()
    arrays: Any = jax.device_get(nnx.to_pure_dict(nnx.state(net)))
    images = rng.uniform(size=(*lead, 6, 7, 2)).astype(np.float32)
    x = images.astype(np.float64)
    for n, strides in enumerate((1, 2)):
        layer, norm = arrays["convs"][n], arrays["norms"][n]
        x = np.maximum(reference.conv(x, layer["kernel"], strides) + layer["bias"], 0)
        x = (x - norm["mean"]) / np.sqrt(norm["var"] + 1e-3) * norm["scale"] + norm["bias"]
    s = arrays["depthwise_bias"] + np.zeros((*lead, 4))
    for row in range(x.shape[-3]):
        for column in range(x.shape[-2]):
            s += x[..., row, column, :] * arrays["depthwise"][row, column]
    u = reference.squash_exp(s.reshape(*lead, 2, 2))
    votes = reference.predictions(u, arrays["class_caps"]["weight"])
    expected = reference.self_attention_routing(votes, arrays["class_caps"]["bias"])
    output = apply(net, images)
    np.testing.assert_allclose(output.capsules, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(output.scores, reference.length(expected), rtol=1e-4, atol=1e-5)
    layers = [(layer["kernel"], layer["bias"]) for layer in arrays["decoder"].values()]
    examples = zip(expected.reshape(-1, 3, 3), output.reconstruction.reshape(-1, 84), strict=True)
    for capsules, drawn in examples:
        kept = reference.mask(capsules, reference.longest(capsules))
        np.testing.assert_allclose(drawn, reference.decode(layers, kept), rtol=1e-4, atol=1e-5)


def test_with_one_capsule_and_no_bias_the_class_capsules_have_a_closed_form(rng):
    net: Any = make(num_classes=1, dim_primary=4)  # one output takes all of the one input
    net.class_caps.bias[...] = jnp.zeros((1, 1))
    images = jnp.asarray(rng.uniform(size=(2, 6, 7, 2)), jnp.float32)
    u = np.asarray(net.primary_capsules(images))
    weight = np.asarray(net.class_caps.weight[...])[0, 0]
    expected = reference.squash_exp(np.einsum("bik,dk->bd", u, weight))
    np.testing.assert_allclose(apply(net, images).capsules[:, 0], expected, rtol=1e-4)


def test_every_convolution_of_a_network_in_bfloat16_is_in_bfloat16():
    # The statistics stay float32, and a batch norm's result is what its widest operand is.
    graphdef, state = nnx.split(make())
    cast = lambda x: x.astype(jnp.bfloat16)  # noqa: E731
    params, rest = nnx.split_state(state, nnx.Param, ...)
    forward = jax.jit(
        lambda params, x: nnx.merge(graphdef, jax.tree.map(cast, params), rest)(x).capsules
    )
    traced = forward.trace(params, jnp.zeros((2, 6, 7, 2), jnp.bfloat16))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert len(convolutions) == 2
    assert not any("f32" in line for line in convolutions)


def test_its_routing_may_be_any():
    assert EfficientCapsNetConfig().routing == SelfAttention()
    net = make(routing=2)
    assert net.config.routing == Agreement(2)
    assert net.class_caps.bias is None


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"strides": (1,)}, "one for each convolution"),
        ({"channels": (0, 4)}, r"sizes are integers of 1 or more, got channels = \(0, 4\)"),
        ({"momentum": 5.0}, "momentum is at least 0 and below 1, got 5.0"),
        ({"dim_primary": 3}, "capsules of 3 numbers do not divide 4 channels"),
        ({"image_shape": (3, 7, 2)}, "images of 3×7×2 in 3 classes, which the convolutions"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_words(sizes, message):
    with pytest.raises(ValueError, match=message):
        make(**sizes)


def test_images_of_another_size_are_refused_in_words():
    with pytest.raises(
        ValueError, match=r"expected images \[\.\.\., 6, 7, 2\], got \[2, 7, 6, 2\]"
    ):
        make()(jnp.zeros((2, 7, 6, 2)))


def test_the_preset_trains_it_as_best_trains_capsnet():
    assert EFFICIENT.network == EfficientCapsNetConfig()
    assert EFFICIENT.training == dataclasses.replace(BEST.training, batch_size=64)
