"""The networks that come with capsjax."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import capsjax
from capsjax._pretrained import PRETRAINED

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
LIMIT = 17_000_000  # bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", PRETRAINED)
def test_the_command_line_finds_the_error_that_file_card_and_readme_tell(name, tmp_path):
    file = PRETRAINED[name]
    assert file.stat().st_size <= LIMIT
    about = capsjax.weights.describe(file)
    assert about.notes["commit"]
    script = Path(__file__).parents[1] / "experiments" / "mnist.py"
    words = [sys.executable, script, "--testing", "--weights", name]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    found = re.search(r"test error: (\S+) % \((\d+) of 10000\)", done.stdout)
    assert found, done.stdout
    assert float(found[1]) == int(found[2]) / 100
    assert about.notes["test_error"] == pytest.approx(float(found[1]), abs=0.011)  # by rounding
    told = f"**Error.** {about.notes['test_error']:.2f} % "
    assert told in file.with_suffix(".md").read_text(encoding="utf-8")
    assert f"{about.notes['test_error']:.2f} % ([its card]" in README


def test_a_name_that_is_not_there_is_refused_with_those_that_are():
    names = "capsnet-mnist, efficient-mnist"
    with pytest.raises(ValueError, match=f"expected one of {names}, got 'capsnet-cifar'"):
        capsjax.pretrained("capsnet-cifar")
