"""Users' own images, kept as train/<class>/*.png|jpg and test/<class>/…"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from capsjax.data._dataset import DataError, allocate_images

_SUFFIXES = {".png", ".jpg", ".jpeg"}
_CLUTTER = {"Thumbs.db", "desktop.ini"}  # file managers leave these behind
_GREY_MODES = {"1", "L", "LA"}
_COLOUR_MODES = {"RGB", "RGBA", "CMYK", "YCbCr"}
_PALETTE_MODES = {"P", "PA"}
_ORIENTATION = ExifTags.Base.Orientation


def has_splits(folder: Path) -> bool:
    """Returns whether the folder contains train/ or test/."""
    return (folder / "train").is_dir() or (folder / "test").is_dir()


def read(folder: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Returns the arrays and the class names, the sorted names of the folders in train/.

    Images are sorted by class, then by file name. They are grey if all of them are; a mixture of
    grey and colour becomes RGB.
    """
    files = {split: _list_classes(folder / split) for split in ("train", "test")}
    classes = tuple(files["train"])
    _check_same_classes(folder, set(classes), set(files["test"]))
    paths = {s: [path for name in classes for path in files[s][name]] for s in files}
    height, width, channels = _find_common_shape(paths["train"] + paths["test"])
    arrays = {}
    for split in files:
        images = allocate_images(len(paths[split]), (height, width, channels), folder / split)
        for image, path in zip(images, paths[split], strict=True):
            image[...] = _decode(path, channels)
        arrays[f"x_{split}"] = images
        counts = [len(files[split][name]) for name in classes]
        arrays[f"y_{split}"] = np.repeat(np.arange(len(classes)), counts)
    return arrays, classes


def _list_classes(folder: Path) -> dict[str, list[Path]]:
    """Returns the image files of each class; classes and files are sorted by name."""
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder of class folders with images; make it")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and _is_relevant(path))
    if not classes:
        raise DataError(
            f"{folder}: expected a folder of images for each class, found none; make them"
        )
    return {path.name: _list_images(path) for path in classes}


def _list_images(folder: Path) -> list[Path]:
    """Returns the sorted image files of one class."""
    files = sorted(filter(_is_relevant, folder.iterdir()))
    for path in files:
        if path.suffix.lower() not in _SUFFIXES or path.is_dir():
            raise DataError(
                f"{path}: expected only .png, .jpg or .jpeg images here; convert it or move it away"
            )
    if not files:
        raise DataError(
            f"{folder}: expected .png, .jpg or .jpeg images, but the folder is empty; add some or "
            "remove it"
        )
    return files


def _is_relevant(path: Path) -> bool:
    """Returns whether a file is neither hidden nor left behind by a file manager."""
    return not path.name.startswith(".") and path.name not in _CLUTTER


def _check_same_classes(folder: Path, train: set[str], test: set[str]) -> None:
    """Refuses classes that only one of the splits has."""
    if train != test:
        raise DataError(
            f"{folder}: expected the same classes in train/ and test/; "
            f"only in train/: {', '.join(sorted(train - test)) or 'none'}; "
            f"only in test/: {', '.join(sorted(test - train)) or 'none'}; "
            "add the missing folders with images or remove the others"
        )


def _find_common_shape(paths: list[Path]) -> tuple[int, int, int]:
    """Returns the common height, width and channels, read from the headers of the files."""
    first, channels = None, 1
    for path in paths:
        with _open_upright(path) as image:
            size, colour = image.size, _is_colour(image, path)
        first = first or size
        if size != first:
            raise DataError(
                f"expected images of one size (width × height), got {first[0]} × {first[1]} in "
                f"{paths[0]} and {size[0]} × {size[1]} in {path}; scale or crop them to one size"
            )
        channels = 3 if colour else channels
    width, height = first or (0, 0)
    return height, width, channels


def _is_colour(image: Image.Image, path: Path) -> bool:
    """Returns whether the image needs RGB; a palette is grey if all its entries are."""
    if image.mode in _PALETTE_MODES:
        red, green, blue = np.reshape(image.getpalette("RGB") or [], (-1, 3)).T
        return not (np.array_equal(red, green) and np.array_equal(green, blue))
    if image.mode not in _GREY_MODES | _COLOUR_MODES:
        raise DataError(
            f"{path}: expected 8 bits per channel, got mode {image.mode}; convert it to an 8-bit "
            "grey or RGB image"
        )
    return image.mode in _COLOUR_MODES


def _decode(path: Path, channels: int) -> np.ndarray:
    """Returns the pixels [H, W, C] of an opaque image."""
    with _open_upright(path) as image:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            # The background must be the user's choice: on black, black ink would vanish.
            if np.asarray(image.getchannel("A")).min() < 255:
                raise DataError(
                    f"{path}: expected an opaque image, got transparent pixels; draw it on a "
                    "background first"
                )
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


@contextlib.contextmanager
def _open_upright(path: Path) -> Iterator[Image.Image]:
    """Opens an image and rotates it as its EXIF orientation says, as image viewers do."""
    try:
        with Image.open(path) as image:
            # Pillow would shorten colours of 16 bits to 8 without a word.
            if any("16" in str(tile[3]) for tile in image.tile):
                raise DataError(
                    f"{path}: expected 8 bits per channel, got 16; convert it to an 8-bit grey or "
                    "RGB image"
                )
            # Turned only if need be, since that decodes all of it.
            turned = image.getexif().get(_ORIENTATION, 1) != 1
            yield ImageOps.exif_transpose(image) if turned else image
    except DataError:
        raise
    # A decoder may raise any exception on a damaged file.
    except Exception as error:
        raise DataError(
            f"{path}: expected a PNG or JPEG image, but reading it failed ({error}); it is damaged "
            "or has another format: replace or remove it"
        ) from error
