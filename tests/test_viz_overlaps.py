"""The figure of overlapping images: each above its two drawings in two colours."""

import numpy as np
import pytest

from capsjax import viz
from test_viz import texts


def test_each_image_stands_above_its_drawings_in_orange_and_blue():
    images = np.zeros((2, 10, 10, 1))
    images[0, :, :5], images[1] = 1, 0.5
    drawn = np.zeros((2, 2, 10, 10, 1))
    drawn[0, 0, :, :5], drawn[0, 1, :, 5:] = 1, 1  # the first left, the second right
    drawn[1] = 1
    figure = viz.overlaps(images, drawn, [("L: 4 7", "R: 4 7"), ("L: 1 2", "*R: 1 3")])
    found = texts(figure)
    for part in ("L: 4 7", "R: 4 7", "L: 1 2", "*R: 1 3"):
        assert any(part in text for text in found), part
    grid = np.asarray(figure.axes[0].images[0].get_array())
    left = np.flatnonzero((grid[0] == 0).all(1))[0] - 5  # the captions are wider than the images
    at = lambda row, column: grid[row, left + column].tolist()  # noqa: E731
    assert at(5, 2) == [255, 255, 255]
    assert at(5, 7) == [0, 0, 0]
    assert at(16, 2) == [255, 140, 0]
    assert at(16, 7) == [0, 115, 255]


@pytest.mark.parametrize(
    ("drawn", "captions"), [((2, 10, 10, 1), 2), ((2, 2, 10, 9, 1), 2), ((2, 2, 10, 10, 1), 1)]
)
def test_what_does_not_fit_is_refused_in_words(drawn, captions):
    with pytest.raises(ValueError, match=r"overlaps: expected images \[N, H, W, C\]"):
        viz.overlaps(np.zeros((2, 10, 10, 1)), np.zeros(drawn), [("L", "R")] * captions)
