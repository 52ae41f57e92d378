"""Reads what TFDS prepared, through TFDS, without TensorFlow."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from . import _family, _tfrecord
from ._dataset import DataError, Dataset, checked, empty_images

_CHUNK = 1000  # records decoded at a time: enough to be fast, few enough for any memory


def known_names() -> list[str]:
    """Every data set that TFDS can prepare, without its configs."""
    return tfds.list_builders(with_community_datasets=False)


def read(prepared: Path, name: str, source: str) -> Dataset:
    """The arrays of the splits train and test."""
    try:
        with _quiet():
            return _read(prepared, name, source)
    except DataError:
        raise
    # TFDS, array_record and the image decoders raise anything at all on damaged files.
    except Exception as error:
        raise DataError(
            f"{prepared}: TFDS could not read what it prepared ({' '.join(str(error).split())}); "
            "remove the folder and prepare the data set again"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what TFDS advises through absl, such as another image decoder."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _read(prepared: Path, name: str, source: str) -> Dataset:
    builder: Any = tfds.builder_from_directory(prepared)
    missing = {"train", "test"} - set(builder.info.splits)
    if missing:
        raise DataError(
            f"{prepared}: expected the splits train and test, there are "
            f"{', '.join(builder.info.splits) or 'none'}; capsjax needs both"
        )
    image, label = _keys(builder.info, prepared)
    arrays = {}
    for split in ("train", "test"):
        images, labels = _split(builder, split, image, label, prepared)
        arrays[f"x_{split}"] = _family.upright(name, images)
        arrays[f"y_{split}"] = _family.from_zero(name, labels)
    names = _family.class_names(name, arrays["x_train"].shape[1:])
    return checked(**arrays, class_names=names or builder.info.features[label].names, source=source)


def _keys(info: Any, prepared: Path) -> tuple[str, str]:
    """The names of the image and of its label among the features."""
    features = dict(info.features.items())
    image, label = info.supervised_keys or ("image", "label")
    wanted = {image: tfds.features.Image, label: tfds.features.ClassLabel}
    if not all(isinstance(features.get(key), kind) for key, kind in wanted.items()):
        raise DataError(
            f"{prepared}: expected images with one class each, the features are "
            f"{', '.join(f'{key} ({type(kind).__name__})' for key, kind in features.items())}; "
            "take a data set for image classification"
        )
    return image, label


def _split(
    builder: Any, split: str, image: str, label: str, prepared: Path
) -> tuple[np.ndarray, np.ndarray]:
    count = builder.info.splits[split].num_examples
    images, labels = None, np.empty(count, np.int64)
    number = 0
    for number, example in enumerate(_examples(builder, split, prepared), start=1):
        pixels = example[image]
        if images is None:
            if pixels.dtype != np.uint8:
                raise DataError(f"{prepared}: expected uint8 images, came {pixels.dtype}")
            images = empty_images(count, pixels.shape, prepared)
        if pixels.shape != images.shape[1:]:
            raise DataError(
                f"{prepared}: all images must have one size, but in {split} number 0 is "
                f"{images.shape[1:]} and number {number - 1} is {pixels.shape}; scale them to one "
                "size and keep them as class folders"
            )
        images[number - 1], labels[number - 1] = pixels, example[label]
    if images is None or number != count:
        raise DataError(
            f"{prepared}: expected {count} examples in {split}, came {number}; "
            "remove the folder and prepare the data set again"
        )
    return images, labels


def _examples(builder: Any, split: str, prepared: Path) -> Iterator[dict[str, Any]]:
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
        # TFDS's own reader of parquet was seen to drop most examples without a word.
        raise DataError(
            f"{prepared}: prepared as {kind}, which capsjax does not read; prepare it in another "
            f"folder as array_record: tfds build {builder.info.full_name.rpartition('/')[0]} "
            "--file_format=array_record --data_dir=FOLDER"
        )
