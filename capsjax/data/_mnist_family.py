"""What the MNIST family's files do not say: class names, EMNIST's orientation and numbering."""

import string

import numpy as np

IMAGE_SHAPE = (28, 28, 1)

_DIGITS = tuple(string.digits)
# EMNIST "by merge" has one class for a capital and a lower-case letter of the same shape.
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


def find_class_names(name: str, image_shape: tuple[int, ...]) -> tuple[str, ...] | None:
    """Returns the class names of a member of the family, or None if the images differ in shape."""
    return _CLASS_NAMES.get(name) if image_shape == IMAGE_SHAPE else None


def turn_upright(name: str, images: np.ndarray) -> np.ndarray:
    """Transposes EMNIST's images, which its files hold with rows and columns exchanged."""
    return images.swapaxes(1, 2) if name.startswith("emnist/") else images


def number_from_zero(name: str, labels: np.ndarray) -> np.ndarray:
    """Subtracts 1 from the labels of EMNIST's letters, the only ones that start at 1."""
    return labels.astype(np.int32) - (name == "emnist/letters")
