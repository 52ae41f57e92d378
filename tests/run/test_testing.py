"""--testing: a run or a file is tested as it was when it was trained, and nothing is trained."""

import dataclasses
import shutil

import pytest
from flax import nnx

import capsjax
from test_output import PICTURES
from tiny_run import EXPERIMENT, read_rows, read_tree, run_command

pytestmark = pytest.mark.slow


def test_testing_prints_loss_and_error_and_draws_again_with_no_training(copied, plain):
    for name in PICTURES:
        (copied / name).unlink()
    before = read_tree(copied)
    outcome = run_command(testing=True, weights=copied, pictures=True)
    assert outcome.status == 0
    lines = outcome.out.splitlines()
    row = read_rows(plain.folder)[-1]
    assert f"test loss: {row['test_loss']}" in lines
    assert lines[-1] == plain.out.splitlines()[-1]
    assert not [line for line in lines if line.startswith("epoch")]
    after = read_tree(copied)
    assert after.keys() - before.keys() == {*PICTURES, "test.json"}
    assert {name: after[name] for name in before} == before


def test_testing_into_another_folder_leaves_the_run_alone(plain, tmp_path):
    before = read_tree(plain.folder)
    new = tmp_path / "new"
    outcome = run_command(testing=True, weights=plain.folder, save_dir=new, pictures=True)
    assert outcome.status == 0
    assert {*read_tree(new)} == {*PICTURES, "test.json", ".lock"}
    assert read_tree(plain.folder) == before


def test_testing_takes_the_settings_of_the_run(trained, tmp_path):
    folder = trained(preset="paper").folder
    outcome = run_command(testing=True, weights=folder, save_dir=tmp_path)
    assert outcome.out.splitlines()[-1] == trained(preset="paper").out.splitlines()[-1]


def test_the_file_that_a_run_leaves_is_tested_as_the_run_is(plain, base, tmp_path):
    file = tmp_path / "net.safetensors"
    shutil.copy(plain.folder / "weights.safetensors", file)
    flags = {"data_dir": base["data_dir"], "save_dir": tmp_path / "tested"}
    outcome = run_command(testing=True, weights=file, pictures=True, **flags)
    assert outcome.status == 0, outcome.err
    assert f"of {file}\n" in outcome.out
    assert outcome.out.splitlines()[-1] == plain.out.splitlines()[-1]
    assert {*read_tree(tmp_path / "tested")} == {*PICTURES[1:], "test.json", ".lock"}


def test_a_test_needs_no_batch_of_training_images(plain, base, tmp_path):
    file = plain.folder / "weights.safetensors"
    flags = {"data_dir": base["data_dir"], "save_dir": tmp_path, "batch_size": 2048}
    refused = run_command(weights=file, **flags)
    assert "--batch-size 2048: there are 60 images to train on" in refused.err
    outcome = run_command(testing=True, weights=file, **flags)
    assert outcome.status == 0, outcome.err
    assert outcome.out.splitlines()[-1] == plain.out.splitlines()[-1]


@pytest.mark.parametrize("asked", [None, 2, 1])
def test_a_file_brings_its_iterations_of_routing_unless_others_are_asked_for(
    trained, base, tmp_path, asked
):
    outcome = run_command(
        testing=True,
        weights=trained(routings=2).folder / "weights.safetensors",
        routings=asked,
        data_dir=base["data_dir"],
        save_dir=tmp_path,
    )
    assert outcome.drawn[0].class_caps.routing.iterations == (asked or 2)
    expected = trained(routings=2).out.splitlines()[-1]
    assert asked == 1 or outcome.out.splitlines()[-1] == expected


@dataclasses.dataclass(frozen=True)
class MeanRouting:
    """A routing without iterations."""

    name = "mean"

    def initial_bias(self, j, i, d):
        return None

    def __call__(self, u, weight, bias=None):
        return capsjax.squash(capsjax.predictions(u, weight).mean(-2))


def test_the_file_of_a_network_whose_routing_has_no_iterations_is_tested(
    base, tmp_path, monkeypatch
):
    monkeypatch.setitem(capsjax.ROUTINGS, "mean", MeanRouting)
    config = dataclasses.replace(EXPERIMENT.presets["seed"].network, routing=MeanRouting())
    net = config.build((10, 10, 1), 10, rngs=nnx.Rngs(0))
    capsjax.weights.save(net, tmp_path / "net.safetensors")
    flags = {"data_dir": base["data_dir"], "save_dir": tmp_path / "tested"}
    outcome = run_command(testing=True, weights=tmp_path / "net.safetensors", **flags)
    assert outcome.status == 0, outcome.err
    assert outcome.drawn[0].config == config
