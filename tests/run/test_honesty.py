"""The test images influence nothing but the test error: not training, not choice, not schedule."""

import numpy as np
import pytest
from flax import nnx

import capsjax
from capsjax._trees import fill
from tiny_run import (
    have_same_bits,
    make_images,
    read_arrays,
    read_params,
    read_rows,
    read_weights,
    run_command,
    write_images,
)

pytestmark = pytest.mark.slow


def praise_the_last_epoch(folder) -> np.ndarray:
    """Makes labels that the network of the last epoch predicts without an error."""
    graph, variables = nnx.split(capsjax.weights.load(folder / "weights.safetensors"))
    last = fill(nnx.to_pure_dict(variables), read_params(folder))
    net = nnx.merge(graph, nnx.State(last))
    return np.asarray(capsjax.predict(net, make_images()["x_test"]).predicted)


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ({}, "images"),
        ({}, "labels"),
        ({"validation": 10, "epochs": 6, "lr": 0.01}, "labels"),
        ({"preset": "best"}, "labels"),
    ],
    ids=str,
)
def test_another_test_set_leaves_the_same_weights_to_the_bit(
    trained, base, tmp_path, flags, changed
):
    ours = trained(**flags)
    if changed == "labels":
        other = {"y_test": praise_the_last_epoch(ours.folder)}
    else:
        noise = np.random.default_rng(0).integers(0, 256, (11, 10, 10), np.uint8)
        other = {"x_test": noise, "y_test": np.arange(11) % 10}
    data_dir = write_images(tmp_path / "other.npz", **other)
    theirs = run_command(**base | flags | {"data_dir": data_dir, "save_dir": tmp_path / "run"})
    assert theirs.status == 0, theirs.err
    assert have_same_bits(read_weights(theirs.folder), read_weights(ours.folder))
    assert have_same_bits(read_arrays(theirs.folder), read_arrays(ours.folder))
    for our_row, their_row in zip(read_rows(ours.folder), read_rows(theirs.folder), strict=True):
        differ = {name for name in our_row if our_row[name] != their_row[name]}
        assert differ  # the test set was another one
        assert all(name.startswith("test_") for name in differ)
