"""What a run prints and what its folder holds."""

import contextlib
import csv
import io
import re
from pathlib import Path
from typing import Any
from unittest import mock

import chex
import jax
import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

import capsjax
from capsjax import train, weights
from capsjax.run import loop
from hooks import after_step
from tiny_run import (
    STEPS,
    have_same_bits,
    list_steps,
    make_images,
    read_json,
    read_params,
    read_rows,
    read_tree,
    read_weights,
)

PICTURES = ("curves.png", "reconstructions.png", "perturbations.png", "errors.png", "capsules.png")


def test_it_prints_source_devices_parameters_an_epoch_a_line_and_the_result(plain, base):
    lines = plain.out.splitlines()
    convolutions = (3 * 3 * 1 * 4 + 4) + (3 * 3 * 4 * 2 * 8 + 2 * 8)
    capsules, decoder = 10 * (3 * 3 * 2) * 4 * 8, (10 * 4 * 8 + 8) + (8 * 100 + 100)
    assert lines[:5] == [
        f"data      mnist: the arrays in {base['data_dir']}",
        "          60 training and 23 test images of 10×10×1 in 10 classes",
        "devices   1 of 8 × cpu",
        f"network   {convolutions + capsules + decoder:,} parameters",
        f"run       {plain.folder}",
    ]
    for number, (line, row) in enumerate(zip(lines[5:7], read_rows(plain.folder), strict=True), 1):
        train_error, test_error = float(row["train_error"]), float(row["test_error"])
        assert re.fullmatch(
            rf"epoch {number}/2: train loss {row['train_loss']} error {train_error:.2f} %, "
            rf"test loss {row['test_loss']} error {test_error:.2f} %, \d+ s, \d+ images/s",
            line,
        )
    assert re.fullmatch(r"test error: \d+\.\d\d % \(\d+ of 23\)", lines[7])
    assert len(lines) == 8
    assert plain.err == ""


@pytest.mark.slow
def test_the_result_counts_the_test_images_that_the_trained_network_misreads(trained):
    outcome = trained(seed=1)
    images = make_images()
    predicted = np.asarray(capsjax.predict(outcome.drawn[0], images["x_test"]).predicted)
    wrong = int(np.sum(predicted != images["y_test"]))
    assert outcome.out.splitlines()[-1] == f"test error: {100 * wrong / 23:.2f} % ({wrong} of 23)"
    assert have_same_bits(weights.arrays_of(outcome.drawn[0]), read_params(outcome.folder))


@pytest.mark.slow
def test_without_any_data_it_takes_the_mnist_of_the_package(start):
    outcome = start(data_dir=None, train_size=500, batch_size=500, epochs=1)
    lines = outcome.out.splitlines()
    assert lines[0] == "data      mnist: the archive shipped with capsjax"
    assert "500 training and 10,000 test images of 28×28×1 in 10 classes" in lines[1]
    assert re.fullmatch(r"test error: \d+\.\d\d % \(\d+ of 10000\)", lines[-1])


def test_the_progress_bar_shows_loss_accuracy_speed_and_time_left(start):
    shown = io.StringIO()

    class Bar(tqdm):
        def __init__(self, **options: Any):
            watched = {"disable": False, "file": shown, "mininterval": 0, "ncols": 120}
            super().__init__(**options | watched)

    with mock.patch.object(loop, "tqdm", Bar):
        start(epochs=1)
    line = shown.getvalue().split("\r")[-3]  # the last two clear it
    for part in ("epoch 1/1", r"\d+%", r"\d images/s", r"\d\d:\d\d left"):
        assert re.search(part, line)
    assert re.search(r"accuracy=\d+\.\d %, loss=\d\.\d{4}", line)


def test_the_folder_holds_settings_metrics_checkpoints_weights_and_pictures(plain):
    names = {path.name for path in plain.folder.iterdir()}
    assert names == {
        ".lock",
        "config.json",
        "metrics.csv",
        "checkpoints",
        "weights.safetensors",
        *PICTURES,
    }
    assert list_steps(plain.folder) == [STEPS, 2 * STEPS]


def test_the_weights_that_a_run_leaves_are_those_of_its_last_checkpoint(plain):
    assert have_same_bits(read_weights(plain.folder), read_params(plain.folder))


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "preset"), [({}, "seed"), ({"preset": "paper"}, "paper")])
def test_the_notes_of_the_weights_tell_preset_test_error_commit_and_classes(trained, flags, preset):
    folder = trained(**flags).folder
    about = weights.describe(folder / "weights.safetensors")
    error = float(read_rows(folder)[-1]["test_error"])
    assert about is not None
    commit = read_json(folder)["git"]
    names = [str(number) for number in range(10)]
    assert about.notes == {
        "preset": preset,
        "test_error": error,
        "commit": commit,
        "class_names": names,
    }


