"""--weights: training starts from another run or from a file."""

import shutil
from pathlib import Path
from unittest import mock

import chex
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import capsjax
from capsjax import weights
from capsjax.checkpoint import Checkpoints
from capsjax.run import loop
from capsjax.run.command_line import parse
from capsjax.run.folder import INITIAL_WEIGHTS
from hooks import after_step, kill
from tiny_run import (
    EXPERIMENT,
    STEPS,
    have_same_bits,
    make_arguments,
    read_json,
    read_params,
    read_rows,
    run_command,
)

pytestmark = pytest.mark.slow


def write_torch_file(folder: Path) -> Path:
    """Writes weights of a network on the tiny images, named as in the PyTorch code."""
    rng = np.random.default_rng(0)
    sizes = {"channels": 4, "kernel_size": 3, "types": 2, "dim_class": 4, "hidden": (8, 6)}
    net = capsjax.CapsNet((10, 10, 1), 10, grouping="flat", **sizes, rngs=nnx.Rngs(0))
    theirs = {n: rng.normal(0, 0.3, a.shape).astype("f4") for n, a in weights.to_torch(net).items()}
    save_file(theirs, folder / "torch.safetensors")
    return folder / "torch.safetensors"


def test_training_goes_on_from_a_file_of_pytorch_and_keeps_it(start, tmp_path):
    file = write_torch_file(tmp_path)
    theirs = weights.load(file)
    with after_step(STEPS + 2, kill), pytest.raises(MemoryError):
        start(weights=file, checkpoint_steps=2)
    file.unlink()
    resumed = run_command(resume=tmp_path / "run")
    assert resumed.status == 0, resumed.err
    assert resumed.drawn[0].primary.grouping == "flat"
    kept = weights.load(tmp_path / "run" / "start.safetensors")
    chex.assert_trees_all_equal(nnx.split(kept)[1], nnx.split(theirs)[1])
    tested = run_command(testing=True, weights=tmp_path / "run")
    assert tested.out.splitlines()[-1] == resumed.out.splitlines()[-1]
    # Also the next run knows what network it is.
    again = start("again", weights=tmp_path / "run", epochs=1)
    assert again.drawn[0].primary.grouping == "flat"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_preset_and_routings_are_those_of_the_weights(trained, start, kind):
    folder = trained(preset="paper", routings=2).folder
    source = folder if kind == "folder" else folder / "weights.safetensors"
    with mock.patch("capsjax.run.lifecycle.finish", side_effect=SystemExit(0)):  # begun is enough
        begun = start(weights=source)
    settings = read_json(begun.folder)["settings"]
    assert (settings["recipe"]["preset"], settings["recipe"]["routings"]) == ("paper", 2)
    assert settings["training"]["lam_recon"] == pytest.approx(1.0)
    refused = start("other", weights=source, preset="seed")
    assert refused.status == 2
    assert "--preset seed, but" in refused.err


@pytest.mark.parametrize(
    ("notes", "preset"),
    [({"preset": "paper"}, "paper"), ({"preset": "mine"}, "seed"), ({}, "seed")],
)
def test_the_preset_of_a_file_is_told_by_its_notes_and_not_guessed_from_its_sizes(
    trained, tmp_path, notes, preset
):
    net = weights.load(trained(preset="paper", routings=2).folder / "weights.safetensors")
    weights.save(net, tmp_path / "net.safetensors", notes)
    settings = parse(make_arguments(weights=tmp_path / "net.safetensors"), EXPERIMENT)
    assert (settings.recipe.preset, settings.recipe.routings) == (preset, 2)
    assert settings.training == EXPERIMENT.presets[preset].training


def test_a_folder_that_a_run_left_before_it_began_gets_the_network_that_is_asked_for(
    start, tmp_path
):
    (tmp_path / "run").mkdir()
    shutil.copy(write_torch_file(tmp_path), tmp_path / "run" / INITIAL_WEIGHTS)
    assert start().drawn[0].primary.grouping == "channels"
    assert not (tmp_path / "run" / INITIAL_WEIGHTS).exists()


def test_training_starts_where_a_file_of_pytorch_ends(start, tmp_path):
    outcome = start(weights=write_torch_file(tmp_path), epochs=1, lr=1e-12)
    expected = weights.to_torch(weights.load(tmp_path / "torch.safetensors"))
    for name, array in weights.to_torch(outcome.drawn[0]).items():
        np.testing.assert_allclose(array, expected[name], atol=1e-9)


@pytest.mark.parametrize(
    ("size", "words"),
    [((8, 8, 1), "takes images [8, 8, 1] in 10 classes"), ((10, 10, 1), "in 3 classes; these are")],
)
def test_a_file_of_a_network_for_other_images_is_refused(start, tmp_path, size, words):
    sizes = {"channels": 4, "kernel_size": 3, "types": 2}
    num_classes = 10 if size[0] == 8 else 3
    net = capsjax.CapsNet(size, num_classes, **sizes, rngs=nnx.Rngs(0))
    weights.save(net, tmp_path / "net.safetensors")
    outcome = start(weights=tmp_path / "net.safetensors")
    assert outcome.status == 2
    assert words in outcome.err
    assert not (tmp_path / "run").exists()


def test_weights_are_where_training_starts(start, plain):
    outcome = start(weights=plain.folder, lr=1e-12, epochs=1)
    assert [row["step"] for row in read_rows(outcome.folder)] == [str(STEPS)]
    params, theirs = read_params(outcome.folder), read_params(plain.folder)
    for name in theirs:
        np.testing.assert_allclose(params[name], theirs[name], rtol=0, atol=1e-10)


def test_the_best_epoch_is_chosen_on_the_validation_images_and_never_on_the_test_images(start):
    validation, test = [1, 5, 8, 3], [9, 3, 0, 5]
    evaluate = loop.Runner.evaluate

    def evaluate_as_scripted(self, state, train_indices=None):
        wrongs = test if train_indices is None else validation
        metrics, predicted = evaluate(self, state, train_indices)
        return metrics._replace(wrong=wrongs.pop(0)) if wrongs else metrics, predicted

    with mock.patch.object(loop.Runner, "evaluate", evaluate_as_scripted):
        outcome = start(validation=10, epochs=4)
    assert "best on the validation images: epoch 1\n" in outcome.out
    with Checkpoints(outcome.folder / "checkpoints") as checkpoints:
        best = checkpoints.best()
    assert best.step == 5
    drawn = weights.arrays_of(outcome.drawn[0])
    assert have_same_bits(drawn, {name: best.arrays[f"params.{name}"] for name in drawn})
    assert not have_same_bits(drawn, read_params(outcome.folder))
    tested = run_command(testing=True, weights=outcome.folder)
    assert tested.out.splitlines()[-1] == outcome.out.splitlines()[-1]
    assert have_same_bits(weights.arrays_of(tested.drawn[0]), drawn)
