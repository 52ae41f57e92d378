"""smallNORB: stereo photographs of toys, of which a part of 32 × 32 is seen.

python experiments/small_norb.py --data-dir small_norb
python experiments/small_norb.py --data-dir small_norb --network matrix

The folder holds smallNORB's own four files, `-dat.mat` and `-cat.mat` of training and testing. The
photographs of both cameras are two channels of 48 × 48 pixels. In training a window of 32 × 32 is
cut out of each at random, in tests the middle one. The authors also change brightness and contrast
and standardise each image, which is not done here. They report 2.7 % for CapsNet (2017) and 1.8 %
for matrix capsules (2018).

References: LeCun, Huang, Bottou, "Learning Methods for Generic Object Recognition", 2004. Sabour,
Frosst, Hinton, 2017, arXiv:1710.09829, §7. Hinton, Sabour, Frosst, "Matrix Capsules with EM
Routing", ICLR 2018, §5.
"""

import dataclasses

import jax
from jax.typing import ArrayLike

from capsjax.data import crop
from capsjax.presets import MATRIX, SEED, Preset, Training, check
from capsjax.run import Experiment, main
from capsjax.tasks import Batch, Classification, Images

WINDOW = 32  # pixels of a side


@dataclasses.dataclass(frozen=True)
class Windows(Classification):
    """Classifies a part of each image."""

    def train_batch(
        self, key: jax.Array, images: Images, labels: jax.Array, indices: ArrayLike
    ) -> Batch:
        move, cut = jax.random.split(key)
        return _cut(cut, super().train_batch(move, images, labels, indices))

    def test_batch(self, images: Images, labels: jax.Array, indices: ArrayLike) -> Batch:
        return _cut(None, super().test_batch(images, labels, indices))


def _cut(key: jax.Array | None, batch: Batch) -> Batch:
    window = crop(key, batch.images, WINDOW)
    return batch._replace(images=window, targets=window)


def make_task(training: Training) -> Windows:
    """Makes the task; the photographs are moved by their windows and nothing else."""
    for name in ("rotation", "shear", "zoom", "elastic", "shift_pixels"):
        value = getattr(training, name)
        check(not value, name, "0: only the windows move", value)
    assert training.lam_recon is not None
    return Windows(training.lam_recon, loss=training.loss, margin_steps=training.margin_steps)


def unmoved(preset: Preset) -> Preset:
    """Returns a preset without shifts."""
    training = dataclasses.replace(preset.training, shift_pixels=0)
    return dataclasses.replace(preset, training=training)


SMALL_NORB = Experiment(
    description="Train a capsule network on smallNORB, test it, and draw what it learnt.",
    presets={"seed": unmoved(SEED), "matrix": unmoved(MATRIX)},
    make_task=make_task,
    dataset="smallnorb",
)

if __name__ == "__main__":
    main(SMALL_NORB)
