"""The notebook runs from top to bottom without warnings and shows its pictures."""

import base64
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow  # it trains for a minute

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "experiments" / "routing.ipynb"
DRAWING_CELLS = [
    "squash",
    "toy",
    "iterations",
    "gradient",
    "test",
    "couplings",
    "shares",
    "reconstruction",
    "perturb",
    "meaning",
    "train",
    "check",
]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Runs the notebook as `jupyter execute` does, in a process and a home of its own."""
    home = tmp_path_factory.mktemp("home")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in list_code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, home / NOTEBOOK.name)
    environment = os.environ | {
        "HOME": str(home),
        "IPYTHONDIR": str(home),
        "TFDS_DATA_DIR": str(home),
        "JUPYTER_PATH": "",
        "JUPYTER_PREFER_ENV_PATH": "1",  # so that the kernel is the interpreter of this test
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # else the debugger warns of frozen modules
    }
    command = "from nbclient.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command, "--inplace", home / NOTEBOOK.name],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return nbformat.read(home / NOTEBOOK.name, as_version=4)


@pytest.fixture(scope="module")
def committed():
    """Reads the notebook with the outputs that are committed."""
    return nbformat.read(NOTEBOOK, as_version=4)


def test_every_cell_runs_without_an_error_or_a_warning(executed):
    assert not list_complaints(executed)
    assert all(cell.execution_count for cell in list_code_cells(executed))


@pytest.mark.parametrize("name", DRAWING_CELLS)
def test_each_drawing_cell_shows_a_picture_with_content(executed, name):
    pixels = read_picture(executed, name)
    assert min(pixels.shape[:2]) > 100
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert 0.02 < np.mean(pixels < 250) < 0.98  # neither a white page nor a black one


def test_the_exact_gradient_is_the_one_without_stop_gradient(executed):
    lines = read_stdout(executed, "gradient-numbers").splitlines()
    difference, stopped, exact = (float(line.split()[-1]) for line in lines)
    assert exact == pytest.approx(difference, abs=2e-3)
    assert abs(stopped - difference) > 0.05


def test_the_networks_have_learnt_to_read(executed):
    trained, small = (int(read_stdout(executed, name).split()[0]) for name in ("test", "check"))
    assert trained < 50  # of 10,000
    assert small < 80  # of 1000


def test_following_a_digit_by_hand_gives_what_the_network_gives(executed):
    difference = float(read_stdout(executed, "inside").split()[-1])
    assert difference < 1e-5


def test_the_committed_notebook_is_executed_without_a_complaint(committed):
    counts = [cell.execution_count for cell in list_code_cells(committed)]
    assert counts == list(range(1, len(counts) + 1))
    assert not list_complaints(committed)
    for name in DRAWING_CELLS:
        assert read_picture(committed, name).size


def test_the_committed_notebook_names_no_machine(committed):
    assert set(committed.metadata) == {"kernelspec", "language_info"}
    assert not any(cell.metadata for cell in committed.cells)
    absolute = re.compile(r"""(^|[\s"'(=\[])(/\w[\w.-]*/\w|[A-Z]:\\)""", re.MULTILINE)
    assert not [text for text in find_texts(committed.cells) if absolute.search(text)]
    assert absolute.search(str(NOTEBOOK))  # the pattern does find an absolute path


def list_code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def list_complaints(notebook):
    """Returns the errors, and what was written to stderr."""
    outputs = [output for cell in list_code_cells(notebook) for output in cell.outputs]
    return [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


def find_cell(notebook, name):
    (cell,) = (cell for cell in list_code_cells(notebook) if cell.id == name)
    return cell


def read_picture(notebook, name):
    """Returns the one image that a cell shows, as an array."""
    shown = [output.get("data", {}) for output in find_cell(notebook, name).outputs]
    (png,) = (data["image/png"] for data in shown if "image/png" in data)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))


def read_stdout(notebook, name):
    outputs = find_cell(notebook, name).outputs
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def find_texts(node):
    """Yields every string in a part of a notebook, except images: base64 contains slashes."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        yield from find_texts([value for key, value in node.items() if key != "image/png"])
    elif isinstance(node, list):
        for part in node:
            yield from find_texts(part)
