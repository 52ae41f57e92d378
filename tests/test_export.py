"""Exported functions: a network in one file that runs without capsjax."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import capsjax
import tiny
from capsjax import weights

PROGRAM = """
import sys
import jax, numpy as np
function = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
images = np.load(sys.argv[2])
results = function.call(images)
assert not [name for name in sys.modules if name.startswith(("capsjax", "flax"))]
np.savez(sys.argv[3], *[array for array in results if array is not None])
print(function.platforms)
"""


@pytest.mark.slow
@pytest.mark.parametrize("make_model", [tiny.make_capsnet, tiny.make_normalised])
def test_an_exported_network_runs_without_capsjax_on_any_number_of_images(tmp_path, make_model):
    model = make_model()
    weights.export(model, tmp_path / "net.jax")
    for number in (1, 5):
        images = np.random.default_rng(1).random((number, *tiny.IMAGE)).astype(np.float32)
        np.save(tmp_path / "images.npy", images)
        paths = [str(tmp_path / name) for name in ("net.jax", "images.npy", "results.npz")]
        command = [sys.executable, "-c", PROGRAM, *paths]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == "('cpu', 'cuda', 'tpu')\n"
        expected = [array for array in capsjax.predict(model, images) if array is not None]
        with np.load(tmp_path / "results.npz") as results:
            for ours, theirs in zip(results.values(), expected, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_an_export_is_for_the_platforms_that_are_asked_for(tmp_path):
    weights.export(tiny.make_capsnet(), tmp_path / "net.jax", platforms=("cpu",))
    function = jax.export.deserialize(bytearray((tmp_path / "net.jax").read_bytes()))
    assert function.platforms == ("cpu",)
    assert function.call(jnp.zeros((1, *tiny.IMAGE)))[1].shape == (1, tiny.NUM_CLASSES)


def test_an_export_that_cannot_be_written_is_an_os_error_and_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        weights.export(tiny.make_normalised(), tmp_path / "folder", platforms=("cpu",))
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]
