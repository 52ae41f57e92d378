"""A network of one's own, without a decoder and routing, is trained and tested like any other."""

import dataclasses
import math
from typing import ClassVar
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import capsjax
from capsjax import weights
from capsjax.presets import Preset, Training
from capsjax.run import Experiment
from hooks import after_step, raise_signal
from tiny_run import (
    STEPS,
    have_same_bits,
    make_images,
    read_arrays,
    read_json,
    read_rows,
    read_tree,
    read_weights,
    run_command,
)

pytestmark = pytest.mark.slow


@dataclasses.dataclass(frozen=True)
class BareConfig:
    """A network of one layer and batch normalisation."""

    name: ClassVar[str] = "bare"
    dim: int = 3

    def build(self, image_shape, num_classes, *, rngs):
        return BareNetwork(self, image_shape, num_classes, rngs=rngs)


class BareNetwork(capsjax.Network):
    def __init__(self, config, image_shape, num_classes, *, rngs):
        super().__init__(config, image_shape, num_classes)
        pixels = math.prod(image_shape)
        self.norm = nnx.BatchNorm(pixels, rngs=rngs)
        self.layer = nnx.Linear(pixels, num_classes * config.dim, rngs=rngs)

    def __call__(self, images, labels=None):
        self.check_images(images)
        x = self.layer(self.norm(images.reshape(*images.shape[:-3], -1)))
        capsules = capsjax.squash(x.reshape(*x.shape[:-1], self.num_classes, -1))
        return capsjax.Output(capsjax.length(capsules), capsules, None)


BARE = Experiment(
    presets={"bare": Preset(BareConfig(), Training(epochs=2, batch_size=10, average=0.9))}
)


@pytest.fixture(scope="module", autouse=True)
def _registry():
    """Registers the network for these tests only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(capsjax.NETWORKS, BareConfig.name, BareConfig)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base):
    """Trains a run that nobody disturbs, with its pictures."""
    outcome = run_command(BARE, pictures=True, save_dir=tmp_path_factory.mktemp("bare"), **base)
    assert outcome.status == 0, outcome.err
    return outcome


def test_it_is_trained_from_the_command_line(whole):
    assert whole.err == ""
    assert whole.out.splitlines()[-1].startswith("test error: ")
    recipe = read_json(whole.folder)["settings"]["recipe"]
    assert (recipe["preset"], recipe["routings"]) == ("bare", None)
    first, last = read_rows(whole.folder)
    assert float(last["train_loss"]) < float(first["train_loss"])


def test_metrics_csv_has_no_column_of_a_loss_that_it_lacks(whole):
    names = ("loss", "margin", "error")
    for row in read_rows(whole.folder):
        assert [*row] == [
            *("epoch", "step", "learning_rate"),
            *(f"{split}_{name}" for split in ("train", "validation", "test") for name in names),
        ]
        assert row["test_loss"] == row["test_margin"]


def test_the_pictures_that_need_a_decoder_are_left_out_and_that_is_said(whole):
    pictures = {path.name for path in whole.folder.glob("*.png")}
    assert pictures == {"curves.png", "errors.png", "capsules.png"}
    assert "no reconstructions and perturbations: this network has no decoder\n" in whole.out
    with Image.open(whole.folder / "curves.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20


def test_its_batch_statistics_are_in_the_checkpoint_and_in_the_weights(whole):
    arrays = read_arrays(whole.folder)
    for name in ("mean", "var"):
        statistics = arrays[f"statistics.norm.{name}"]
        assert len(np.unique(statistics)) > 20
        np.testing.assert_array_equal(read_weights(whole.folder)[f"norm.{name}"], statistics)
    about = weights.describe(whole.folder / "weights.safetensors")
    assert (about.config, about.notes["preset"]) == (BareConfig(), "bare")


def test_a_stopped_run_continues_to_the_same_bits(whole, base, tmp_path):
    with after_step(STEPS + 2, raise_signal()):
        stopped = run_command(BARE, save_dir=tmp_path / "run", **base)
    assert stopped.status == 143
    assert run_command(BARE, resume=tmp_path / "run").status == 0
    assert have_same_bits(read_arrays(tmp_path / "run"), read_arrays(whole.folder))
    assert read_rows(tmp_path / "run") == read_rows(whole.folder)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_run_and_file_are_tested_as_they_were_trained(whole, base, tmp_path, kind):
    file = {"weights": whole.folder / "weights.safetensors", "data_dir": base["data_dir"]}
    source = {"weights": whole.folder} if kind == "folder" else file
    before = read_tree(whole.folder)
    tested = run_command(BARE, testing=True, save_dir=tmp_path, **source)
    assert tested.status == 0, tested.err
    assert tested.out.splitlines()[-1] == whole.out.splitlines()[-1]
    assert f"test loss: {read_rows(whole.folder)[-1]['test_loss']}\n" in tested.out
    assert read_tree(whole.folder) == before


def test_another_run_starts_from_its_weights_and_statistics(whole, base, tmp_path):
    with mock.patch("capsjax.run.lifecycle.finish", side_effect=MemoryError) as finish:
        flags = {"weights": whole.folder, "save_dir": tmp_path / "run"}
        with pytest.raises(MemoryError):
            run_command(BARE, **base, **flags)
    state = finish.call_args.args[-1].state
    saved = read_arrays(whole.folder)
    for name in ("mean", "var"):
        np.testing.assert_array_equal(
            state.statistics["norm"][name], saved[f"statistics.norm.{name}"]
        )
    for kind in ("kernel", "bias"):
        average = saved[f"average.layer.{kind}"]
        np.testing.assert_array_equal(state.params["layer"][kind], average)
        np.testing.assert_array_equal(state.average["layer"][kind], average)


@pytest.mark.parametrize("flags", [{"routings": 3}, {"routing": "uniform"}])
def test_routing_is_refused_in_words(base, tmp_path, flags):
    outcome = run_command(BARE, save_dir=tmp_path / "run", **flags, **base)
    assert outcome.status == 2
    assert ": the network bare takes no routing" in outcome.err
    assert not (tmp_path / "run").exists()


def test_its_file_predicts_without_the_run(whole):
    model = weights.load(whole.folder / "weights.safetensors")
    predicted, _, reconstruction = capsjax.predict(model, make_images()["x_test"])
    assert reconstruction is None
    wrong = int(jnp.sum(predicted != make_images()["y_test"]))
    assert whole.out.splitlines()[-1].endswith(f"({wrong} of 23)")
