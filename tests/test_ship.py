"""Shipping a trained network: its weights in float16, tested after the cast, and its card."""

import dataclasses
import re
from unittest import mock

import numpy as np
import pytest

import capsjax
import ship
from capsjax.presets import SEED
from capsjax.run import Experiment, main
from data_files import digits, write_npz

pytestmark = pytest.mark.slow

TINY = dataclasses.replace(
    SEED,
    network=dataclasses.replace(SEED.network, channels=4, types=1, hidden=(8,)),
    training=dataclasses.replace(SEED.training, epochs=1, batch_size=20),
)


@pytest.fixture
def run(tmp_path):
    """Trains a tiny network on real digits, and returns its folder."""
    data = write_npz(tmp_path / "digits.npz", digits(60, 20))
    words = ["--data-dir", str(data), "--save-dir", str(tmp_path / "run"), "--train-size", "40"]
    with mock.patch("capsjax.run.lifecycle.write_pictures"):
        main(Experiment(presets={"seed": TINY}), words)
    return tmp_path / "run"


def test_the_file_is_float16_and_its_card_tells_the_error_that_this_file_makes(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr("sys.argv", ["ship.py", str(run), "tiny", "--out", str(tmp_path)])
    ship.main()
    file, card = tmp_path / "tiny.safetensors", (tmp_path / "tiny.md").read_text()
    ours = capsjax.weights.arrays_of(capsjax.weights.load(file))
    theirs = capsjax.weights.arrays_of(capsjax.weights.load(run / "weights.safetensors"))
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name].astype(np.float16))
    mnist = capsjax.data.load("mnist")
    answer = capsjax.predict(capsjax.weights.load(file), mnist.x_test)
    wrong = int(np.sum(answer.predicted != mnist.y_test))
    about = capsjax.weights.describe(file)
    assert about.notes["test_error"] == pytest.approx(wrong / 100)
    assert about.notes["preset"] == "seed"
    assert re.search(rf"{wrong / 100:.2f} % \({wrong} of 10,000 MNIST test digits\)", card)
    trained = capsjax.weights.describe(run / "weights.safetensors").notes["test_error"]
    assert f"the run that made them ended with {trained:.2f} % in float32" in card
    assert "**Data.** 40 training digits of MNIST." in card
    assert "python experiments/mnist.py --seed 0 --epochs 1 --batch-size 20" in card
