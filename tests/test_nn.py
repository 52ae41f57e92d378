import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_shape
from flax import nnx

import capsjax
import reference
from capsjax.nn import CapsNet, DenseCaps, PrimaryCaps

SHAPE = (9, 8, 2)  # not square, two channels
SMALL = {
    "image_shape": SHAPE,
    "classes": 3,
    "channels": 4,
    "kernel_size": 3,
    "types": 2,
    "dim_primary": 4,
    "dim_class": 4,
    "hidden": (6,),
}


def network(seed=0, **options) -> CapsNet:
    return CapsNet(**{**SMALL, **options}, rngs=nnx.Rngs(seed))


def apply(model, *args):
    """The model jitted: op by op, a network compiles a hundred times."""
    graphdef, params = nnx.split(model)
    return jax.jit(lambda params, *args: nnx.merge(graphdef, params)(*args))(params, *args)


def some(rng, *shape):
    return jnp.asarray(rng.uniform(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def net() -> CapsNet:
    """A small network, its weights so large that capsules differ."""
    model = network()
    model.classes.weight[...] = 100 * model.classes.weight[...]
    return model


def capsnet(model, images, labels=None, grouping="channels"):
    """CapsNet by the paper's loops: lengths, capsules, reconstruction."""
    model = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    conv1, primary = model["conv1"], model["primary"]["conv"]
    x = np.maximum(reference.conv(images, conv1["kernel"], 1) + conv1["bias"], 0)
    u = reference.primary_capsules(x, **primary, dim=4, grouping=grouping)
    u_hat = reference.predictions(u, model["classes"]["weight"])
    _, _, v = reference.routing_state(u_hat, 3)
    kept = reference.longest(v) if labels is None else labels
    layers = [(layer["kernel"], layer["bias"]) for layer in model["decoder"].values()]
    pixels = reference.decode(layers, reference.mask(v, kept))
    return reference.length(v), v, pixels.reshape(images.shape)


@pytest.mark.parametrize("grouping", ["channels", "flat"])
def test_primary_caps_agrees_with_its_function(grouping, rng):
    options = {"strides": 1, "grouping": grouping, "coupling": 0.5}
    layer = PrimaryCaps(2, 8, 4, kernel_size=2, rngs=nnx.Rngs(0), **options)
    x = some(rng, 3, 4, 5, 2)
    kernel, bias = layer.conv.kernel[...], layer.conv.bias[...]
    u = apply(layer, x)
    assert_shape(u, (3, 3 * 4 * 2, 4))
    expected = reference.primary_capsules(*map(np.asarray, (x, kernel, bias)), dim=4, **options)
    np.testing.assert_allclose(u, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("use_bias", "stop_gradient"), [(False, True), (True, False)])
def test_dense_caps_agrees_with_its_functions(use_bias, stop_gradient, rng):
    layer = DenseCaps(
        5, 2, 3, 4, 2, use_bias=use_bias, stop_gradient=stop_gradient, rngs=nnx.Rngs(0)
    )
    weight, u = layer.weight[...], 100 * rng.uniform(size=(2, 5, 2)).astype(np.float32)
    bias = jnp.full((3, 4), 0.1) if use_bias else None
    assert (layer.bias is not None) == use_bias

    def composed(u):
        u_hat = capsjax.predictions(u, weight)
        return capsjax.routing(u_hat, 2, bias=bias, stop_gradient=stop_gradient)

    def value_and_gradient(function):
        return jax.jit(jax.value_and_grad(lambda u: jnp.sum(function(u)[..., 0])))(u)

    assert_shape(jax.eval_shape(layer, u), (2, 3, 4))
    chex.assert_trees_all_close(
        value_and_gradient(layer), value_and_gradient(composed), rtol=1e-5, atol=1e-7
    )


def test_capsnet_equals_the_paper_with_any_leading_axes(net, rng):
    for lead in ((), (3, 2)):
        images = some(rng, *lead, *SHAPE)
        output = apply(net, images)
        expected = capsnet(net, np.asarray(images))
        for result, paper in zip(output, expected, strict=True):
            assert_shape(result, paper.shape)
            np.testing.assert_allclose(result, paper, rtol=1e-4, atol=1e-5)


def test_flat_grouping_reaches_the_network(rng):
    model, images = network(grouping="flat"), some(rng, 2, *SHAPE)
    model.classes.weight[...] = 100 * model.classes.weight[...]
    lengths = apply(model, images).lengths
    expected, _, _ = capsnet(model, np.asarray(images), grouping="flat")
    np.testing.assert_allclose(lengths, expected, rtol=1e-4, atol=1e-5)
    other, _, _ = capsnet(model, np.asarray(images))
    assert np.abs(lengths - other).max() > 1e-3


def test_the_decoder_draws_the_capsule_of_the_label(net, rng):
    images, numbers = some(rng, 2, *SHAPE), np.array([2, 0])
    one_hot = np.eye(3, dtype=np.float32)[numbers]
    _, _, expected = capsnet(net, np.asarray(images), one_hot)
    for labels in (numbers, one_hot):
        drawn = apply(net, images, labels).reconstruction
        np.testing.assert_allclose(drawn, expected, rtol=1e-4, atol=1e-5)


def test_capsnet_under_vmap_is_capsnet_of_each_image(net, rng):
    images = some(rng, 3, *SHAPE)
    graphdef, params = nnx.split(net)
    mapped = jax.vmap(lambda image: nnx.merge(graphdef, params)(image))
    chex.assert_trees_all_close(jax.jit(mapped)(images), apply(net, images), rtol=1e-4, atol=1e-5)


def test_capsnet_in_bfloat16_stays_in_bfloat16_and_near(net, rng):
    images = some(rng, 2, *SHAPE)
    graphdef, params = nnx.split(net)
    halves = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    output = jax.jit(lambda p, x: nnx.merge(graphdef, p)(x))(halves, images.astype(jnp.bfloat16))
    assert {leaf.dtype for leaf in output} == {jnp.dtype(jnp.bfloat16)}
    lengths = output.lengths.astype(jnp.float32)
    np.testing.assert_allclose(lengths, apply(net, images).lengths, atol=0.05)


def test_every_parameter_has_a_finite_gradient_that_is_not_zero(rng):
    graphdef, params = nnx.split(network(routing_bias=True))
    images, labels = some(rng, 4, *SHAPE), np.array([0, 1, 2, 0])

    def loss(params):
        output = nnx.merge(graphdef, params)(images, labels)
        return capsjax.caps_loss(labels, output.lengths, images, output.reconstruction, 0.392)

    gradients = jax.jit(jax.grad(loss))(params)
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all()
        assert np.any(leaf)


@pytest.mark.parametrize(
    ("image_shape", "classes", "capsules"),
    [
        ((28, 28, 1), 47, 6 * 6 * 32),
        ((28, 28, 1), 2, 6 * 6 * 32),
        ((24, 21, 3), 5, 4 * 3 * 32),
        ((17, 17, 1), 10, 1 * 1 * 32),  # the smallest
    ],
)
def test_every_size_follows_from_the_image_and_the_classes(image_shape, classes, capsules):
    model = nnx.eval_shape(lambda: CapsNet(image_shape, classes, rngs=nnx.Rngs(0)))
    count = (
        (81 * image_shape[-1] + 1) * 256
        + (81 * 256 + 1) * 256
        + classes * capsules * 16 * 8
        + (classes * 16 + 1) * 512
        + (512 + 1) * 1024
        + (1024 + 1) * math.prod(image_shape)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == count
    output = nnx.eval_shape(lambda model, x: model(x), model, jnp.zeros((2, *image_shape)))
    assert_shape(output.lengths, (2, classes))
    assert_shape(output.capsules, (2, classes, 16))
    assert_shape(output.reconstruction, (2, *image_shape))


def test_a_network_is_a_function_of_its_seed():
    def leaves(seed):
        return jax.tree.leaves(nnx.state(network(seed)))

    chex.assert_trees_all_equal(leaves(0), leaves(0))
    for one, other in zip(leaves(0), leaves(1), strict=True):
        assert np.any(np.asarray(one) != np.asarray(other))


def test_parameters_are_all_that_a_network_holds(net):
    _, params, rest = nnx.split(net, nnx.Param, ...)
    assert jax.tree.leaves(params)
    assert not jax.tree.leaves(rest)


def test_a_network_is_traced_once_for_images_of_one_shape(net, rng):
    graphdef, params = nnx.split(net)
    once = jax.jit(chex.assert_max_traces(lambda p, x: nnx.merge(graphdef, p)(x), n=1))
    for _ in range(3):
        once(params, some(rng, 2, *SHAPE))


def test_predict_names_the_class_of_the_longest_capsule(net, rng):
    images = some(rng, 5, *SHAPE)
    prediction = capsjax.predict(net, images)
    output = apply(net, images)
    assert prediction.classes.dtype == jnp.int32
    np.testing.assert_array_equal(prediction.classes, np.argmax(output.lengths, -1))
    np.testing.assert_allclose(prediction.lengths, output.lengths, rtol=1e-5)
    np.testing.assert_allclose(prediction.reconstruction, output.reconstruction, rtol=1e-5)


def test_predict_takes_pixels_from_0_to_255_and_from_0_to_1(net, rng):
    images = rng.integers(256, size=(2, *SHAPE)).astype(np.uint8)
    as_floats = capsjax.predict(net, images.astype(np.float32) / 255)
    chex.assert_trees_all_close(capsjax.predict(net, images), as_floats, rtol=1e-5)


def test_predict_takes_one_image_or_many_with_or_without_the_channel(rng):
    model = network(image_shape=(9, 8, 1))
    images = rng.integers(256, size=(2, 9, 8, 1)).astype(np.uint8)
    batch = capsjax.predict(model, images)
    assert_shape(batch.reconstruction, (2, 9, 8, 1))
    chex.assert_trees_all_close(capsjax.predict(model, images[..., 0]), batch, rtol=1e-5)
    for image in (images[0], images[0, ..., 0]):
        one = capsjax.predict(model, image)
        assert_shape(one.classes, ())
        for result, first in zip(one, batch, strict=True):
            np.testing.assert_allclose(result, first[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 9, 2), (9, 8), (9, 8, 1), (2, 9, 8), (18,)])
@pytest.mark.parametrize("how", ["call", "jit", "predict"])
def test_images_of_another_size_are_an_error_in_words(net, shape, how):
    call = {
        "call": net,
        "jit": lambda images: apply(net, images),
        "predict": lambda images: capsjax.predict(net, images),
    }[how]
    with pytest.raises(ValueError, match=r"images \[\.\.\., 9, 8, 2\], got \[") as error:
        call(np.zeros(shape, np.float32))
    assert str(list(shape)) in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_shape": (16, 28, 1)}, "16×28×1.*9×9.*at least 17×17 pixels"),
        ({"image_shape": (28, 16, 1)}, "28×16×1.*at least 17×17 pixels"),
        ({"image_shape": (28, 28, 0)}, "28×28×0.*one channel"),
        ({"classes": 0}, "in 0 classes.*one class"),
        ({"routings": 0}, "int of 1 or more, got 0"),
        ({"routings": 1.5}, r"int of 1 or more, got 1\.5"),
        ({"init": "zeros"}, "one of .*uniform.*truncated_normal.*got 'zeros'"),
    ],
)
def test_a_network_that_cannot_be_built_is_an_error_in_words(options, message):
    with pytest.raises(ValueError, match=message):
        CapsNet(**options, rngs=nnx.Rngs(0))
