"""Matrix capsules: the network's sizes, its layers in a row, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import capsjax
from capsjax import EM
from capsjax.presets import MATRIX


def count_parameters(**shape) -> int:
    net = nnx.eval_shape(lambda: capsjax.MatrixCapsNet(**shape, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(net, nnx.Param)))


def test_the_network_has_as_many_parameters_as_the_papers():
    assert count_parameters() == 68_308
    assert count_parameters(image_shape=(32, 32, 2), num_classes=5) == 68_618


def test_its_output_is_that_of_its_layers_in_a_row():
    sizes = {"channels": 4, "types": (2, 3), "kernel_sizes": (3, 2), "strides": (2, 1)}
    build = lambda: nnx.split(  # noqa: E731
        capsjax.MatrixCapsNet((9, 8, 3), 4, routing=1, rngs=nnx.Rngs(0), **sizes)
    )
    graphdef, params = jax.jit(build)()
    images = np.random.default_rng(0).uniform(size=(2, 9, 8, 3)).astype(np.float32)

    @jax.jit
    def apply(params, images):
        net = nnx.merge(graphdef, params)
        capsules = net.primary(jax.nn.relu(net.conv(images)))
        layers = [capsules]
        for layer in [*net.conv_caps, net.class_caps]:
            layers.append(layer(layers[-1]))
        return net(images), layers

    output, layers = apply(params, images)
    assert [layer.poses.shape for layer in layers] == [
        (2, 4, 3, 2, 16),
        (2, 3, 2, 3, 16),
        (2, 4, 16),
    ]
    np.testing.assert_array_equal(output.scores, layers[-1].activations)
    np.testing.assert_array_equal(output.capsules, layers[-1].poses)
    assert output.reconstruction is None


def test_the_preset_has_two_iterations_of_em_and_the_spread_loss():
    assert MATRIX.network.routing == EM(iterations=2)
    assert MATRIX.training.loss == "spread"


@pytest.mark.parametrize(
    ("shape", "sizes", "words"),
    [
        ((16, 28, 1), {}, "need images of at least 17×17 pixels"),
        ((28, 28, 1), {"strides": (2, 1)}, "kernel_sizes and strides are one for the convolution"),
        ((28, 28, 1), {"side": 1}, "the side of a matrix is 2 or more, got 1"),
        (
            (28, 28, 1),
            {"types": (8, 0, 16)},
            r"integers of 1 or more, got types = \(8, 0, 16\)",
        ),
        (
            (28, 28, 1),
            {"routing": capsjax.Uniform()},
            "a number of iterations or a capsjax.EM",
        ),
        ((28, 28, 1), {"routing": 0}, "iterations"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_words(shape, sizes, words):
    with pytest.raises(ValueError, match=words):
        capsjax.MatrixCapsNet(shape, rngs=nnx.Rngs(0), **sizes)


def test_the_smallest_images_leave_one_position_for_the_class_capsules():
    def predict(images):
        return capsjax.MatrixCapsNet((17, 17, 1), rngs=nnx.Rngs(0))(images)

    output = jax.eval_shape(predict, jax.ShapeDtypeStruct((2, 17, 17, 1), jnp.float32))
    assert output.scores.shape == (2, 10)
