"""A task of one's own that changes the images is trained, tested and drawn like any other."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from capsjax import weights
from capsjax.tasks import Classification
from tiny_run import EXPERIMENT, read_json, run_command

pytestmark = pytest.mark.slow


@dataclasses.dataclass(frozen=True)
class Padded(Classification):
    """A classification of images with two more pixels on every side."""

    def train_batch(self, key, images, labels, indices):
        return pad(super().train_batch(key, images, labels, indices))

    def test_batch(self, images, labels, indices):
        return pad(super().test_batch(images, labels, indices))


def pad(batch):
    images = jnp.pad(batch.images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    return batch._replace(images=images, targets=images)


PADDED = dataclasses.replace(
    EXPERIMENT, make_task=lambda training: Padded(training.lam_recon, training.shift_pixels)
)


def test_network_losses_and_pictures_follow_from_the_images_that_the_task_makes(base, tmp_path):
    outcome = run_command(PADDED, pictures=True, epochs=1, save_dir=tmp_path / "run", **base)
    assert outcome.status == 0, outcome.err
    assert weights.load(tmp_path / "run" / "weights.safetensors").image_shape == (14, 14, 1)
    training = read_json(tmp_path / "run")["settings"]["training"]
    np.testing.assert_allclose(training["lam_recon"], 0.0005 * 14 * 14)
    for name in ("reconstructions.png", "perturbations.png", "errors.png"):
        with Image.open(tmp_path / "run" / name) as picture:
            assert min(picture.size) > 100
