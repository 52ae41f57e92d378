"""Clip art as class folders: what data.load reads back."""

import numpy as np
import pytest
from PIL import Image

import clipart
from capsjax import data


def write_drawings(folder, number=300):
    """Writes transparent drawings: a wide block in a shade of its number."""
    for category in clipart.CATEGORIES:
        for n in range(number):
            path = folder / category / f"part{n % 2}" / f"{n:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            drawing = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
            drawing.paste((n % 256, 0, 200, 255), (0, 0, 40, 10))
            drawing.save(path, compress_level=1)


def test_drawings_become_small_rgb_images_of_their_category(tmp_path, monkeypatch):
    write_drawings(tmp_path / "png")
    big = Image.new("RGB", (400, 400))
    big.save(tmp_path / "png" / "food" / "big.png")
    monkeypatch.setattr(clipart, "MOST_PIXELS", 1000)
    monkeypatch.setattr("sys.argv", ["clipart.py", str(tmp_path / "png"), str(tmp_path / "out")])
    clipart.main()
    dataset = data.load("clipart", tmp_path / "out")
    assert dataset.class_names == clipart.CATEGORIES
    assert dataset.x_train.shape == (5 * 240, 32, 32, 3)
    assert dataset.x_test.shape == (5 * 60, 32, 32, 3)
    assert np.bincount(dataset.y_test).tolist() == [60] * 5
    images = np.concatenate([dataset.x_train, dataset.x_test])
    assert (images[:, :8] == 255).all()  # above the drawing, and transparent parts below
    assert (images[:, 18:] == 255).all()
    food = images[np.concatenate([dataset.y_train, dataset.y_test]) == 1]
    assert len(np.unique(food[:, 10, 16, 0])) == 256  # none twice: 300 drawings of 256 shades
    assert (food[:, 10, 16, 1:] == [0, 200]).all()


def test_a_folder_of_something_else_is_refused_in_words(tmp_path, monkeypatch):
    write_drawings(tmp_path, number=3)
    monkeypatch.setattr("sys.argv", ["clipart.py", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="holds 3 drawings, of which 300 are needed"):
        clipart.main()
