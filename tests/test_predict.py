"""What all networks have: how they predict, and what the base class refuses."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_shape
from flax import nnx

import capsjax
import tiny
from capsjax.networks import Network, Output


def test_predict_names_the_class_of_the_longest_capsule(rng):
    net = tiny.make_capsnet()
    images = rng.uniform(size=(5, *tiny.IMAGE)).astype(np.float32)
    prediction: Any = capsjax.predict(net, images)
    graphdef, arrays = nnx.split(net)
    output = jax.jit(lambda arrays, x: nnx.merge(graphdef, arrays)(x))(arrays, images)
    assert prediction.predicted.dtype == jnp.int32
    np.testing.assert_array_equal(prediction.predicted, np.argmax(output.scores, -1))
    np.testing.assert_allclose(prediction.scores, output.scores, rtol=1e-5)
    np.testing.assert_allclose(prediction.reconstruction, output.reconstruction, rtol=1e-5)


def test_predict_takes_pixels_from_0_to_255_and_from_0_to_1(rng):
    net = tiny.make_capsnet()
    images = rng.integers(256, size=(2, *tiny.IMAGE)).astype(np.uint8)
    as_floats = capsjax.predict(net, images.astype(np.float32) / 255)
    chex.assert_trees_all_close(capsjax.predict(net, images), as_floats, rtol=1e-5)


def test_predict_takes_black_and_white_images(rng):
    net = tiny.make_capsnet()
    images = rng.random((3, *tiny.IMAGE)) < 0.5
    white, grey = (capsjax.predict(net, x).scores for x in (images, images.astype(np.float32)))
    np.testing.assert_array_equal(white, grey)


def test_predict_takes_one_image_or_many_with_or_without_the_channel(rng):
    model = tiny.make_capsnet()
    images = rng.integers(256, size=(2, *tiny.IMAGE)).astype(np.uint8)
    batch: Any = capsjax.predict(model, images)
    assert_shape(batch.reconstruction, (2, *tiny.IMAGE))
    chex.assert_trees_all_close(capsjax.predict(model, images[..., 0]), batch, rtol=1e-5)
    for image in (images[0], images[0, ..., 0]):
        one: Any = capsjax.predict(model, image)
        assert_shape(one.predicted, ())
        for result, first in zip(one, batch, strict=True):
            np.testing.assert_allclose(result, first[0], rtol=1e-4, atol=1e-6)


def test_a_prediction_without_a_decoder_has_no_reconstruction(rng):
    images = rng.uniform(size=(5, *tiny.IMAGE)).astype(np.float32)
    prediction = capsjax.predict(tiny.make_normalised(), images)
    assert prediction.reconstruction is None
    assert_shape(prediction.scores, (5, tiny.NUM_CLASSES))
    np.testing.assert_array_equal(prediction.predicted, np.argmax(prediction.scores, -1))


def test_the_predicted_class_is_that_of_the_highest_score_of_equal_ones_the_first():
    scores = jnp.array([[[0.1, 0.3, 0.3], [0.9, 0.2, 0.1]]])
    predicted = Output(scores, jnp.zeros((1, 2, 3, 4)), None).predicted
    assert predicted.tolist() == [[1, 0]]
    assert predicted.dtype == jnp.int32


def test_a_network_without_call_or_decoder_says_so():
    class Bare(Network):
        pass

    bare = Bare(None, tiny.IMAGE, 5)
    with pytest.raises(TypeError, match="Bare defines no __call__"):
        bare(jnp.zeros(tiny.IMAGE))
    with pytest.raises(TypeError, match="Bare has no decoder"):
        bare.decode(jnp.zeros((5, 4)))
    with pytest.raises(ValueError, match=r"Bare: expected images .*8, 8, 1\], got \[8, 8\]"):
        bare.check_images(jnp.zeros((8, 8)))
