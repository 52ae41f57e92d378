"""From a drawing to a network's image: scaled and centred as MNIST's digits are, and moved."""

import numpy as np
import pytest
from scipy import ndimage

from data_files import load_mnist
from drawing.ink import BOX, Pose, fit, move


def enlarge(image: np.ndarray, times: int) -> np.ndarray:
    """Repeats each pixel of an image [H, W, C]."""
    return image.repeat(times, 0).repeat(times, 1)


def blob(height: int, width: int, canvas: int = 280, top: int = 30, left: int = 50) -> np.ndarray:
    layer = np.zeros((canvas, canvas, 1), np.uint8)
    layer[top : top + height, left : left + width] = 255
    return layer


def faint() -> np.ndarray:
    """Ink that becomes none when it is made smaller."""
    layer = np.zeros((280, 280, 1), np.uint8)
    layer[::5, ::9] = 1
    return layer


def test_a_digit_of_mnist_comes_back_as_it_is():
    for digit in load_mnist().x_test[:300]:
        fitted = fit(enlarge(digit, 10)[None], (28, 28, 1), centred=True)
        np.testing.assert_allclose(fitted, digit / 255, atol=1e-6)


def test_size_and_place_of_the_ink_do_not_matter():
    small = fit(blob(60, 30)[None], (28, 28, 1), centred=True)
    for other in (blob(60, 30, top=200, left=0), blob(120, 60), blob(240, 120, top=5)):
        np.testing.assert_allclose(fit(other[None], (28, 28, 1), centred=True), small, atol=1e-6)
    rows, columns = (np.flatnonzero(small.any(axis)) for axis in ((1, 2), (0, 2)))
    assert (len(rows), len(columns)) == (20, 10)
    np.testing.assert_allclose(ndimage.center_of_mass(small[..., 0]), (14, 14), atol=0.5)


@pytest.mark.parametrize("layer", [np.zeros((9, 9, 1), np.uint8), blob(0, 0), faint()])
def test_without_ink_the_image_is_empty(layer):
    assert not fit(layer[None], (28, 28, 1), centred=True).any()


@pytest.mark.parametrize("ink", [blob(1, 1), blob(280, 280, top=0, left=0), blob(2, 200)])
def test_any_ink_fits(ink):
    for shape in ((28, 28, 1), (36, 36, 1), (20, 31, 3)):
        image = fit(ink[None], shape, centred=True)
        assert image.shape == shape
        assert image.dtype == np.float32
        assert 0 < image.max() <= 1
        extent = max(len(np.flatnonzero(image.any(axis))) for axis in ((1, 2), (0, 2)))
        assert extent == round(BOX * min(1, min(shape[:2]) / 28))


def test_two_digits_stay_beside_each_other_within_four_pixels():
    left = blob(200, 40, 360, top=80, left=100)
    far = blob(200, 40, 360, top=80, left=300)
    image = fit(np.stack([left, far]), (36, 36, 1), centred=True)[..., 0]
    alone = fit(left[None], (36, 36, 1), centred=True)[..., 0]
    middle = ndimage.center_of_mass(alone)[1]
    assert abs(middle - 18) <= 0.5  # one digit alone goes to the middle
    columns = np.flatnonzero(image.any(0))
    halves = [columns[columns < 18].mean(), columns[columns > 18].mean()]
    np.testing.assert_allclose(halves, [18 - 4, 18 + 4], atol=1.01)
    assert image.max() == 1


def test_a_drawing_that_is_not_centred_is_resized_and_colours_are_kept_or_averaged():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 6, 3), np.uint8)
    layer = enlarge(pixels, 5)
    np.testing.assert_allclose(fit(layer[None], (8, 6, 3), centred=False), pixels / 255, atol=3e-3)
    grey = fit(layer[None], (8, 6, 2), centred=False)
    for channel in range(2):
        np.testing.assert_allclose(grey[..., channel], pixels.mean(2) / 255, atol=3e-3)


def test_a_pose_that_does_nothing_does_nothing():
    image = np.random.default_rng(0).random((9, 12, 3)).astype(np.float32)
    np.testing.assert_allclose(move(image, Pose()), image, atol=1e-6)


def test_an_image_turns_counter_clockwise_and_is_shifted_scaled_and_slanted():
    image = np.random.default_rng(0).random((8, 8, 1)).astype(np.float32)
    np.testing.assert_allclose(move(image, Pose(rotation=90)), np.rot90(image), atol=1e-5)
    shifted = move(image, Pose(right=2, down=-1))
    np.testing.assert_allclose(shifted[:-1, 2:], image[1:, :-2], atol=1e-5)
    line = np.zeros((21, 21, 1), np.float32)
    line[5:16, 10] = 1
    scaled = move(line, Pose(scale=0.6))[..., 0]
    assert np.flatnonzero(scaled.max(1) > 0.2).tolist() == [*range(7, 14)]
    slanted = move(line, Pose(shear=45))[..., 0]
    np.testing.assert_allclose(np.diagonal(np.fliplr(slanted))[6:15], 1, atol=1e-5)  # top right
