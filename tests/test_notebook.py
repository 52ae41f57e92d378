"""The notebook runs from top to bottom, and draws."""

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
DRAWN = [
    "squash",
    "toy",
    "iterations",
    "gradient",
    "train",
    "test",
    "couplings",
    "shares",
    "reconstruction",
    "perturb",
]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """What `jupyter execute` makes of the notebook, in a process and a home of its own."""
    home = tmp_path_factory.mktemp("home")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code(notebook):
        cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, home / NOTEBOOK.name)
    environment = os.environ | {
        "HOME": str(home),
        "IPYTHONDIR": str(home),
        "TFDS_DATA_DIR": str(home),
        "JUPYTER_PATH": "",
        "JUPYTER_PREFER_ENV_PATH": "1",  # so that the kernel is the interpreter that runs this
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


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def picture(notebook, name):
    """The one image that a cell shows, as an array."""
    (cell,) = (cell for cell in code(notebook) if cell.id == name)
    (png,) = (out.data["image/png"] for out in cell.outputs if "image/png" in out.get("data", {}))
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))


def printed(notebook, name):
    (cell,) = (cell for cell in code(notebook) if cell.id == name)
    return "".join(out.text for out in cell.outputs if out.get("name") == "stdout")


def test_every_cell_runs_without_an_error_or_a_warning(executed):
    outputs = [out for cell in code(executed) for out in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error"]
    assert not [out.text for out in outputs if out.get("name") == "stderr"]
    assert all(cell.execution_count for cell in code(executed))


@pytest.mark.parametrize("name", DRAWN)
def test_each_drawing_cell_shows_a_picture_with_content(executed, name):
    pixels = picture(executed, name)
    assert min(pixels.shape[:2]) > 100
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert 0.02 < np.mean(pixels < 250) < 0.98  # neither a white page nor a black one


def test_the_exact_gradient_is_the_one_without_stop_gradient(executed):
    lines = printed(executed, "gradient-numbers").splitlines()
    difference, stopped, exact = (float(line.split()[-1]) for line in lines)
    assert exact == pytest.approx(difference, abs=2e-3)
    assert abs(stopped - difference) > 0.05


def test_the_network_it_trains_has_learnt_to_read(executed):
    wrong = int(printed(executed, "test").split()[0])
    assert wrong < 80  # of 1000


def test_the_committed_notebook_is_executed_and_names_no_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    counts = [cell.execution_count for cell in code(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    for name in DRAWN:
        assert picture(notebook, name).size
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert not any(cell.metadata for cell in notebook.cells)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)  # its base64 has slashes
    absolute = re.compile(r"""(^|[\s"'(=\[])(/\w[\w.-]*/\w|[A-Z]:\\)""", re.MULTILINE)
    texts = [text for cell in notebook.cells for text in _texts(cell)]
    assert not [text for text in texts if absolute.search(text)]
    assert absolute.search(str(NOTEBOOK))  # it finds one where there is one


def _texts(node):
    """Every string in a cell."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for part in node.values() if isinstance(node, dict) else node:
            yield from _texts(part)
