"""--testing --weights A B C: several networks answer together."""

import numpy as np
import pytest

import capsjax
from tiny_run import make_images, read_json, run_command

pytestmark = pytest.mark.slow


@pytest.fixture
def members(trained):
    """Trains three networks, one of them with another number of iterations."""
    return [trained(seed=1).folder, trained(seed=2).folder, trained(routings=2).folder]


def test_several_runs_and_files_are_tested_as_one_network(members, tmp_path):
    weights = (members[0], members[1] / "weights.safetensors", members[2])
    outcome = run_command(testing=True, weights=weights, save_dir=tmp_path, pictures=True)
    assert outcome.status == 0, outcome.err
    nets = [capsjax.weights.load(folder / "weights.safetensors") for folder in members]
    images = make_images()
    scores = sum(np.asarray(capsjax.predict(net, images["x_test"]).scores) for net in nets)
    wrong = int(np.sum(scores.argmax(-1) != images["y_test"]))
    assert outcome.out.splitlines()[-1].endswith(f" % ({wrong} of 23)")
    assert {path.name for path in tmp_path.iterdir()} == {"errors.png", "test.json", ".lock"}
    assert "no capsules: an ensemble has those of several networks\n" in outcome.out
    left = read_json(tmp_path, "test.json")
    assert left["weights"] == [members[0].name, "weights.safetensors", members[2].name]
    assert (left["test"]["wrong"], left["test"]["examples"]) == (wrong, 23)
    assert left["test"]["error"] == pytest.approx(100 * wrong / 23)


def test_each_member_keeps_its_iterations_of_routing_unless_others_are_asked_for(
    members, base, tmp_path
):
    files = tuple(folder / "weights.safetensors" for folder in members)
    flags = {"testing": True, "weights": files, "data_dir": base["data_dir"]}
    for asked, expected in ((None, [3, 3, 2]), (1, [1, 1, 1])):
        outcome = run_command(save_dir=tmp_path, routings=asked, **flags)
        assert outcome.status == 0, outcome.err
        (net,) = outcome.drawn
        assert [config.routing.iterations for config in net.config] == expected


def test_several_networks_are_not_trained(members, tmp_path):
    outcome = run_command(weights=tuple(members), save_dir=tmp_path)
    assert outcome.status == 2
    assert "several --weights are an ensemble" in outcome.err


def test_a_run_that_has_not_left_its_weights_is_refused(members, copied, tmp_path):
    (copied / "weights.safetensors").unlink()
    outcome = run_command(testing=True, weights=(members[0], copied), save_dir=tmp_path / "new")
    assert outcome.status == 2
    assert f"{copied} holds no weights.safetensors: that run has not ended" in outcome.err
    assert not (tmp_path / "new").exists()
