"""From a drawing to the image that a network gets."""

import dataclasses

import numpy as np
from PIL import Image
from scipy import ndimage

BOX = 20  # pixels of a side, into which MNIST's digits are fitted
FIELD = 28  # pixels of a side, in whose middle their centre of mass lies
FREE = 4  # pixels by which a digit of MultiMNIST may lie beside the middle


@dataclasses.dataclass(frozen=True)
class Pose:
    """How an image is moved before a network gets it."""

    rotation: float = 0.0  # degrees, counter-clockwise
    shear: float = 0.0  # the slant of vertical lines, in degrees, their tops to the right
    scale: float = 1.0
    right: float = 0.0  # pixels
    down: float = 0.0  # pixels


def fit(layers: np.ndarray, shape: tuple[int, int, int], *, centred: bool) -> np.ndarray:
    """Fits the layers of a drawing into the image that a network gets.

    Args:
      layers: uint8 [L, h, w, c], light on dark; c is 1 or 3.
      shape: (H, W, C) of the image.
      centred: whether each layer is scaled and centred as MNIST's digits are. Several layers stay
        beside the middle, by up to `FREE` pixels, as the digits of MultiMNIST.

    Returns:
      float32 [H, W, C], from 0 to 1: the layers' sum, clipped.
    """
    fitted = [
        centre(layer, shape[:2], free=FREE if len(layers) > 1 else 0)
        if centred
        else resize(layer, shape[:2])
        for layer in layers
    ]
    total = np.clip(np.sum(fitted, 0), 0, 255) / 255
    if total.shape[2] != shape[2]:
        total = np.repeat(total.mean(2, keepdims=True), shape[2], 2)
    return total.astype(np.float32)


def resize(layer: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes an image [h, w, c]; a pixel becomes the mean of those that it covers."""
    height, width = size
    channels = [
        np.asarray(Image.fromarray(layer[..., c]).resize((width, height), Image.Resampling.BOX))
        for c in range(layer.shape[2])
    ]
    return np.stack(channels, -1).astype(np.float32)


def centre(layer: np.ndarray, size: tuple[int, int], *, free: int) -> np.ndarray:
    """Fits the ink into MNIST's box, its centre of mass in the middle of the image."""
    image = np.zeros((*size, layer.shape[2]), np.float32)
    rows, columns = (np.flatnonzero(layer.any((axis, 2))) for axis in (1, 0))
    if not len(rows):
        return image
    ink = layer[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    box = BOX * min(1, min(size) / FIELD)
    factor = box / max(ink.shape[:2])
    small = resize(ink, tuple(max(1, round(factor * length)) for length in ink.shape[:2]))
    # MNIST's middle is pixel 14 of 0 to 27, half a pixel beside that of the image.
    middle = np.array(size) / 2 + _find_offset(layer, size, free)
    if not small.any():  # ink so faint that it vanished
        return image
    mass = ndimage.center_of_mass(small.mean(2))
    start = np.rint(middle - np.array(mass)).astype(int)
    start = np.clip(start, 0, np.array(size) - small.shape[:2])  # all of it stays in sight
    top, left = start
    image[top : top + small.shape[0], left : left + small.shape[1]] = small
    return image


def _find_offset(layer: np.ndarray, size: tuple[int, int], free: int) -> np.ndarray:
    """Returns how far from the middle the ink was drawn, in pixels of the image, within limits."""
    drawn = np.array(layer.shape[:2])
    offset = np.array(ndimage.center_of_mass(layer.mean(2))) - (drawn - 1) / 2
    return np.clip(offset * np.array(size) / drawn, -free, free)


def move(image: np.ndarray, pose: Pose) -> np.ndarray:
    """Moves an image [H, W, C] about its middle, with one bilinear interpolation."""
    # Of (row, column); rows count downwards.
    theta, phi = np.radians([pose.rotation, pose.shear])
    rotate = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
    matrix = pose.scale * rotate @ np.array([[1, 0], [-np.tan(phi), 1]])
    inverse = np.linalg.inv(matrix)
    middle = (np.array(image.shape[:2]) - 1) / 2
    offset = middle - inverse @ (middle + np.array([pose.down, pose.right]))
    channels = [
        ndimage.affine_transform(image[..., c], inverse, offset, order=1)
        for c in range(image.shape[2])
    ]
    return np.stack(channels, -1)
