import functools

import chex
import jax
import numpy as np
import pytest
from flax import nnx

import capsjax
from capsjax.networks import Ensemble
from tiny import draw_arrays


def make(seed: int, image_shape=(10, 10, 1), num_classes=3, **sizes) -> capsjax.CapsNet:
    sizes = {"channels": 4, "kernel_size": 3, "types": 2, "hidden": (8,), "routings": 1} | sizes
    build = functools.partial(capsjax.CapsNet, image_shape, num_classes, **sizes)
    return draw_arrays(lambda: build(rngs=nnx.Rngs(0)), seed=seed)


IMAGES = np.random.default_rng(0).random((7, 10, 10, 1), np.float32)


def test_scores_are_the_mean_of_the_members_scores_whatever_their_sizes():
    members = [make(0, dim_class=4), make(1, dim_class=6, routings=2)]
    answers = [capsjax.predict(member, IMAGES) for member in members]
    answer = capsjax.predict(Ensemble(members), IMAGES)
    mean = np.mean([scores for _, scores, _ in answers], axis=0)
    np.testing.assert_allclose(answer.scores, mean, rtol=1e-6)
    np.testing.assert_array_equal(answer.predicted, mean.argmax(-1))
    assert answer.reconstruction is None
    chex.assert_shape(jax.eval_shape(Ensemble(members), IMAGES).capsules, (7, 3, 4 + 6))


def test_with_a_member_without_capsules_there_are_none():
    sizes = {"channels": (2,), "kernel_sizes": (3,), "hidden": ()}
    members = [make(0), capsjax.CNN((10, 10, 1), 3, **sizes, rngs=nnx.Rngs(0))]
    net = Ensemble(members)
    net.eval()
    output = jax.eval_shape(net, IMAGES)
    assert output.capsules is None
    chex.assert_shape(output.scores, (7, 3))


def test_an_ensemble_of_one_answers_as_its_member_does():
    member = make(0)
    alone, together = (capsjax.predict(net, IMAGES) for net in (member, Ensemble([member])))
    np.testing.assert_array_equal(alone.predicted, together.predicted)
    np.testing.assert_allclose(alone.scores, together.scores, rtol=1e-6)


@pytest.mark.parametrize(
    ("members", "got"),
    [
        ([], "got none"),
        ([make(0), make(0, num_classes=4)], r"got \[10, 10, 1\] in 3 and \[10, 10, 1\] in 4"),
        ([make(0), make(0, (10, 12, 1))], r"got \[10, 10, 1\] in 3 and \[10, 12, 1\] in 3"),
    ],
    ids=["none", "classes", "images"],
)
def test_members_for_other_images_or_classes_are_refused(members, got):
    with pytest.raises(ValueError, match=f"expected networks for the same images .*{got}"):
        Ensemble(members)
