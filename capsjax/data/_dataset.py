"""What every source becomes: one checked set of arrays."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from capsjax._memory import host_memory

# What the classes are called, if anything says so.
Names = Sequence[str] | np.ndarray | None


class DataError(ValueError):
    """Data that cannot be used; says what was expected, what came and what to do."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Labelled training and test images in host memory.

    Attributes:
      x_train: uint8 `[N, H, W, C]`, pixels from 0 to 255.
      y_train: int32 `[N]`, class numbers from 0.
      x_test: uint8 `[M, H, W, C]`.
      y_test: int32 `[M]`.
      class_names: a name for each class; `class_names[y]` reads a label.
      source: where the arrays came from, in words.
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
        """Number of classes."""
        return len(self.class_names)

    def __repr__(self) -> str:
        return (
            f"Dataset({len(self.x_train)} training and {len(self.x_test)} test images "
            f"{self.image_shape}, {self.num_classes} classes, source={self.source!r})"
        )


def checked(
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_test: np.ndarray,
    y_test: np.ndarray,
    *,
    class_names: Names,
    source: str,
) -> Dataset:
    """A `Dataset` of arrays that fit each other; without names the labels are the names.

    Raises:
      DataError: a wrong dtype or shape, a pair of different lengths, an empty set, training and
        test images of different shape, labels outside the classes, a class with no image.
    """
    x_train = _images(x_train, f"{source}: training images")
    x_test = _images(x_test, f"{source}: test images")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise DataError(
            f"{source}: the training images are {x_train.shape[1:]}, the test images "
            f"{x_test.shape[1:]} (height, width, channels); make them the same"
        )
    y_train = _labels(y_train, len(x_train), f"{source}: training labels")
    y_test = _labels(y_test, len(x_test), f"{source}: test labels")
    if class_names is None:
        class_names = [str(label) for label in _counted(y_train, source)]
    for labels, which in ((y_train, "training"), (y_test, "test")):
        outside = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
        if outside.size:
            raise DataError(
                f"{source}: {which} label number {outside[0]} is {labels[outside[0]]}, outside the "
                f"{len(class_names)} classes 0 to {len(class_names) - 1}; correct the labels, or "
                "give the data set its own name if it is another one than its name says"
            )
    return Dataset(
        x_train,
        y_train.astype(np.int32),
        x_test,
        y_test.astype(np.int32),
        tuple(map(str, class_names)),
        source,
    )


def empty_images(count: int, shape: tuple[int, ...], where: Path | str) -> np.ndarray:
    """Room for uint8 images, refused in words where the machine cannot hold them."""
    needed = count * int(np.prod(shape, dtype=np.int64))
    memory = host_memory()
    if needed > memory:
        raise DataError(
            f"{where}: {count} images of {shape} need {needed / 2**30:.1f} GiB, this machine has "
            f"{memory / 2**30:.1f} GiB of memory; use fewer or smaller images"
        )
    return np.empty((count, *shape), np.uint8)


def _images(images: np.ndarray, what: str) -> np.ndarray:
    if images.dtype != np.uint8:
        raise DataError(
            f"{what} must be uint8 with pixels from 0 to 255, came as {images.dtype}; "
            "scale them to that range and convert with `.astype(np.uint8)`"
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4:
        raise DataError(f"{what} must have shape [N,H,W] or [N,H,W,C], came as {images.shape}")
    if not images.size:
        raise DataError(f"{what} are empty, shape {images.shape}; at least one image is needed")
    return np.ascontiguousarray(images)


def _labels(labels: np.ndarray, count: int, what: str) -> np.ndarray:
    if labels.shape == (count, 1):
        labels = labels[:, 0]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{what} must be class numbers, integers of shape [N]; came as {labels.dtype} "
            f"{labels.shape} (one-hot labels: take `.argmax(-1)`)"
        )
    if len(labels) != count:
        raise DataError(
            f"{what} are {len(labels)} for {count} images; there must be one label for each image, "
            "so one of the two is cut short or belongs to another set"
        )
    return labels


def _counted(labels: np.ndarray, source: str) -> range:
    """The classes 0 to n−1 that labels without names speak of: each must occur."""
    present = np.unique(labels)
    missing = np.setdiff1d(np.arange(len(present)), present)
    if missing.size:
        raise DataError(
            f"{source}: {len(present)} different training labels from {present[0]} to "
            f"{present[-1]}, but none is {missing[0]}; number the classes 0, 1, 2, … without a gap"
        )
    return range(len(present))
