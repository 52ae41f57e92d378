"""Reads prepared data sets through TFDS, without TensorFlow."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from capsjax.data import _mnist_family, _tfrecord
from capsjax.data._dataset import DataError, Dataset, allocate_images, build_dataset

_CHUNK = 1000  # records decoded at a time: fast, and small in memory


def list_known_names() -> list[str]:
    """Lists every data set that TFDS can prepare, without configs."""
    return tfds.list_builders(with_community_datasets=False)


def read(prepared: Path, name: str, source: str) -> Dataset:
    """Reads the splits train and test."""
    try:
        with _silence_absl():
            return _read(prepared, name, source)
    except DataError:
        raise
    # TFDS, array_record and the image decoders may raise any exception on damaged files.
    except Exception as error:
        raise DataError(
            f"{prepared}: TFDS could not read this data set ({' '.join(str(error).split())}); "
            "remove the folder and prepare the data set again"
        ) from error


@contextlib.contextmanager
def _silence_absl() -> Iterator[None]:
    """Suppresses the advice that TFDS logs through absl, such as another image decoder."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _read(prepared: Path, name: str, source: str) -> Dataset:
    """Reads the data set; any exception may escape."""
    builder: Any = tfds.builder_from_directory(prepared)
    missing = {"train", "test"} - set(builder.info.splits)
    if missing:
        raise DataError(
            f"{prepared}: expected the splits train and test, got "
            f"{', '.join(builder.info.splits) or 'none'}; choose a data set with both"
        )
    image, label = _find_keys(builder.info, prepared)
    arrays = {}
    for split in ("train", "test"):
        images, labels = _read_split(builder, split, image, label, prepared)
        arrays[f"x_{split}"] = _mnist_family.turn_upright(name, images)
        arrays[f"y_{split}"] = _mnist_family.number_from_zero(name, labels)
    names = _mnist_family.find_class_names(name, arrays["x_train"].shape[1:])
    names = names or builder.info.features[label].names
    return build_dataset(**arrays, class_names=names, source=source)


def _find_keys(info: Any, prepared: Path) -> tuple[str, str]:
    """Returns the names of the image and of its label among the features."""
    features = dict(info.features.items())
    image, label = info.supervised_keys or ("image", "label")
    wanted = {image: tfds.features.Image, label: tfds.features.ClassLabel}
    if not all(isinstance(features.get(key), kind) for key, kind in wanted.items()):
        raise DataError(
            f"{prepared}: expected images with one class each, got the features "
            f"{', '.join(f'{key} ({type(kind).__name__})' for key, kind in features.items())}; "
            "choose a data set for image classification"
        )
    return image, label


def _read_split(
    builder: Any, split: str, image: str, label: str, prepared: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and labels of one split."""
    count = builder.info.splits[split].num_examples
    images, labels = None, np.empty(count, np.int64)
    number = 0
    for number, example in enumerate(_iterate_examples(builder, split, prepared), start=1):
        pixels = example[image]
        if images is None:
            images = _allocate_like(pixels, count, prepared)
        if pixels.shape != images.shape[1:]:
            raise DataError(
                f"{prepared}: expected images of one size, but in {split} number 0 is "
                f"{images.shape[1:]} and number {number - 1} is {pixels.shape}; scale them to one "
                "size and keep them as class folders"
            )
        images[number - 1], labels[number - 1] = pixels, example[label]
    if images is None or number != count:
        raise DataError(
            f"{prepared}: expected {count} examples in {split}, got {number}; "
            "remove the folder and prepare the data set again"
        )
    return images, labels


def _allocate_like(pixels: np.ndarray, count: int, prepared: Path) -> np.ndarray:
    """Allocates as many images of this shape, which must be uint8."""
    if pixels.dtype != np.uint8:
        raise DataError(
            f"{prepared}: expected uint8 images, got {pixels.dtype}; convert them and keep them in "
            "an .npz file"
        )
    return allocate_images(count, pixels.shape, prepared)


def _iterate_examples(builder: Any, split: str, prepared: Path) -> Iterator[dict[str, Any]]:
    """Yields the decoded examples of one split."""
    kind = builder.info.file_format.value
    if kind == "array_record":
        records = builder.as_data_source(split)
        for start in range(0, len(records), _CHUNK):
            yield from records.__getitems__(range(start, min(start + _CHUNK, len(records))))
    elif kind == "tfrecord":
        for path in builder.info.splits[split].filepaths:
            for record in _tfrecord.read(Path(path)):
                yield builder.info.features.deserialize_example_np(record)
    else:
        # TFDS's own parquet reader was observed to drop most examples silently.
        raise DataError(
            f"{prepared}: expected a data set prepared as array_record or tfrecord, got {kind}; "
            "prepare it in another folder: "
            f"tfds build {builder.info.full_name.rpartition('/')[0]} "
            "--file_format=array_record --data_dir=FOLDER"
        )
