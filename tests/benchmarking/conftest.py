"""The file that all processes of the benchmark read."""

import pytest

from benchmarking.capsjax_tasks import write_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A few images and the initial parameters."""
    path = tmp_path_factory.mktemp("benchmark") / "inputs.npz"
    write_inputs(path, 32)
    return path
