"""One's own images: train/<class>/*.png|jpg and test/<class>/…"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ._dataset import DataError, empty_images

_SUFFIXES = {".png", ".jpg", ".jpeg"}
_CLUTTER = {"Thumbs.db", "desktop.ini"}  # left behind by file managers, as hidden files are
_GREY_MODES = {"1", "L", "LA"}
_COLOUR_MODES = {"RGB", "RGBA", "CMYK", "YCbCr"}
_PALETTE_MODES = {"P", "PA"}


def find(folder: Path) -> bool:
    """Whether the folder keeps its images by split and class."""
    return (folder / "train").is_dir() or (folder / "test").is_dir()


def read(folder: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The arrays and the class names, which are the sorted names of the folders in train/.

    Images are in the order of their classes, then of their file names. They are grey if all are; a
    mixture becomes RGB.
    """
    files = {split: _files(folder / split) for split in ("train", "test")}
    classes = tuple(files["train"])
    _same_classes(folder, set(classes), set(files["test"]))
    paths = {s: [path for name in classes for path in files[s][name]] for s in files}
    height, width, channels = _common_shape(paths["train"] + paths["test"])
    arrays = {}
    for split in files:
        images = empty_images(len(paths[split]), (height, width, channels), folder / split)
        for image, path in zip(images, paths[split], strict=True):
            image[...] = _decode(path, channels)
        arrays[f"x_{split}"] = images
        counts = [len(files[split][name]) for name in classes]
        arrays[f"y_{split}"] = np.repeat(np.arange(len(classes)), counts)
    return arrays, classes


def _files(folder: Path) -> dict[str, list[Path]]:
    """Each class's images, both sorted by name."""
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder of class folders with images; make it")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and _shown(path))
    if not classes:
        raise DataError(f"{folder}: expected a folder for each class with its images, found none")
    return {path.name: _images(path) for path in classes}


def _images(folder: Path) -> list[Path]:
    files = sorted(filter(_shown, folder.iterdir()))
    for path in files:
        if path.suffix.lower() not in _SUFFIXES or path.is_dir():
            raise DataError(
                f"{path}: expected only .png, .jpg or .jpeg images here; convert it or move it away"
            )
    if not files:
        raise DataError(f"{folder}: expected .png, .jpg or .jpeg images, the folder is empty")
    return files


def _shown(path: Path) -> bool:
    return not path.name.startswith(".") and path.name not in _CLUTTER


def _same_classes(folder: Path, train: set[str], test: set[str]) -> None:
    if train != test:
        raise DataError(
            f"{folder}: train/ and test/ must hold the same classes; "
            f"only in train/: {', '.join(sorted(train - test)) or 'none'}; "
            f"only in test/: {', '.join(sorted(test - train)) or 'none'}; "
            "add the missing folders with images or remove the others"
        )


def _common_shape(paths: list[Path]) -> tuple[int, int, int]:
    """Height, width and channels of all images, from their headers."""
    first, channels = None, 1
    for path in paths:
        with _opened(path) as image:
            size, colour = image.size, _is_colour(image, path)
        first = first or size
        if size != first:
            raise DataError(
                f"all images must have one size, but {paths[0]} is {first[0]} × {first[1]} and "
                f"{path} is {size[0]} × {size[1]} (width × height); scale or crop them to one size"
            )
        channels = 3 if colour else channels
    width, height = first or (0, 0)
    return height, width, channels


def _is_colour(image: Image.Image, path: Path) -> bool:
    if image.mode in _PALETTE_MODES:
        red, green, blue = np.reshape(image.getpalette("RGB") or [], (-1, 3)).T
        return not (np.array_equal(red, green) and np.array_equal(green, blue))
    if image.mode not in _GREY_MODES | _COLOUR_MODES:
        raise DataError(
            f"{path}: expected 8 bits a channel, came mode {image.mode}; convert it to an 8-bit "
            "grey or RGB image"
        )
    return image.mode in _COLOUR_MODES


def _decode(path: Path, channels: int) -> np.ndarray:
    with _opened(path) as image:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            # A background is the user's choice: on black, black ink would vanish.
            if np.asarray(image.getchannel("A")).min() < 255:
                raise DataError(
                    f"{path}: has transparent pixels, images must be opaque; draw it on a "
                    "background first"
                )
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image as a viewer shows it: turned as its camera noted."""
    try:
        with Image.open(path) as image:
            yield ImageOps.exif_transpose(image)
    except DataError:
        raise
    # Damage surfaces as whatever the format's decoder raises.
    except Exception as error:
        raise DataError(
            f"{path}: expected a PNG or JPEG image, but reading it failed ({error}); it is damaged "
            "or of another format: replace or remove it"
        ) from error
