"""The checked set of arrays that every source is turned into."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from capsjax._host_memory import host_memory

# The names of the classes; None if the source has none.
Names = Sequence[str] | np.ndarray | None


class DataError(ValueError):
    """Raised for data that cannot be used; the message says what was expected and what to do.

    Example:
      >>> from capsjax import data
      >>> try:
      ...     data.load("two words")
      ... except data.DataError as error:
      ...     print(error)
      expected the name of a data set such as mnist or emnist/letters, got 'two words'
    """


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Labelled training and test images in host memory.

    Attributes:
      x_train: uint8 [N, H, W, C], pixels from 0 to 255.
      y_train: int32 [N], class numbers from 0.
      x_test: uint8 [M, H, W, C].
      y_test: int32 [M].
      class_names: the name of each class; `class_names[y]` is the name of label y.
      source: a description of where the arrays were found.

    Example:
      >>> from capsjax import data
      >>> mnist = data.load("mnist")
      >>> mnist.image_shape, mnist.num_classes, mnist.class_names[mnist.y_test[0]]
      ((28, 28, 1), 10, '7')
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: tuple[str, ...]
    source: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        height, width, channels = self.x_train.shape[1:]
        return height, width, channels

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    def __repr__(self) -> str:
        return (
            f"Dataset({len(self.x_train)} training and {len(self.x_test)} test images "
            f"{self.image_shape}, {self.num_classes} classes, source={self.source!r})"
        )


def build_dataset(
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_test: np.ndarray,
    y_test: np.ndarray,
    *,
    class_names: Names,
    source: str,
) -> Dataset:
    """Checks that the arrays fit together and returns them as a `Dataset`.

    Without names, the class numbers serve as names.

    Raises:
      DataError: if a dtype or shape is wrong, a set is empty, images and labels differ in number,
        training and test images differ in shape, a label lies outside the classes, or, without
        names, a class has no training image.
    """
    x_train = _check_images(x_train, f"{source}: training images")
    x_test = _check_images(x_test, f"{source}: test images")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise DataError(
            f"{source}: expected training and test images of one shape (height, width, channels), "
            f"got {x_train.shape[1:]} and {x_test.shape[1:]}; make them the same"
        )
    y_train = _check_labels(y_train, len(x_train), f"{source}: training labels")
    y_test = _check_labels(y_test, len(x_test), f"{source}: test labels")
    if class_names is None:
        class_names = [str(label) for label in range(_count_classes(y_train, source))]
    _check_range(y_train, len(class_names), f"{source}: training")
    _check_range(y_test, len(class_names), f"{source}: test")
    return Dataset(
        x_train,
        y_train.astype(np.int32),
        x_test,
        y_test.astype(np.int32),
        tuple(n.decode() if isinstance(n, bytes) else str(n) for n in class_names),
        source,
    )


def allocate_images(count: int, shape: tuple[int, ...], where: Path | str) -> np.ndarray:
    """Allocates uint8 images, and refuses more than the memory of this machine can hold."""
    needed = count * int(np.prod(shape, dtype=np.int64))
    memory = host_memory()
    if needed > memory:
        raise DataError(
            f"{where}: {count} images of {shape} need {needed / 2**30:.1f} GiB, this machine has "
            f"{memory / 2**30:.1f} GiB of memory; use fewer or smaller images"
        )
    return np.empty((count, *shape), np.uint8)


def _check_images(images: np.ndarray, what: str) -> np.ndarray:
    """Returns the images as uint8 [N, H, W, C]."""
    if images.dtype != np.uint8:
        raise DataError(
            f"{what} must be uint8 with pixels from 0 to 255, got {images.dtype}; "
            "scale them to that range and convert with `.astype(np.uint8)`"
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4:
        raise DataError(
            f"{what} must have shape [N,H,W] or [N,H,W,C], got {images.shape}; reshape them"
        )
    if not images.size:
        raise DataError(
            f"{what} must not be empty, got shape {images.shape}; add at least one image"
        )
    return np.ascontiguousarray(images)


def _check_labels(labels: np.ndarray, count: int, what: str) -> np.ndarray:
    """Returns the labels of `count` images as integers [N]."""
    if labels.shape == (count, 1):
        labels = labels[:, 0]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{what} must be class numbers, integers of shape [N], got {labels.dtype} "
            f"{labels.shape}; convert one-hot labels with `.argmax(-1)`"
        )
    if len(labels) != count:
        raise DataError(
            f"{what} must be one for each image, got {len(labels)} for {count} images; one of the "
            "two is truncated or belongs to another data set"
        )
    return labels


def _count_classes(labels: np.ndarray, source: str) -> int:
    """Returns the number of classes of labels without names, which must be 0 to n−1."""
    present = np.unique(labels)
    missing = np.setdiff1d(np.arange(len(present)), present)
    if missing.size:
        raise DataError(
            f"{source}: expected training labels 0, 1, 2, … without a gap, got {len(present)} "
            f"different ones from {present[0]} to {present[-1]}, but none is {missing[0]}; "
            "renumber the classes"
        )
    return len(present)


def _check_range(labels: np.ndarray, num_classes: int, what: str) -> None:
    """Refuses labels that are not among the classes."""
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if outside.size:
        raise DataError(
            f"{what} label number {outside[0]} is {labels[outside[0]]}, outside the {num_classes} "
            f"classes 0 to {num_classes - 1}; correct the labels, or, if this is not the data set "
            "that it is named after, give it a name of its own"
        )
