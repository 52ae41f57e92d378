"""What the files of the MNIST family leave unsaid: class names, EMNIST's orientation and labels."""

import string

import numpy as np

IMAGE_SHAPE = (28, 28, 1)

_DIGITS = tuple(string.digits)
# EMNIST "by merge" puts a small letter that looks like its capital into the capital's class.
_MERGED = (*_DIGITS, *string.ascii_uppercase, *"abdefghnqrt")

_CLASS_NAMES = {
    "mnist": _DIGITS,
    "fashion_mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    "emnist/byclass": (*_DIGITS, *string.ascii_uppercase, *string.ascii_lowercase),
    "emnist/bymerge": _MERGED,
    "emnist/balanced": _MERGED,
    "emnist/letters": tuple(string.ascii_uppercase),
    "emnist/digits": _DIGITS,
    "emnist/mnist": _DIGITS,
}

NAMES = tuple(_CLASS_NAMES)


def class_names(name: str, image_shape: tuple[int, ...]) -> tuple[str, ...] | None:
    """The classes of a data set of the family; None for images that cannot be of it."""
    return _CLASS_NAMES.get(name) if image_shape == IMAGE_SHAPE else None


def upright(name: str, images: np.ndarray) -> np.ndarray:
    """EMNIST's files hold every image with rows and columns exchanged: turn them back."""
    return images.swapaxes(1, 2) if name.startswith("emnist/") else images


def from_zero(name: str, labels: np.ndarray) -> np.ndarray:
    """EMNIST's letters are numbered from 1 in its files, all else from 0."""
    return labels.astype(np.int32) - (name == "emnist/letters")
