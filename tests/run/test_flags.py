"""What each flag changes in a run."""

import re
from unittest import mock

import numpy as np
import pytest
from tensorflow_datasets.image_classification import mnist as stock

from capsjax.run import loop
from capsjax.train import jit_steps
from data_files import digits, gzipped, serve, write_idx
from tiny_run import (
    have_same_bits,
    list_steps,
    make_images,
    read_arrays,
    read_json,
    read_params,
    read_rows,
    write_images,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("preset", "paper"),
        ("routings", 1),
        ("epochs", 3),
        ("batch_size", 20),
        ("lr", 0.01),
        ("lr_decay", 0.5),
        ("loss", "spread"),
        ("lam_recon", 10.0),
        ("shift_pixels", 0),
        ("seed", 1),
        ("precision", "bfloat16"),
        ("train_size", 40),
        ("validation", 10),
    ],
)
def test_a_flag_changes_the_trained_parameters_and_stands_in_config_json(
    trained, plain, flag, value
):
    folder = trained(**{flag: value}).folder
    assert not have_same_bits(read_params(folder), read_params(plain.folder))
    groups = read_json(folder)["settings"].values()
    assert {name: v for group in groups for name, v in group.items()}[flag] == value


def test_the_same_seed_gives_the_same_bits(trained, start):
    again = start(seed=1)
    assert have_same_bits(read_arrays(again.folder), read_arrays(trained(seed=1).folder))
    assert read_rows(again.folder) == read_rows(trained(seed=1).folder)


def test_preset_paper_has_the_routing_bias_and_its_own_schedule(trained):
    folder = trained(preset="paper").folder
    assert "params.class_caps.bias" in read_arrays(folder)
    training = read_json(folder)["settings"]["training"]
    assert training["lam_recon"] == pytest.approx(0.01 * 100)
    assert training["lr_decay"] == pytest.approx(0.96**75)
    rates = [float(row["learning_rate"]) for row in read_rows(folder)]
    assert rates == pytest.approx([1e-3, 1e-3 * 0.96**75], rel=1e-5)


def test_epochs_are_passes_and_the_first_ones_are_the_same(trained, plain):
    rows = read_rows(trained(epochs=3).folder)
    assert len(rows) == 3
    assert rows[:2] == read_rows(plain.folder)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [({"batch_size": 20}, 3), ({"train_size": 40}, 4), ({"validation": 10}, 5)],
    ids=["batch_size", "train_size", "validation"],
)
def test_the_steps_follow_from_batch_and_images_and_the_rest_is_dropped(trained, flags, steps):
    rows = read_rows(trained(**flags).folder)
    assert [row["step"] for row in rows] == [str(steps), str(2 * steps)]


def test_lr_is_the_first_rate_and_lr_decay_its_factor_an_epoch(trained, plain):
    rates = [float(row["learning_rate"]) for row in read_rows(trained(lr=0.01).folder)]
    assert rates == pytest.approx([0.01, 0.009])
    rows = read_rows(trained(lr_decay=0.5).folder)
    assert float(rows[1]["learning_rate"]) == pytest.approx(0.0005)
    assert rows[0] == read_rows(plain.folder)[0]


def test_loss_names_its_columns_of_metrics_csv(trained):
    for row in read_rows(trained(loss="spread").folder):
        assert {"train_spread", "test_spread", "test_reconstruction"} < row.keys()
        assert "test_margin" not in row


def test_lam_recon_weighs_the_reconstruction(trained):
    for row in read_rows(trained(lam_recon=10.0).folder):
        loss = float(row["test_margin"]) + 10 * float(row["test_reconstruction"])
        assert float(row["test_loss"]) == pytest.approx(loss, abs=2e-5)


def test_precision_leaves_the_parameters_in_float32(trained):
    params = read_params(trained(precision="bfloat16").folder)
    assert {array.dtype for array in params.values()} == {np.dtype("float32")}


def test_data_dir_and_dataset_choose_the_images_and_name_the_default_folder(
    start, plain, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "mine" / "one.npz")
    write_images(tmp_path / "mine" / "our-two.npz", x_train=255 - make_images()["x_train"])
    outcome = start(data_dir=tmp_path / "mine", dataset="our-two", save_dir=None)
    assert outcome.out.startswith(f"data      our-two: the arrays in {tmp_path}/mine/our-two.npz\n")
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"our-two-\d{8}-\d{6}", folder.name)
    assert not have_same_bits(read_params(folder), read_params(plain.folder))
    same = start("one", data_dir=tmp_path / "mine", dataset="one")
    assert have_same_bits(read_params(same.folder), read_params(plain.folder))


def test_download_fetches_what_is_missing(start, tmp_path, monkeypatch):
    # Refused, but only once the images are there.
    flags = {"data_dir": tmp_path / "tfds", "validation": 300}
    assert "--dataset mnist --download" in start(**flags).err
    with serve(write_idx(tmp_path / "served", digits(), gzipped())) as url:
        monkeypatch.setattr(stock.MNIST, "URL", url)
        outcome = start(**flags, download=True)
    assert "--validation 300: there are 300 training images" in outcome.err
    assert (tmp_path / "tfds" / "mnist" / "3.0.1" / "dataset_info.json").is_file()


def test_checkpoint_steps_makes_checkpoints_within_the_epoch_and_changes_no_bit(start, plain):
    outcome = start(checkpoint_steps=4)
    assert list_steps(outcome.folder) == [10, 12]
    assert have_same_bits(read_arrays(outcome.folder), read_arrays(plain.folder))


@pytest.mark.parametrize(("devices", "used"), [(2, 2), (None, 5)], ids=["two", "default"])
def test_devices_share_the_batch_and_by_default_as_many_as_divide_it(start, plain, devices, used):
    meshes = []

    def note_mesh(setup, mesh):
        meshes.append(mesh)
        return jit_steps(setup, mesh)

    with mock.patch.object(loop, "jit_steps", note_mesh):
        outcome = start(devices=devices)
    assert f"devices   {used} of 8 × cpu" in outcome.out
    assert [mesh.size for mesh in meshes] == [used]
    losses, expected = (
        [float(row["train_loss"]) for row in read_rows(folder)]
        for folder in (outcome.folder, plain.folder)
    )
    assert losses == pytest.approx(expected, 1e-4)
