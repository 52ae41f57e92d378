"""affNIST: are digits that were only shifted in training still read when rotated and sheared?

python experiments/affnist.py --routings 3
python experiments/affnist.py --routing uniform
python experiments/affnist.py --network cnn
python experiments/affnist.py --testing --weights RUN --affnist test.mat

A network trains on digits of a canvas of 40 × 40, shifted by up to 6 pixels, and stops after the
first epoch that reads 99.23 % of 10,000 shifted digits held out of the training digits. Thus
networks are compared that read shifted digits equally well; none of them has seen another affine
map. The test images are those of affNIST's test.mat, a file that one has to get oneself. Without
it they are the 10,000 test digits, each moved once by a map of affNIST's ranges: a synthetic set.

The paper enumerates all 169 shifts of a digit and decides when to stop on shifted test digits. It
reports 79 % for CapsNet and 66 % for a convolutional network with about as many parameters. Two
others who tried found CapsNet below such a network
(ruslangrimov/capsnet-with-capsulewise-convolution and cybertronai/hinton-problems).

References: Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules", 2017, arXiv:1710.09829,
§5.2. Tieleman, affNIST, 2013: cs.toronto.edu/~tijmen/affNIST.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import scipy.io
import scipy.ndimage

from capsjax import data
from capsjax.networks import CNNConfig
from capsjax.presets import SEED, Preset
from capsjax.run import Experiment, main

SHIFT = 6  # pixels, also the margin around a digit
ROTATION, SHEAR, ZOOM = 20, 0.2, 0.2  # affNIST's limits: degrees, fraction, |factor − 1|


@dataclasses.dataclass(frozen=True)
class Options:
    """What is tested."""

    affnist: Path | None = None
    """affNIST's test.mat. None: the test digits, moved at random within affNIST's ranges."""


def prepare(dataset: data.Dataset, held_out: np.ndarray, options: Options) -> data.Dataset:
    """Puts digits on a larger canvas, shifts those held out, and changes those of the test.

    Raises:
      data.DataError: if the images of --affnist are not like those to train on.
    """
    margin = (SHIFT, SHIFT)
    x_train = np.pad(dataset.x_train, ((0, 0), margin, margin, (0, 0)))
    key = jax.random.key(0, impl="threefry2x32")  # whichever generator JAX is set to
    x_train[held_out] = data.shift(key, x_train[held_out], SHIFT)
    if options.affnist is None:
        x_test, y_test = move(dataset.x_test, np.random.default_rng(0)), dataset.y_test
        source = f"{dataset.source}; tests: moved at random as affNIST's, a synthetic set"
    else:
        x_test, y_test = read_affnist(options.affnist)
        source = f"{dataset.source}; tests: {options.affnist}"
        if (x_train.shape[1:], dataset.num_classes) != ((40, 40, 1), 10):
            raise data.DataError(
                f"--affnist {options.affnist}: its images of 40 × 40 test networks for images of "
                f"28×28×1 in 10 classes, got {dataset.image_shape} in {dataset.num_classes}"
            )
    return dataclasses.replace(
        dataset, x_train=x_train, x_test=x_test, y_test=y_test, source=source
    )


def move(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moves each image [N, H, W, C] by a random affine map, onto a canvas with a margin.

    y = R(θ) [[1, 0], [s, 1]] diag(z_r, z_c) x + t about both centres, with one bilinear
    interpolation; θ, s, z_r and z_c are uniform between affNIST's limits, and t between those that
    leave all ink on the canvas.
    """
    number, *size, channels = images.shape
    canvas = np.array(size) + 2 * SHIFT
    from_centre, to_centre = (np.array(size) - 1) / 2, (canvas - 1) / 2
    moved = np.empty((number, *canvas, channels), np.uint8)
    for image, result in zip(images, moved, strict=True):
        matrix = draw_matrix(rng)
        ink = np.argwhere(image.any(-1)) - from_centre
        reached = ink @ matrix.T if len(ink) else np.zeros((1, 2))
        shift = rng.uniform(*np.sort([-to_centre - reached.min(0), to_centre - reached.max(0)], 0))
        inverse = np.linalg.inv(matrix)
        offset = from_centre - inverse @ (to_centre + shift)
        for channel in range(channels):
            pixels = image[..., channel].astype(np.float32)
            warped = scipy.ndimage.affine_transform(pixels, inverse, offset, tuple(canvas), order=1)
            result[..., channel] = np.rint(warped)
    return moved


def draw_matrix(rng: np.random.Generator) -> np.ndarray:
    """Draws the matrix of a map of (row, column)."""
    theta = np.radians(rng.uniform(-ROTATION, ROTATION))
    slant = np.array([[1, 0], [rng.uniform(-SHEAR, SHEAR), 1]])
    rotate = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
    return rotate @ slant * rng.uniform(1 - ZOOM, 1 + ZOOM, 2)


def read_affnist(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads images [N, 40, 40, 1] and labels [N] of a file of affNIST.

    Raises:
      data.DataError: if it is no such file.
    """
    try:
        content = scipy.io.loadmat(file, squeeze_me=True, struct_as_record=False)["affNISTdata"]
        images, labels = np.atleast_2d(content.image.T), np.atleast_1d(content.label_int)
    except Exception as error:  # scipy raises many kinds
        raise data.DataError(
            f"--affnist {file}: expected a .mat file of affNIST with the struct affNISTdata, whose "
            f"fields are image and label_int, got {type(error).__name__}: {error}"
        ) from error
    fits = images.dtype == np.uint8 and images.shape == (len(labels), 1600)
    if not (fits and np.isin(labels, range(10)).all()):
        raise data.DataError(
            f"--affnist {file}: expected uint8 images of 40 × 40 with labels from 0 to 9, got "
            f"{images.dtype} {list(images.shape)} and {len(labels)} labels"
        )
    return images.reshape(-1, 40, 40, 1), labels.astype(np.int32)


# About as many parameters as CapsNet has for these images.
CNN = CNNConfig((128, 128), (5, 5), hidden=(1024,), dropout=0.5)
TRAINING = dataclasses.replace(
    SEED.training, epochs=30, batch_size=128, shift_pixels=SHIFT, target=99.23
)
AFFNIST = Experiment(
    description="Train a network on shifted digits, and test it on digits under affine maps.",
    presets={
        "seed": dataclasses.replace(SEED, training=TRAINING),
        "cnn": Preset(CNN, dataclasses.replace(TRAINING, loss="cross_entropy")),
    },
    validation=10_000,
    prepare=prepare,
    options=Options(),
)

if __name__ == "__main__":
    main(AFFNIST)
