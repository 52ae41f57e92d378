"""Diagnoses: what is seen inside of networks, and measured of it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import capsjax
import reference
from capsjax import diagnostics
from capsjax.diagnostics import _diagnosis
from tiny import IMAGE, NUM_CLASSES, draw_arrays, make_capsnet, make_images, make_normalised
from tiny import N as N_IMAGES


@dataclasses.dataclass(frozen=True)
class Untold:
    """A routing that does not tell its couplings."""

    name = "untold"

    def initial_bias(self, j, i, d):
        return None

    def __call__(self, u, weight, bias=None):
        return capsjax.uniform_routing(capsjax.DenseVotes(u, weight))


ROUTINGS = [
    capsjax.Agreement(3, bias=True),
    capsjax.Agreement(2, leak=True),
    capsjax.Uniform(),
    capsjax.Random(seed=1),
    capsjax.SelfAttention(),
]


@pytest.mark.parametrize("routing", ROUTINGS, ids=lambda routing: routing.name)
def test_the_couplings_that_a_routing_tells_are_those_of_its_output(routing, rng):
    u = rng.normal(size=(3, 5, 2)).astype(np.float32)
    weight = rng.normal(size=(4, 5, 6, 2)).astype(np.float32)
    bias = routing.initial_bias(4, 5, 6)
    if bias is not None:
        bias = rng.normal(size=bias.shape).astype(np.float32)
    couplings = np.asarray(routing.couplings(u, weight, bias))
    assert couplings.shape == (3, 4, 5)
    u_hat = np.asarray(capsjax.predictions(u, weight))
    if routing.name == "self_attention":
        expected = reference.squash_exp(reference.sum_of_votes(u_hat, couplings + bias))
    else:
        added = 0 if bias is None else bias
        expected = reference.squash(reference.sum_of_votes(u_hat, couplings) + added)
    np.testing.assert_allclose(routing(u, weight, bias), expected, rtol=1e-4, atol=1e-5)


def test_observing_a_network_shows_the_state_of_procedure_1_after_each_iteration():
    net, (x, _) = make_capsnet(), make_images()
    output, layers = diagnostics.observe(net, x)
    (name,) = layers
    inputs, outputs, couplings = layers[name]
    assert name == "class_caps"
    u = jax.jit(lambda x: net.primary(jax.nn.relu(net.conv1(x))))(np.float32(x / 255))
    np.testing.assert_allclose(inputs, u, rtol=1e-4, atol=1e-6)
    u_hat = np.asarray(capsjax.predictions(inputs, net.class_caps.weight[...]))
    for number in (1, 2, 3):
        _, c, v = reference.routing_state(u_hat, number)
        np.testing.assert_allclose(couplings[number - 1], c, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(outputs[number - 1], v, rtol=1e-4, atol=1e-6)
    assert len(couplings) == len(outputs) == 3
    np.testing.assert_array_equal(output.capsules, outputs[-1])
    np.testing.assert_allclose(output.scores, capsjax.predict(net, x).scores, rtol=1e-5)


def test_observing_leaves_the_network_as_it_is():
    net, (x, _) = make_capsnet(), make_images()
    before = nnx.graphdef(net)
    diagnostics.observe(net, x)
    assert nnx.graphdef(net) == before


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"expected images \[\.\.\., 8, 8, 1\]"):
        diagnostics.observe(make_capsnet(), np.zeros((2, 9, 9, 1)))


class Stack(capsjax.Network):
    """Two capsule layers, one on the other, of the pixels as they are."""

    def __init__(self, config, image_shape, num_classes, rngs):
        super().__init__(config, image_shape, num_classes)
        pixels = math.prod(image_shape)
        layer = capsjax.nn.DenseCaps
        self.lower = layer(pixels // 4, 4, 6, 4, rngs=rngs)
        self.heads = nnx.List([layer(6, 4, num_classes, 3, 2, rngs=rngs)])

    def __call__(self, images, labels=None):
        v = self.heads[0](self.lower(images.reshape(*images.shape[:-3], -1, 4)))
        return capsjax.Output(capsjax.length(v), v, None)


def make_stack():
    return draw_arrays(lambda: Stack(None, IMAGE, NUM_CLASSES, nnx.Rngs(0)), scale=1)


def test_a_diagnosis_finds_the_dead_capsules_of_a_stack():
    net, (x, y) = make_stack(), make_images()
    net.lower.weight[...] = net.lower.weight[...].at[4].set(0)
    found = diagnostics.diagnose(net, x, y)
    assert list(found.layers) == ["primary", "lower", "heads.0"]
    assert found.layers["lower"].dead.tolist() == [False, False, False, False, True, False]
    assert found.layers["lower"].mean[4] == 0
    assert not found.layers["primary"].dead.any()
    assert len(found.couplings) == 2  # of the last layer


def measure(couplings):
    """Measures couplings by the functions of arrays, in the order of the fields."""
    numbers = (
        diagnostics.coupling_entropy(couplings).mean(),
        diagnostics.active(couplings).any(-2).mean(),
        diagnostics.bonding(couplings),
        diagnostics.dynamics(couplings),
    )
    return tuple(map(float, numbers))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [N_IMAGES, N_IMAGES // 2])
def test_a_diagnosis_is_made_of_the_functions_whatever_the_size_of_its_pieces(batch_size):
    net, (x, y) = make_stack(), make_images()
    found = diagnostics.diagnose(net, x, y, batch_size=batch_size)
    assert found.images == len(x)
    _, outputs, couplings = diagnostics.observe(net, x).layers["heads.0"]
    for scores, statistics, v, c in zip(
        found.scores, found.couplings, outputs, couplings, strict=True
    ):
        lengths = np.asarray(capsjax.length(v))
        assert scores.error == pytest.approx(np.mean(lengths.argmax(-1) != y))
        expected = diagnostics.score_histogram(lengths, y)
        np.testing.assert_array_equal(scores.histogram.present, expected.present)
        np.testing.assert_array_equal(scores.histogram.absent, expected.absent)
        assert statistics == pytest.approx(measure(c), rel=1e-5)
    assert found.couplings[-1].active > 0.1  # or the other numbers would be 0


def test_a_network_in_bfloat16_is_measured_in_float32():
    net, (x, y) = make_stack(), make_images()
    found = diagnostics.diagnose(net, jnp.asarray(x / 255, jnp.bfloat16), y)
    lengths = capsjax.length(diagnostics.observe(net, x).layers["lower"].inputs)
    assert found.layers["primary"].mean.dtype == np.float32
    np.testing.assert_allclose(found.layers["primary"].mean, lengths.mean(0), rtol=1e-2)


@pytest.mark.parametrize("kept", [N_IMAGES // 2 + 3, 1])
def test_of_more_couplings_than_memory_shall_hold_those_of_the_first_images_count(
    kept, monkeypatch
):
    net, (x, y) = make_stack(), make_images()
    an_image = 2 * NUM_CLASSES * 6
    monkeypatch.setattr(_diagnosis, "_MOST_COUPLINGS", kept * an_image if kept > 1 else 0)
    found = diagnostics.diagnose(net, x, y, batch_size=N_IMAGES // 2)
    _, _, couplings = diagnostics.observe(net, x).layers["heads.0"]
    for statistics, c in zip(found.couplings, couplings, strict=True):
        assert statistics == pytest.approx(measure(c[:kept]), rel=1e-5)


@pytest.mark.parametrize(
    ("routing", "told"), [(capsjax.Uniform(), 1), (capsjax.SelfAttention(), 1), (Untold(), 0)]
)
def test_a_routing_without_iterations_is_measured_once_if_it_tells_its_couplings(routing, told):
    found = diagnostics.diagnose(make_capsnet(routing=routing), *make_images())
    assert (len(found.scores), len(found.couplings)) == (1, told)


def make_matrix() -> capsjax.MatrixCapsNet:
    sizes = {"channels": 4, "types": (2, 3), "kernel_sizes": (3, 2), "strides": (2, 1)}
    return draw_arrays(
        lambda: capsjax.MatrixCapsNet(IMAGE, NUM_CLASSES, routing=2, **sizes, rngs=nnx.Rngs(0))
    )


@pytest.mark.slow
def test_observing_capsules_of_poses_shows_em_after_each_iteration():
    net, (x, y) = make_matrix(), make_images()
    output, layers = diagnostics.observe(net, x)
    assert list(layers) == ["conv_caps.0", "class_caps"]
    conv, last = layers.values()
    assert conv.inputs.poses.shape == (len(x), 2, 2, 8, 16)  # windows of 2 × 2, 2 types
    assert conv.outputs[-1].activations.shape == (len(x), 2, 2, 3)
    assert conv.couplings == ()
    np.testing.assert_array_equal(output.scores, last.outputs[-1].activations)
    np.testing.assert_allclose(last.couplings[0], 1 / NUM_CLASSES, rtol=1e-6)
    np.testing.assert_allclose(np.sum(last.couplings[1], 1), 1, rtol=1e-5)
    net.class_caps.routing = capsjax.EM(iterations=1)
    np.testing.assert_allclose(
        capsjax.predict(net, x).scores, last.outputs[0].activations, rtol=1e-5
    )
    found = diagnostics.diagnose(make_matrix(), x, y)
    assert list(found.layers) == ["windows", "conv_caps.0", "class_caps"]
    assert len(found.scores) == len(found.couplings) == 2
    activations = last.outputs[-1].activations
    np.testing.assert_allclose(found.layers["class_caps"].mean, activations.mean(0), rtol=1e-4)
    assert found.couplings[0].entropy == pytest.approx(1, rel=1e-5)


class Positions(capsjax.Network):
    """Capsules at every position, then those of the classes."""

    def __init__(self, config, image_shape, num_classes, rngs):
        super().__init__(config, image_shape, num_classes)
        self.conv_caps = capsjax.nn.ConvCaps(1, 4, 3, 4, 2, strides=2, rngs=rngs)
        self.class_caps = capsjax.nn.ConvCaps(3, 4, num_classes, 4, 2, rngs=rngs)

    def __call__(self, images, labels=None):
        u = images.reshape(*images.shape[:-2], -1, 1, 4)  # four neighbours in a row
        u = u.repeat(4, -3)
        v = self.class_caps(self.conv_caps(u))[..., 0, 0, :, :]
        return capsjax.Output(capsjax.length(v), v, None)


def test_capsules_of_a_convolutional_layer_are_those_at_each_position():
    net, (x, y) = (
        draw_arrays(lambda: Positions(None, IMAGE, NUM_CLASSES, nnx.Rngs(0))),
        make_images(),
    )
    weight = net.conv_caps.weight
    weight[...] = weight[...].at[1].set(0)
    found = diagnostics.diagnose(net, x, y)
    assert found.layers["windows"].mean.shape == (3, 3, 9)
    expected = np.broadcast_to(np.arange(3) == 1, (3, 3, 3))
    np.testing.assert_array_equal(found.layers["conv_caps"].dead, expected)
    assert len(found.couplings) == 2
    assert found.couplings[0].entropy == pytest.approx(1, rel=1e-5)


class Pixels(capsjax.Network):
    """Scores the classes by a few pixels: no capsule layer."""

    def __call__(self, images, labels=None):
        capsules = images[..., : self.num_classes, :4, 0]
        return capsjax.Output(capsjax.length(capsules), self.config and capsules, None)


@pytest.mark.parametrize("capsules", [True, False])
def test_without_a_capsule_layer_only_the_scores_of_capsules_are_measured(capsules):
    found = diagnostics.diagnose(Pixels(capsules or None, IMAGE, NUM_CLASSES), *make_images())
    assert (len(found.scores), found.couplings, found.layers) == (int(capsules), (), {})


def test_scores_that_are_no_lengths_are_those_of_the_network():
    class Doubled(type(make_normalised())):
        def __call__(self, images, labels=None):
            output = super().__call__(images)
            return output._replace(scores=output.scores / 2)

    net = Doubled(make_normalised().config, IMAGE, NUM_CLASSES, rngs=nnx.Rngs(0))
    x, y = make_images()
    found = diagnostics.diagnose(net, x, y)
    expected = diagnostics.score_histogram(capsjax.predict(net, x).scores, y)
    (scores,) = found.scores
    assert scores.histogram.present.sum() == len(x)
    np.testing.assert_array_equal(scores.histogram.present, expected.present)
    assert len(found.couplings) == 3


@pytest.mark.parametrize(
    ("images", "labels"), [((3, 8, 8), 3), ((0, 8, 8, 1), 0), ((3, 8, 8, 1), 2)]
)
def test_a_diagnosis_of_no_images_or_other_labels_is_refused(images, labels):
    with pytest.raises(ValueError, match=r"diagnose: expected images \[N, H, W, C\] and labels"):
        diagnostics.diagnose(make_capsnet(), np.zeros(images), np.zeros(labels, int))


@pytest.mark.parametrize("size", [0, -1])
def test_pieces_of_no_images_are_refused(size):
    with pytest.raises(ValueError, match=f"batch_size is 1 or more, got {size}"):
        diagnostics.diagnose(make_capsnet(), *make_images(), batch_size=size)