@pytest.mark.parametrize("name", PICTURES)
def test_each_picture_has_content(plain, name):
    with Image.open(plain.folder / name) as picture:
        assert min(picture.size) > 100
        assert len(picture.convert("RGB").getcolors(2**24)) > 20


def test_config_json_holds_every_setting_versions_device_revision_and_data(plain, base):
    config = read_json(plain.folder)
    assert config["settings"] == {
        "recipe": {
            "preset": "seed",
            "routing": None,
            "routings": 3,
            "precision": "float32",
            "seed": 0,
        },
        "training": {
            "epochs": 2,
            "batch_size": 10,
            "lr": 0.001,
            "lr_decay": 0.9,
            "loss": "margin",
            "margin_steps": 10_000,
            "lam_recon": 0.0005 * 100,
            "shift_pixels": 2,
            "rotation": 0,
            "shear": 0,
            "zoom": 0,
            "elastic": 0,
            "average": None,
            "target": None,
        },
        "images": {
            "dataset": "mnist",
            "data_dir": str(base["data_dir"]),
            "download": False,
            "train_size": None,
            "validation": 0,
        },
        "run": {"checkpoint_steps": 200, "devices": 1, "weights": []},
    }
    assert config["versions"]["jax"] == jax.__version__
    assert {"python", "capsjax", "jaxlib", "flax", "optax", "numpy"} < config["versions"].keys()
    assert config["device"] == "8 × cpu (cpu)"
    assert config["data"]["source"] == f"mnist: the arrays in {base['data_dir']}"
    assert config["steps_per_epoch"] == STEPS
    if (Path(__file__).parents[2] / ".git").exists():
        assert re.fullmatch(r"\S*[0-9a-f]{7,}(-dirty)?", config["git"])


def test_config_json_is_written_before_the_first_step(start, tmp_path):
    seen = []

    def look(state, diagnostics):
        seen.extend(sorted(path.name for path in (tmp_path / "run").iterdir()))
        raise MemoryError

    with after_step(1, look), pytest.raises(MemoryError):
        start()
    assert seen == [".lock", "checkpoints", "config.json"]


@pytest.mark.slow
def test_metrics_csv_holds_a_row_an_epoch_with_every_metric(trained):
    folder = trained(validation=10).folder
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = ("loss", "margin", "reconstruction", "error")
    columns = [f"{split}_{name}" for split in ("train", "validation", "test") for name in names]
    assert [list(row) for row in rows] == [
        ["epoch", "step", "learning_rate", *columns, "seconds", "images_per_second"]
    ] * 2
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert [row["step"] for row in rows] == ["5", "10"]
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([1e-3, 9e-4])
    for row in ({name: float(value) for name, value in row.items()} for row in rows):
        for split, examples in (("train", 50), ("validation", 10), ("test", 23)):
            margin, reconstruction = row[f"{split}_margin"], row[f"{split}_reconstruction"]
            assert 0 < margin < 10
            assert 0 < reconstruction < 1
            assert row[f"{split}_loss"] == pytest.approx(margin + 0.05 * reconstruction, abs=2e-6)
            wrong = row[f"{split}_error"] / 100 * examples
            assert 0 <= wrong <= examples
            assert wrong == pytest.approx(round(wrong), abs=1e-4 * examples)
        assert row["seconds"] > 0
        speed, seconds = row["images_per_second"], row["seconds"]  # both are rounded
        assert speed * seconds == pytest.approx(50, abs=0.005 * speed + 0.05 * seconds)


def test_without_validation_its_columns_are_empty(plain):
    for row in read_rows(plain.folder):
        empty = {name for name, value in row.items() if not value}
        assert empty == {name for name in row if name.startswith("validation")}


def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_is(start, copied):
    before = read_tree(copied)
    outcome = start(save_dir=copied, seed=1)
    assert outcome.status == 2
    assert f"{copied} holds a run already" in outcome.err
    assert f"--resume {copied}" in outcome.err
    assert read_tree(copied) == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["seed", "paper", "file"])
def test_each_step_is_compiled_once(start, plain, kind):
    file = {"weights": plain.folder / "weights.safetensors"}
    flags = file if kind == "file" else {"preset": kind}
    chex.clear_trace_counter()
    with contextlib.ExitStack() as stack:
        for name in ("train_step", "eval_step"):
            once = chex.assert_max_traces(getattr(train, name), n=1)
            stack.enter_context(mock.patch.object(train, name, once))
        assert start(epochs=3, **flags).status == 0
