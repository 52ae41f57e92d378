"""CapsNet: its outputs, its sizes, and what cannot be built."""

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_shape
from flax import nnx

import capsjax
import reference
from capsjax import Agreement, CapsNet
from capsjax.networks import CapsNetConfig

SHAPE = (9, 8, 2)  # not square, two channels
SMALL: dict[str, Any] = {
    "image_shape": SHAPE,
    "num_classes": 3,
    "channels": 4,
    "kernel_size": 3,
    "types": 2,
    "dim_primary": 4,
    "dim_class": 4,
    "hidden": (6,),
}
SIZES = {name: value for name, value in SMALL.items() if name not in ("image_shape", "num_classes")}


def make_network(seed: int = 0, **options: Any) -> CapsNet:
    """Makes a small network, with options that differ from SMALL."""
    return CapsNet(**{**SMALL, **options}, rngs=nnx.Rngs(seed))


def apply(model, *args):
    """Calls a model jitted: op by op, a network compiles a hundred times."""
    graphdef, params = nnx.split(model)
    return jax.jit(lambda params, *args: nnx.merge(graphdef, params)(*args))(params, *args)


def draw(rng, *shape):
    return jnp.asarray(rng.uniform(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def net() -> CapsNet:
    """A small network, its weights so large that its capsules differ."""
    model = make_network()
    model.class_caps.weight[...] = 100 * model.class_caps.weight[...]
    return model


def compute_by_hand(model, images, labels=None, grouping="channels"):
    """Computes lengths, capsules and reconstruction by the paper's loops."""
    model = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    conv1, primary = model["conv1"], model["primary"]["conv"]
    x = np.maximum(reference.conv(images, conv1["kernel"], 1) + conv1["bias"], 0)
    u = reference.primary_capsules(x, **primary, dim=4, grouping=grouping)
    u_hat = reference.predictions(u, model["class_caps"]["weight"])
    _, _, v = reference.routing_state(u_hat, 3)
    kept = reference.longest(v) if labels is None else labels
    layers = [(layer["kernel"], layer["bias"]) for layer in model["decoder"].values()]
    pixels = reference.decode(layers, reference.mask(v, kept))
    return reference.length(v), v, pixels.reshape(images.shape)


def test_capsnet_equals_the_paper_with_any_leading_axes(net, rng):
    for lead in ((), (3, 2)):
        images = draw(rng, *lead, *SHAPE)
        output = apply(net, images)
        expected = compute_by_hand(net, np.asarray(images))
        for result, paper in zip(output, expected, strict=True):
            assert_shape(result, paper.shape)
            np.testing.assert_allclose(result, paper, rtol=1e-4, atol=1e-5)


def test_flat_grouping_reaches_the_network(rng):
    model, images = make_network(grouping="flat"), draw(rng, 2, *SHAPE)
    model.class_caps.weight[...] = 100 * model.class_caps.weight[...]
    lengths = apply(model, images).scores
    expected, _, _ = compute_by_hand(model, np.asarray(images), grouping="flat")
    np.testing.assert_allclose(lengths, expected, rtol=1e-4, atol=1e-5)
    other, _, _ = compute_by_hand(model, np.asarray(images))
    assert np.abs(lengths - other).max() > 1e-3


def test_the_decoder_draws_the_capsule_of_the_label(net, rng):
    images, numbers = draw(rng, 2, *SHAPE), np.array([2, 0])
    one_hot = np.eye(3, dtype=np.float32)[numbers]
    _, _, expected = compute_by_hand(net, np.asarray(images), one_hot)
    for labels in (numbers, one_hot):
        drawn = apply(net, images, labels).reconstruction
        np.testing.assert_allclose(drawn, expected, rtol=1e-4, atol=1e-5)


def test_capsnet_under_vmap_is_capsnet_of_each_image(net, rng):
    images = draw(rng, 3, *SHAPE)
    graphdef, params = nnx.split(net)
    mapped = jax.vmap(lambda image: nnx.merge(graphdef, params)(image))
    chex.assert_trees_all_close(jax.jit(mapped)(images), apply(net, images), rtol=1e-4, atol=1e-5)


def test_capsnet_in_bfloat16_stays_in_bfloat16_and_near(net, rng):
    images = draw(rng, 2, *SHAPE)
    graphdef, params = nnx.split(net)
    halves = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    output = jax.jit(lambda p, x: nnx.merge(graphdef, p)(x))(halves, images.astype(jnp.bfloat16))
    assert {leaf.dtype for leaf in output} == {jnp.dtype(jnp.bfloat16)}
    lengths = output.scores.astype(jnp.float32)
    np.testing.assert_allclose(lengths, apply(net, images).scores, atol=0.05)


def test_every_parameter_has_a_finite_gradient_that_is_not_zero(rng):
    graphdef, params = nnx.split(make_network(routings=Agreement(bias=True)))
    images, labels = draw(rng, 4, *SHAPE), np.array([0, 1, 2, 0])

    def loss(params):
        output: Any = nnx.merge(graphdef, params)(images, labels)
        return capsjax.caps_loss(labels, output.scores, images, output.reconstruction, 0.392)

    gradients = jax.jit(jax.grad(loss))(params)
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all()
        assert np.any(leaf)


@pytest.mark.parametrize(
    ("image_shape", "num_classes", "capsules"),
    [
        ((28, 28, 1), 47, 6 * 6 * 32),
        ((28, 28, 1), 2, 6 * 6 * 32),
        ((24, 21, 3), 5, 4 * 3 * 32),
        ((17, 17, 1), 10, 1 * 1 * 32),  # the smallest
    ],
)
def test_every_size_follows_from_the_image_and_the_classes(image_shape, num_classes, capsules):
    model = nnx.eval_shape(lambda: CapsNet(image_shape, num_classes, rngs=nnx.Rngs(0)))
    count = (
        (81 * image_shape[-1] + 1) * 256
        + (81 * 256 + 1) * 256
        + num_classes * capsules * 16 * 8
        + (num_classes * 16 + 1) * 512
        + (512 + 1) * 1024
        + (1024 + 1) * math.prod(image_shape)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == count
    output = nnx.eval_shape(lambda model, x: model(x), model, jnp.zeros((2, *image_shape)))
    assert_shape(output.scores, (2, num_classes))
    assert_shape(output.capsules, (2, num_classes, 16))
    assert_shape(output.reconstruction, (2, *image_shape))


def test_a_network_is_a_function_of_its_seed():
    def leaves(seed):
        return jax.tree.leaves(nnx.state(make_network(seed)))

    chex.assert_trees_all_equal(leaves(0), leaves(0))
    for one, other in zip(leaves(0), leaves(1), strict=True):
        assert np.any(np.asarray(one) != np.asarray(other))


def test_parameters_are_all_that_a_network_holds(net):
    parts: Any = nnx.split(net, nnx.Param, ...)
    _, params, rest = parts
    assert jax.tree.leaves(params)
    assert not jax.tree.leaves(rest)


def test_a_network_is_traced_once_for_images_of_one_shape(net, rng):
    graphdef, params = nnx.split(net)
    once = jax.jit(chex.assert_max_traces(lambda p, x: nnx.merge(graphdef, p)(x), n=1))
    for _ in range(3):
        once(params, draw(rng, 2, *SHAPE))


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
    ("routings", "expected"),
    [
        (None, Agreement(3)),
        (1, Agreement(1)),
        (5, Agreement(5)),
        (Agreement(2, bias=True, stop_gradient=False), Agreement(2, True, False)),
    ],
)
def test_routings_are_a_number_of_iterations_or_any_routing(routings, expected):
    model = make_network(routings=routings)
    assert model.class_caps.routing == model.config.routing == expected
    assert (model.class_caps.bias is not None) == expected.bias


def test_without_routings_those_of_the_config_count():
    config = CapsNetConfig(**SIZES, routing=Agreement(4, bias=True))
    for routings, expected in ((None, Agreement(4, bias=True)), (2, Agreement(2))):
        model = CapsNet(SHAPE, 3, routings, config=config, rngs=nnx.Rngs(0))
        assert model.class_caps.routing == model.config.routing == expected
    assert CapsNetConfig(routing=4) == CapsNetConfig(routing=Agreement(4))


def test_sizes_replace_those_of_the_config():
    config = CapsNetConfig(**SIZES)
    model = nnx.eval_shape(
        lambda: CapsNet(SHAPE, 3, config=config, types=5, hidden=(7, 8), rngs=nnx.Rngs(0))
    )
    assert model.config == CapsNetConfig(**{**SIZES, "types": 5, "hidden": (7, 8)})
    assert model.primary.conv.kernel.shape == (3, 3, 4, 5 * 4)
    assert [layer.kernel.shape[1] for layer in model.decoder] == [7, 8, math.prod(SHAPE)]
    assert config == CapsNetConfig(**SIZES)
    with pytest.raises(TypeError, match="'size'"):
        CapsNet(SHAPE, 3, size=5, rngs=nnx.Rngs(0))


def test_a_config_builds_the_network_that_its_sizes_make():
    config = CapsNetConfig(**SIZES)
    built = config.build(SHAPE, 3, rngs=nnx.Rngs(0))
    assert nnx.split(built)[0] == nnx.split(make_network())[0]
    expected = jax.tree.leaves(nnx.state(make_network()))
    chex.assert_trees_all_equal(jax.tree.leaves(nnx.state(built)), expected)
    assert (built.config, built.image_shape, built.num_classes) == (config, SHAPE, 3)


def test_hidden_layers_and_image_shape_may_be_lists(rng):
    model = make_network(hidden=[6], image_shape=[*SHAPE])
    assert nnx.split(model)[0] == nnx.split(make_network())[0]
    assert capsjax.predict(model, draw(rng, 2, *SHAPE)).scores.shape == (2, 3)


def test_the_decoder_draws_capsules_as_the_network_does(net, rng):
    images, labels = draw(rng, 2, *SHAPE), np.array([2, 0])
    decode = jax.jit(lambda capsules, labels=None: net.decode(capsules, labels))
    for given in ((), (labels,)):
        output = apply(net, images, *given)
        drawn = decode(output.capsules, *given)
        np.testing.assert_allclose(drawn, output.reconstruction, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_shape": (16, 28, 1)}, "16×28×1.*9×9.*at least 17×17 pixels"),
        ({"image_shape": (28, 16, 1)}, "28×16×1.*at least 17×17 pixels"),
        ({"image_shape": (28, 28, 0)}, "28×28×0.*one channel"),
        ({"num_classes": 0}, "in 0 classes.*one class"),
        ({"routings": 0}, "int of 1 or more, got 0"),
        ({"routings": 1.5}, r"int of 1 or more, got 1\.5"),
        ({"routings": True}, "int of 1 or more, got True"),
        ({"routing": 0}, "int of 1 or more, got 0"),
        ({"init": "zeros"}, "one of .*uniform.*truncated_normal.*got 'zeros'"),
        ({"grouping": "rows"}, "grouping is one of .*channels.*flat.*got 'rows'"),
        ({"primary_coupling": math.nan}, "primary_coupling is a number above 0, got nan"),
        ({"hidden": (512, 0)}, r"sizes are integers of 1 or more, got hidden = \(512, 0\)"),
        *[
            ({name: 0}, f"sizes are integers of 1 or more, got {name} = 0")
            for name in ("channels", "kernel_size", "types", "dim_primary", "dim_class")
        ],
        ({"types": -1}, "got types = -1"),
        ({"channels": 16.5}, r"CapsNet: sizes are integers of 1 or more, got channels = 16\.5"),
        ({"hidden": 512}, "got hidden = 512"),
        ({"image_shape": (28, 28)}, r"expected image_shape \(H, W, C\), got \(28, 28\)"),
    ],
)
def test_a_network_that_cannot_be_built_is_an_error_in_words(options, message):
    with pytest.raises(ValueError, match=message):
        CapsNet(**options, rngs=nnx.Rngs(0))


def test_routings_and_routing_together_are_refused():
    with pytest.raises(TypeError, match="give routings or routing, not both"):
        CapsNet(routings=2, routing=3, rngs=nnx.Rngs(0))
