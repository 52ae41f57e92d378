"""The networks that come with capsjax."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import capsjax
from capsjax._pretrained import PRETRAINED
from data_files import digits, load_mnist, write_npz

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
LIMIT = 17_000_000  # bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", PRETRAINED)
def test_a_pretrained_network_is_small_and_makes_the_error_that_its_file_and_card_tell(name):
    file = PRETRAINED[name]
    assert file.stat().st_size <= LIMIT
    about = capsjax.weights.describe(file)
    net = capsjax.pretrained(name)
    mnist = capsjax.data.load("mnist")
    predicted = np.concatenate(
        [capsjax.predict(net, part).predicted for part in np.split(mnist.x_test, 20)]
    )
    wrong = int(np.sum(predicted != mnist.y_test))
    assert about.notes["test_error"] == pytest.approx(wrong / 100, abs=0.011)  # a CPU's rounding
    told = f"**Error.** {about.notes['test_error']:.2f} % "
    assert told in file.with_suffix(".md").read_text(encoding="utf-8")
    assert f"{about.notes['test_error']:.2f} % ([its card]" in README
    assert about.notes["commit"]


def test_a_name_that_is_not_there_is_refused_with_those_that_are():
    names = "capsnet-mnist, efficient-mnist"
    with pytest.raises(ValueError, match=f"expected one of {names}, got 'capsnet-cifar'"):
        capsjax.pretrained("capsnet-cifar")


@pytest.mark.slow
def test_the_command_line_tests_a_pretrained_network_by_its_name(tmp_path):
    mnist = write_npz(tmp_path / "digits.npz", digits(train=100, test=1000))
    script = Path(__file__).parents[1] / "experiments" / "mnist.py"
    words = [sys.executable, script, "--testing", "--weights", "capsnet-mnist"]
    words += ["--data-dir", mnist]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    images, labels = load_mnist().x_test[:1000], load_mnist().y_test[:1000]
    predicted = capsjax.predict(capsjax.pretrained("capsnet-mnist"), images).predicted
    wrong = np.sum(predicted != labels)
    assert f"test error: {wrong / 10:.2f} % ({wrong} of 1000)" in done.stdout
