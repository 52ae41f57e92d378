"""The experiment from end to end: what it prints and leaves, what each flag changes, how it goes
on, and how it stops."""

import contextlib
import csv
import errno
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image
from safetensors.numpy import save_file
from tensorflow_datasets.image_classification import mnist as stock
from tqdm import tqdm

import allocator
import capsjax
import loop
import machine
import mnist
import run_folder
from capsjax import train, weights
from capsjax._trees import named_leaves
from capsjax.checkpoint import Checkpoints
from data_files import digits, gzipped, serve, write_idx
from plan import make_plan
from settings import parse
from tiny_run import (
    PRESETS,
    STEPS,
    Ended,
    arrays_of,
    command_line,
    experiment,
    images,
    params_of,
    rows_of,
    same_bits,
    steps_in,
    tree,
    write_images,
)

PICTURES = ("curves.png", "reconstructions.png", "perturbations.png", "errors.png")


@pytest.fixture(scope="module", autouse=True)
def _compile_cache(tmp_path_factory):
    """What one test compiled the others load; compiling takes far longer than the tiny steps."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The flags that every run of these tests shares."""
    return {"data_dir": write_images(tmp_path_factory.mktemp("images") / "tiny.npz"), "devices": 1}


@pytest.fixture
def start(tmp_path, base):
    """Starts a run in a folder of its own."""

    def started(name="run", **flags) -> Ended:
        return experiment(**base | {"save_dir": tmp_path / name} | flags)

    return started


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base):
    """Runs that end by themselves, each trained once for all tests; for reading only."""

    @functools.cache
    def trained(**flags) -> Ended:
        ended = experiment(**base | {"save_dir": tmp_path_factory.mktemp("trained")} | flags)
        assert ended.status == 0, ended.err
        return ended

    return trained


@pytest.fixture(scope="module")
def plain(trained):
    """A run with every default of the tiny preset, with its pictures."""
    return trained(pictures=True)


@pytest.fixture
def copied(tmp_path, plain):
    """A copy of the plain run, to be changed."""
    return shutil.copytree(plain.folder, tmp_path / "copied")


@contextlib.contextmanager
def after_step(step, act):
    """Has `act` called with the state and the report after a step; it returns what is to follow."""

    def patched(recipe, mesh):
        run, evaluate = train.jit_steps(recipe, mesh)

        def hooked(*args):
            state, report = run(*args)
            return act(state, report) if int(report.step) == step else (state, report)

        return hooked, evaluate

    with mock.patch.object(loop, "jit_steps", patched):
        yield


def signalled(number=signal.SIGTERM):
    """For `after_step`: the process gets a signal."""

    def act(state, report):
        signal.raise_signal(number)
        return state, report

    return act


def killed(state, report):
    """For `after_step`: nothing more is written, as after SIGKILL."""
    raise MemoryError


def json_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def drawn_params(ended: Ended) -> dict[str, np.ndarray]:
    """The parameters of the network that a run drew, named as in its checkpoints."""
    _, state = train.create(ended.drawn[-1], optax.identity())
    return {f"params.{name}": np.asarray(a) for name, a in named_leaves(state.params)}


# What a run prints and leaves.


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
    for number, (line, row) in enumerate(zip(lines[5:7], rows_of(plain.folder), strict=True), 1):
        train_error, test_error = float(row["train_error"]), float(row["test_error"])
        assert re.fullmatch(
            rf"epoch {number}/2: train loss {row['train_loss']} error {train_error:.2f} %, "
            rf"test loss {row['test_loss']} error {test_error:.2f} %, \d+ s, \d+ images/s",
            line,
        )
    assert re.fullmatch(r"test error: \d+\.\d\d % \(\d+ of 23\)", lines[7])
    assert len(lines) == 8
    assert plain.err == ""


def test_the_result_is_a_count_of_what_the_trained_network_misreads(trained):
    ended = trained(seed=1)
    classes = np.asarray(capsjax.predict(ended.drawn[0], images()["x_test"][..., None]).classes)
    wrong = int(np.sum(classes != images()["y_test"]))
    assert ended.out.splitlines()[-1] == f"test error: {100 * wrong / 23:.2f} % ({wrong} of 23)"
    assert same_bits(drawn_params(ended), params_of(ended.folder))


@pytest.mark.slow
def test_without_any_data_it_takes_the_mnist_of_the_package(start):
    ended = start(data_dir=None, train_size=500, batch_size=500, epochs=1)
    lines = ended.out.splitlines()
    assert lines[0] == "data      mnist: the archive shipped with capsjax"
    assert "60,000 training and 10,000 test images of 28×28×1 in 10 classes" in lines[1]
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
    assert steps_in(plain.folder) == [STEPS, 2 * STEPS]


def test_the_weights_that_a_run_leaves_are_those_of_its_last_checkpoint(plain):
    model = weights.load(plain.folder / "weights.safetensors")
    saved = params_of(plain.folder)
    for name, array in named_leaves(nnx.to_pure_dict(nnx.split(model)[1]), "params."):
        np.testing.assert_array_equal(array, saved[name])


@pytest.mark.parametrize("name", PICTURES)
def test_each_picture_has_content(plain, name):
    pixels = np.asarray(Image.open(plain.folder / name).convert("RGB"))
    assert min(pixels.shape[:2]) > 100
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_config_json_holds_every_setting_versions_device_revision_and_data(plain, base):
    config = json_of(plain.folder)
    assert config["settings"] == {
        "recipe": {
            "preset": "seed",
            "routings": 3,
            "epochs": 2,
            "batch_size": 10,
            "lr": 0.001,
            "lr_decay": 0.9,
            "lam_recon": 0.0005 * 100,
            "shift_pixels": 2,
            "precision": "float32",
            "seed": 0,
        },
        "images": {
            "dataset": "mnist",
            "data_dir": str(base["data_dir"]),
            "download": False,
            "train_size": None,
            "validation": 0,
        },
        "run": {
            "save_dir": str(plain.folder),
            "checkpoint_steps": 200,
            "devices": 1,
            "resume": None,
            "weights": None,
            "testing": False,
        },
    }
    assert config["versions"]["jax"] == jax.__version__
    assert {"python", "capsjax", "jaxlib", "flax", "optax", "numpy"} < config["versions"].keys()
    assert config["device"] == "8 × cpu (cpu)"
    assert config["data"]["source"] == f"mnist: the arrays in {base['data_dir']}"
    assert config["steps_per_epoch"] == STEPS
    if (Path(__file__).parents[1] / ".git").exists():
        assert re.fullmatch(r"\S*[0-9a-f]{7,}(-dirty)?", config["git"])


def test_config_json_is_written_before_the_first_step(start, tmp_path):
    seen = []

    def look(state, report):
        seen.extend(sorted(path.name for path in (tmp_path / "run").iterdir()))
        raise MemoryError

    with after_step(1, look), pytest.raises(MemoryError):
        start()
    assert seen == [".lock", "checkpoints", "config.json"]


def test_metrics_csv_holds_a_row_an_epoch_and_every_figure(trained):
    folder = trained(validation=10).folder
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [tuple(row) for row in rows] == [run_folder.COLUMNS] * 2
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
    for row in rows_of(plain.folder):
        empty = {name for name, value in row.items() if not value}
        assert empty == {name for name in row if name.startswith("validation")}


def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_is(start, copied):
    before = tree(copied)
    ended = start(save_dir=copied, seed=1)
    assert ended.status == 2
    assert f"{copied} holds a run already" in ended.err
    assert f"--resume {copied}" in ended.err
    assert tree(copied) == before


def test_each_step_is_compiled_once(start):
    chex.clear_trace_counter()
    with contextlib.ExitStack() as stack:
        for name in ("train_step", "eval_step"):
            once = chex.assert_max_traces(getattr(train, name), n=1)
            stack.enter_context(mock.patch.object(train, name, once))
        assert start(epochs=3).status == 0


# What each flag changes.


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("preset", "paper"),
        ("routings", 1),
        ("epochs", 3),
        ("batch_size", 20),
        ("lr", 0.01),
        ("lr_decay", 0.5),
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
    assert not same_bits(params_of(folder), params_of(plain.folder))
    groups = json_of(folder)["settings"].values()
    assert {name: v for group in groups for name, v in group.items()}[flag] == value


def test_the_same_seed_gives_the_same_bits(trained, start):
    again = start(seed=1)
    assert same_bits(arrays_of(again.folder), arrays_of(trained(seed=1).folder))
    assert rows_of(again.folder) == rows_of(trained(seed=1).folder)


def test_preset_paper_has_the_routing_bias_and_its_own_schedule(trained):
    folder = trained(preset="paper").folder
    assert "params.classes.bias" in arrays_of(folder)
    recipe = json_of(folder)["settings"]["recipe"]
    assert recipe["lam_recon"] == pytest.approx(0.01 * 100)
    assert recipe["lr_decay"] == pytest.approx(0.96**75)
    rates = [float(row["learning_rate"]) for row in rows_of(folder)]
    assert rates == pytest.approx([1e-3, 1e-3 * 0.96**75], rel=1e-5)


def test_epochs_are_passes_and_the_first_ones_are_the_same(trained, plain):
    rows = rows_of(trained(epochs=3).folder)
    assert len(rows) == 3
    assert rows[:2] == rows_of(plain.folder)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [({"batch_size": 20}, 3), ({"train_size": 40}, 4), ({"validation": 10}, 5)],
    ids=["batch_size", "train_size", "validation"],
)
def test_the_steps_follow_from_batch_and_images_and_the_rest_is_dropped(trained, flags, steps):
    assert [row["step"] for row in rows_of(trained(**flags).folder)] == [str(steps), str(2 * steps)]


def test_lr_is_the_first_rate_and_lr_decay_its_factor_an_epoch(trained, plain):
    rates = [float(row["learning_rate"]) for row in rows_of(trained(lr=0.01).folder)]
    assert rates == pytest.approx([0.01, 0.009])
    rows = rows_of(trained(lr_decay=0.5).folder)
    assert float(rows[1]["learning_rate"]) == pytest.approx(0.0005)
    assert rows[0] == rows_of(plain.folder)[0]


@pytest.mark.parametrize("preset", ["seed", "paper"])
def test_a_rate_that_does_not_decay_stays_as_it_is(base, capsys, preset):
    schedule = plan_of(**base, preset=preset, lr_decay=1.0).schedule
    assert [float(schedule(step)) for step in (0, 7, 100)] == pytest.approx([0.001] * 3)


def test_lam_recon_weighs_the_reconstruction(trained):
    for row in rows_of(trained(lam_recon=10.0).folder):
        loss = float(row["test_margin"]) + 10 * float(row["test_reconstruction"])
        assert float(row["test_loss"]) == pytest.approx(loss, abs=2e-5)


def test_precision_leaves_the_parameters_in_float32(trained):
    params = params_of(trained(precision="bfloat16").folder)
    assert {array.dtype for array in params.values()} == {np.dtype("float32")}


def test_data_dir_and_dataset_choose_the_images_and_name_the_default_folder(
    start, plain, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "mine" / "one.npz")
    write_images(tmp_path / "mine" / "our-two.npz", x_train=255 - images()["x_train"])
    ended = start(data_dir=tmp_path / "mine", dataset="our-two", save_dir=None)
    assert ended.out.startswith(f"data      our-two: the arrays in {tmp_path}/mine/our-two.npz\n")
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"our-two-\d{8}-\d{6}", folder.name)
    assert not same_bits(params_of(folder), params_of(plain.folder))
    same = start("one", data_dir=tmp_path / "mine", dataset="one")
    assert same_bits(params_of(same.folder), params_of(plain.folder))


def test_a_slash_in_the_name_of_a_data_set_makes_no_folder_of_its_own():
    folder = run_folder.named_after("emnist/letters")
    assert re.fullmatch(r"runs/emnist-letters-\d{8}-\d{6}", str(folder))


def test_download_fetches_what_is_not_there(start, tmp_path, monkeypatch):
    flags = {"data_dir": tmp_path / "tfds", "validation": 300}  # refused once the images are there
    assert "--dataset mnist --download" in start(**flags).err
    with serve(write_idx(tmp_path / "served", digits(), gzipped())) as url:
        monkeypatch.setattr(stock.MNIST, "URL", url)
        ended = start(**flags, download=True)
    assert "300 training and 100 test images of 28×28×1" in ended.out
    assert "--validation 300: there are 300 training images" in ended.err
    assert (tmp_path / "tfds" / "mnist" / "3.0.1" / "dataset_info.json").is_file()


def test_checkpoint_steps_makes_checkpoints_within_the_epoch_and_changes_no_bit(start, plain):
    ended = start(checkpoint_steps=4)
    assert steps_in(ended.folder) == [10, 12]
    assert same_bits(arrays_of(ended.folder), arrays_of(plain.folder))


@pytest.mark.parametrize(("devices", "used"), [(2, 2), (None, 5)], ids=["two", "default"])
def test_devices_share_the_batch_and_by_default_as_many_as_divide_it(start, plain, devices, used):
    meshes = []

    def jit_steps(recipe, mesh):
        meshes.append(mesh)
        return train.jit_steps(recipe, mesh)

    with mock.patch.object(loop, "jit_steps", jit_steps):
        ended = start(devices=devices)
    assert f"devices   {used} of 8 × cpu" in ended.out
    assert [mesh.size for mesh in meshes] == [used]
    losses = [float(row["train_loss"]) for row in rows_of(ended.folder)]
    assert losses == pytest.approx([float(r["train_loss"]) for r in rows_of(plain.folder)], 1e-4)


def plan_of(**flags):
    args = command_line(**flags)
    settings = parse(args, PRESETS)
    return make_plan(settings, PRESETS[settings.recipe.preset])[0]


def test_the_order_follows_from_seed_and_epoch_and_takes_each_image_at_most_once(base, capsys):
    plan = plan_of(**base, batch_size=8)
    order = plan.epoch_order(0)
    assert order.shape == (7, 8)
    assert len(np.unique(order)) == order.size
    np.testing.assert_array_equal(order, plan_of(**base, batch_size=8).epoch_order(0))
    assert not np.array_equal(order, plan.epoch_order(1))
    assert not np.array_equal(order, plan_of(**base, batch_size=8, seed=1).epoch_order(0))


def test_validation_images_are_never_trained_on(base, capsys):
    plan = plan_of(**base, validation=15, train_size=30)
    taken = np.concatenate([plan.epoch_order(epoch).ravel() for epoch in range(3)])
    assert len(np.unique(taken)) == 30
    assert len(np.unique(plan.validation_indices)) == 15
    assert not np.intersect1d(taken, plan.validation_indices).size


# Testing, and starting from weights.


def test_testing_prints_loss_and_error_and_draws_again_with_no_training(copied, plain):
    for name in PICTURES:
        (copied / name).unlink()
    before = tree(copied)
    ended = experiment(testing=True, weights=copied, pictures=True)
    assert ended.status == 0
    lines = ended.out.splitlines()
    row = rows_of(plain.folder)[-1]
    assert f"test loss: {row['test_loss']}" in lines
    assert lines[-1] == plain.out.splitlines()[-1]
    assert not [line for line in lines if line.startswith("epoch")]
    after = tree(copied)
    assert after.keys() - before.keys() == set(PICTURES)
    assert {name: after[name] for name in before} == before


def test_testing_into_another_folder_leaves_the_run_alone(plain, tmp_path):
    before = tree(plain.folder)
    ended = experiment(testing=True, weights=plain.folder, save_dir=tmp_path / "new", pictures=True)
    assert ended.status == 0
    assert {*tree(tmp_path / "new")} == {*PICTURES, ".lock"}
    assert tree(plain.folder) == before


def test_testing_takes_the_settings_of_the_run(trained):
    folder = trained(preset="paper").folder
    ended = experiment(testing=True, weights=folder)
    assert ended.out.splitlines()[-1] == trained(preset="paper").out.splitlines()[-1]


def torch_file(folder: Path) -> Path:
    """Weights of a network on the tiny images, as the PyTorch code names them."""
    rng = np.random.default_rng(0)
    sizes = {"channels": 4, "kernel_size": 3, "types": 2, "dim_class": 4, "hidden": (8, 6)}
    net = capsjax.nn.CapsNet((10, 10, 1), 10, grouping="flat", **sizes, rngs=nnx.Rngs(0))
    theirs = {n: rng.normal(0, 0.3, a.shape).astype("f4") for n, a in weights.to_torch(net).items()}
    save_file(theirs, folder / "torch.safetensors")
    return folder / "torch.safetensors"


def test_the_file_that_a_run_leaves_is_tested_as_the_run_is(plain, base, tmp_path):
    file = tmp_path / "net.safetensors"
    shutil.copy(plain.folder / "weights.safetensors", file)
    flags = {"data_dir": base["data_dir"], "save_dir": tmp_path / "tested"}
    ended = experiment(testing=True, weights=file, pictures=True, **flags)
    assert ended.status == 0, ended.err
    assert f"of {file}\n" in ended.out
    assert ended.out.splitlines()[-1] == plain.out.splitlines()[-1]
    assert {*tree(tmp_path / "tested")} == {*PICTURES[1:], ".lock"}


def test_a_file_brings_its_iterations_of_routing_unless_others_are_asked_for(trained, base):
    file = trained(routings=2).folder / "weights.safetensors"
    expected = trained(routings=2).out.splitlines()[-1]
    for asked, same in ((None, True), (2, True), (1, False)):
        with tempfile.TemporaryDirectory() as folder:
            ended = experiment(
                testing=True,
                weights=file,
                routings=asked,
                data_dir=base["data_dir"],
                save_dir=folder,
            )
        assert ended.drawn[0].classes.routings == (asked or 2)
        assert not same or ended.out.splitlines()[-1] == expected


def test_training_goes_on_from_a_file_of_pytorch_and_keeps_it(start, tmp_path):
    file = torch_file(tmp_path)
    theirs = weights.load(file)
    with after_step(STEPS + 2, killed), pytest.raises(MemoryError):
        start(weights=file, checkpoint_steps=2)
    file.unlink()
    resumed = experiment(resume=tmp_path / "run")
    assert resumed.status == 0, resumed.err
    assert resumed.drawn[0].primary.grouping == "flat"
    kept = weights.load(tmp_path / "run" / "start.safetensors")
    chex.assert_trees_all_equal(nnx.split(kept)[1], nnx.split(theirs)[1])
    tested = experiment(testing=True, weights=tmp_path / "run")
    assert tested.out.splitlines()[-1] == resumed.out.splitlines()[-1]
    # Also the next run knows what network it is.
    again = start("again", weights=tmp_path / "run", epochs=1)
    assert again.drawn[0].primary.grouping == "flat"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_preset_and_routings_are_those_of_the_weights(trained, start, kind):
    # The tiny presets share their architecture with none of the real ones, so a file says none.
    folder = trained(preset="paper", routings=2).folder
    source = folder if kind == "folder" else folder / "weights.safetensors"
    described = mock.patch.object(weights, "describe", return_value=("paper", 2))
    with described if kind == "file" else contextlib.nullcontext():
        ended = start(weights=source, epochs=1)
        settings = json.loads((ended.folder / "config.json").read_text())["settings"]["recipe"]
        assert (settings["preset"], settings["routings"]) == ("paper", 2)
        assert settings["lam_recon"] == pytest.approx(1.0)
        refused = start("other", weights=source, preset="seed")
    assert refused.status == 2
    assert "--preset seed, but" in refused.err


def test_a_folder_that_a_run_left_before_it_began_gets_the_network_that_is_asked_for(
    start, tmp_path
):
    (tmp_path / "run").mkdir()
    shutil.copy(torch_file(tmp_path), tmp_path / "run" / run_folder.START)
    assert start().drawn[0].primary.grouping == "channels"
    assert not (tmp_path / "run" / run_folder.START).exists()


def test_training_starts_where_a_file_of_pytorch_ends(start, tmp_path):
    ended = start(weights=torch_file(tmp_path), epochs=1, lr=1e-12)
    expected = weights.to_torch(weights.load(tmp_path / "torch.safetensors"))
    for name, array in weights.to_torch(ended.drawn[0]).items():
        np.testing.assert_allclose(array, expected[name], atol=1e-9)


@pytest.mark.parametrize(
    ("size", "words"),
    [((8, 8, 1), "takes images [8, 8, 1] in 10 classes"), ((10, 10, 1), "in 3 classes; these are")],
)
def test_a_file_of_a_network_for_other_images_is_refused(start, tmp_path, size, words):
    sizes = {"channels": 4, "kernel_size": 3, "types": 2}
    classes = 10 if size[0] == 8 else 3
    net = capsjax.nn.CapsNet(size, classes, **sizes, rngs=nnx.Rngs(0))
    weights.save(net, tmp_path / "net.safetensors")
    ended = start(weights=tmp_path / "net.safetensors")
    assert ended.status == 2
    assert words in ended.err
    assert not (tmp_path / "run").exists()


def test_weights_are_where_training_starts(start, plain):
    ended = start(weights=plain.folder, lr=1e-12, epochs=1)
    assert [row["step"] for row in rows_of(ended.folder)] == [str(STEPS)]
    params, theirs = params_of(ended.folder), params_of(plain.folder)
    for name in theirs:
        np.testing.assert_allclose(params[name], theirs[name], rtol=0, atol=1e-10)


def test_the_best_epoch_is_chosen_on_the_validation_images_and_never_on_the_test_images(start):
    validation, test = [1, 5, 8, 3], [9, 3, 0, 5]
    evaluate = loop.Runner.evaluate

    def scripted(self, params, train_indices=None):
        wrongs = test if train_indices is None else validation
        figures = evaluate(self, params, train_indices)
        return figures._replace(wrong=wrongs.pop(0)) if wrongs else figures

    with mock.patch.object(loop.Runner, "evaluate", scripted):
        ended = start(validation=10, epochs=4)
    assert "best on the validation images: epoch 1\n" in ended.out
    with Checkpoints(ended.folder / "checkpoints") as checkpoints:
        best = checkpoints.best()
    assert best.step == 5
    assert same_bits(drawn_params(ended), {k: best.arrays[k] for k in drawn_params(ended)})
    assert not same_bits(drawn_params(ended), params_of(ended.folder))
    tested = experiment(testing=True, weights=ended.folder)
    assert tested.out.splitlines()[-1] == ended.out.splitlines()[-1]
    assert same_bits(drawn_params(tested), drawn_params(ended))


# How a run goes on.


@pytest.mark.parametrize(
    ("flags", "stops"),
    [
        ({}, [3]),
        ({}, [STEPS]),
        ({}, [4, STEPS + 3]),
        ({"validation": 10}, [7]),
        ({"devices": 2}, [8]),
    ],
    ids=["first-epoch", "epoch's-end", "twice", "validation", "two-devices"],
)
def test_a_stopped_run_goes_on_to_the_bits_and_rows_of_an_unbroken_one(
    trained, start, flags, stops
):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    resume = None
    for stop, number in zip(stops, (signal.SIGTERM, signal.SIGINT), strict=False):
        with after_step(stop, signalled(number)):
            ended = experiment(resume=resume) if resume else start(**flags)
        assert ended.status == 128 + number
        assert f"{number.name}: ends after this step, with a checkpoint" in ended.out
        assert f"stopped   step {stop}; --resume {ended.folder} goes on\n" in ended.out
        resume = ended.folder
        assert steps_in(resume)[-1] == stop
    assert resume is not None
    config = (resume / "config.json").read_bytes()
    resumed = experiment(resume=resume)
    whole = trained(**flags)
    assert resumed.status == 0
    assert f"resume    step {stops[-1]} of {rows_of(whole.folder)[-1]['step']}\n" in resumed.out
    assert same_bits(arrays_of(resume), arrays_of(whole.folder))
    assert rows_of(resume) == rows_of(whole.folder)
    assert resumed.out.splitlines()[-1] == whole.out.splitlines()[-1]
    assert (resume / "config.json").read_bytes() == config
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("call", [1, 2], ids=["validation", "test"])
def test_a_signal_during_an_evaluation_ends_the_run_and_the_evaluation_is_done_again(
    trained, start, call
):
    evaluate, calls = loop.Runner.evaluate, []

    def interrupted(self, state, train_indices=None):
        calls.append(train_indices)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(self, state, train_indices)

    with mock.patch.object(loop.Runner, "evaluate", interrupted):
        ended = start(validation=10)
    assert ended.status == 143
    assert len(calls) == call
    assert steps_in(ended.folder) == [5]
    assert experiment(resume=ended.folder).status == 0
    assert same_bits(arrays_of(ended.folder), arrays_of(trained(validation=10).folder))
    assert rows_of(ended.folder) == rows_of(trained(validation=10).folder)


def test_a_signal_after_the_last_epoch_loses_no_result(trained, start):
    save = Checkpoints.save

    def interrupted(self, state, *rest):
        save(self, state, *rest)
        if int(state.step) == 10:
            signal.raise_signal(signal.SIGTERM)

    with mock.patch.object(Checkpoints, "save", interrupted):
        ended = start(validation=10)
    assert ended.status == 143
    resumed = experiment(resume=ended.folder)
    assert resumed.out.splitlines()[-1] == trained(validation=10).out.splitlines()[-1]


def test_a_run_with_relative_paths_is_resumed_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "tiny.npz")
    experiment(data_dir="tiny.npz", save_dir="run", devices=1, epochs=1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert experiment(resume="../run").status == 0


@pytest.mark.parametrize("from_weights", [False, True], ids=["new", "from-weights"])
def test_a_run_without_a_checkpoint_yet_starts_at_step_0(start, trained, tmp_path, from_weights):
    flags = {"weights": trained(seed=1).folder} if from_weights else {}
    with after_step(2, killed), pytest.raises(MemoryError):
        start(**flags)
    assert not steps_in(tmp_path / "run")
    resumed = experiment(resume=tmp_path / "run")
    assert "resume    no checkpoint yet: from the start\n" in resumed.out
    assert same_bits(arrays_of(tmp_path / "run"), arrays_of(trained(**flags).folder))
    assert rows_of(tmp_path / "run") == rows_of(trained(**flags).folder)


def test_a_run_killed_between_row_and_checkpoint_has_each_epoch_once(start, tmp_path, plain):
    save = Checkpoints.save

    def killed_at_the_end(self, state, *rest):
        if int(state.step) == 2 * STEPS:
            raise MemoryError
        save(self, state, *rest)

    with mock.patch.object(Checkpoints, "save", killed_at_the_end), pytest.raises(MemoryError):
        start()
    assert len(rows_of(tmp_path / "run")) == 2
    experiment(resume=tmp_path / "run")
    assert rows_of(tmp_path / "run") == rows_of(plain.folder)
    assert same_bits(arrays_of(tmp_path / "run"), arrays_of(plain.folder))


def test_a_damaged_newest_checkpoint_is_passed_over_in_words(start, plain):
    with after_step(9, signalled()):
        folder = start().folder
    path = max((folder / "checkpoints/9/state").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    resumed = experiment(resume=folder)
    assert "the checkpoint of step 9 is damaged and was passed over" in resumed.out
    assert f"resume    step {STEPS} of" in resumed.out
    assert same_bits(arrays_of(folder), arrays_of(plain.folder))
    assert rows_of(folder) == rows_of(plain.folder)


def test_a_run_that_ended_is_not_trained_on_and_prints_its_result_again(copied, plain):
    before = tree(copied)
    resumed = experiment(resume=copied)
    assert resumed.status == 0
    assert resumed.out.splitlines()[-1] == plain.out.splitlines()[-1]
    assert same_bits(drawn_params(resumed), params_of(plain.folder))
    assert tree(copied) == before


def test_more_epochs_go_on(copied, trained):
    resumed = experiment(resume=copied, epochs=3)
    whole = trained(epochs=3)
    assert resumed.status == 0
    assert same_bits(arrays_of(copied), arrays_of(whole.folder))
    assert rows_of(copied) == rows_of(whole.folder)
    assert json_of(copied)["settings"]["recipe"]["epochs"] == 3


# What is refused beside a run that is there already.


@pytest.mark.parametrize(
    ("flag", "value", "saved"),
    [
        ("preset", "paper", "seed"),
        ("routings", 1, 3),
        ("epochs", 1, 2),
        ("batch_size", 20, 10),
        ("lr", 0.01, 0.001),
        ("lr_decay", 0.5, 0.9),
        ("lam_recon", 10.0, 0.05),
        ("shift_pixels", 0, 2),
        ("seed", 1, 0),
        ("precision", "bfloat16", "float32"),
        ("dataset", "kmnist", "mnist"),
        ("data_dir", "elsewhere", "tiny.npz"),
        ("download", True, False),
        ("train_size", 40, None),
        ("validation", 10, 0),
        ("save_dir", "elsewhere", "trained"),
        ("checkpoint_steps", 4, 200),
    ],
)
def test_another_setting_beside_resume_is_refused_with_both_values(plain, flag, value, saved):
    before = tree(plain.folder)
    ended = experiment(resume=plain.folder, **{flag: value})
    assert ended.status == 2
    assert f"--{flag.replace('_', '-')} {value} beside --resume, but this run has" in ended.err
    assert str(saved) in ended.err
    assert ended.err.count("\n") == 1
    assert tree(plain.folder) == before


def test_a_run_goes_on_with_another_number_of_devices(start):
    with after_step(STEPS, signalled(signal.SIGTERM)):
        stopped = start()
    resumed = experiment(resume=stopped.folder, devices=2)
    assert resumed.status == 0
    assert "devices   2 of 8" in resumed.out


def damaged_config(text):
    def damage(folder):
        (folder / "config.json").write_text(text)
        return {"resume": folder}

    return damage


def changed_config(change):
    def damage(folder):
        config = json_of(folder)
        change(config)
        return damaged_config(json.dumps(config))(folder)

    return damage


def damaged_rows(content):
    def damage(folder):
        (folder / "metrics.csv").write_bytes(content)
        return {"resume": folder}

    return damage


def other_images(**changed):
    def flags(folder):
        path = write_images(folder.parent / "other.npz", **changed)
        return {"weights": folder, "testing": True, "data_dir": path}

    return flags


def without(name):
    def flags(folder):
        shutil.rmtree(folder / name)
        return {"weights": folder, "testing": True}

    return flags


def retrained_on_other_images(folder):
    path = write_images(Path(json_of(folder)["settings"]["images"]["data_dir"]))
    changed = write_images(folder.parent / "changed.npz", y_train=images()["y_train"][::-1])
    return changed_config(
        lambda config: config["settings"]["images"].update(data_dir=str(changed) if path else None)
    )(folder)


FIVE = {"y_train": images()["y_train"] % 5, "y_test": images()["y_test"] % 5}
TALL = {
    f"x_{split}": np.pad(images()[f"x_{split}"], ((0, 0), (1, 1), (0, 0)))
    for split in ("train", "test")
}


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (damaged_config("{"), ["config.json is damaged"]),
        (damaged_config(""), ["config.json is damaged"]),
        (damaged_config("[]"), ["config.json is damaged"]),
        (damaged_config('{"settings": {}}'), ["config.json is damaged"]),
        (changed_config(lambda c: c["settings"].pop("run")), ["config.json is damaged", "'run'"]),
        (changed_config(lambda c: c["data"].pop("crc32")), ["config.json is damaged"]),
        (
            damaged_rows(b"epoch;step\r\n1;6\r\n"),
            ["metrics.csv is damaged", "epoch, step,"],
        ),
        (damaged_rows(b""), ["metrics.csv is damaged"]),
        (damaged_rows(b"\xff\xfe"), ["metrics.csv is damaged"]),
        (
            changed_config(lambda c: c["settings"]["recipe"].update(depth=3)),
            ["config.json is damaged", "'depth'"],
        ),
        (
            changed_config(lambda c: c["settings"]["recipe"].update(epochs="two")),
            ["config.json is damaged"],
        ),
        (retrained_on_other_images, ["was trained on other images than"]),
        (lambda folder: {"resume": folder, "weights": folder}, ["--resume", "no --weights"]),
        (lambda folder: {"resume": folder, "testing": True}, ["--testing needs --weights"]),
        (lambda folder: {"resume": folder / "checkpoints"}, ["holds no run", "config.json"]),
        (lambda folder: {"resume": folder / "none"}, ["holds no run", "config.json"]),
        (lambda folder: {"resume": folder / "config.json"}, ["holds no run"]),
        (lambda folder: {"weights": folder / "none", "testing": True}, ["there is no such"]),
        (lambda folder: {"weights": folder / "none"}, ["there is no such"]),
        (
            lambda folder: {"weights": folder, "preset": "paper"},
            ["--preset paper, but", "is of --preset seed"],
        ),
        (other_images(**FIVE), ["params.classes.weight", "[5, 18, 4, 8]", "[10, 18, 4, 8]"]),
        (other_images(**TALL), ["[10, 24, 4, 8]", "[10, 18, 4, 8]"]),
        (without("checkpoints"), ["holds no weights", "before its first checkpoint"]),
    ],
)
def test_a_run_that_cannot_be_used_is_refused_in_words_and_left_as_it_is(
    copied, base, prepare, words, monkeypatch
):
    monkeypatch.chdir(copied.parent)
    flags = prepare(copied)
    if "resume" not in flags and "testing" not in flags:
        flags = base | flags
    before = tree(copied.parent)
    ended = experiment(**flags)
    assert ended.status == 2
    assert ended.err.startswith("error: ") or "Value error" in ended.err
    message = " ".join(ended.err.split())
    for word in words:
        assert word in message
    assert "Traceback" not in message
    assert tree(copied.parent) == before


@pytest.mark.parametrize(
    ("save_dir", "words"),
    [
        ("file", "--save-dir file is a file"),
        ("file/run", "--save-dir file/run cannot be made: Not a directory"),
        ("/proc/no/run", "--save-dir /proc/no/run cannot be made"),
        ("x" * 300, "cannot be made: File name too long"),
    ],
)
def test_a_folder_that_cannot_be_made_is_refused_in_words(
    start, tmp_path, monkeypatch, save_dir, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    ended = start(save_dir=save_dir)
    assert ended.status == 2
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert words in ended.err
    assert tree(tmp_path) == {"file": b"mine"}


def test_images_too_large_for_the_devices_are_refused_before_anything_is_written(start, tmp_path):
    before = tree(tmp_path)
    with mock.patch("capsjax.sharding._memory", return_value=1000):
        ended = start()
    assert ended.status == 2
    assert "GiB" in ended.err
    assert tree(tmp_path) == before


def test_a_folder_in_use_by_a_living_process_is_refused_until_it_dies(start, plain, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(plain.folder, copied)
    hold = "import run_folder, sys\nfrom pathlib import Path\n"
    hold += "with run_folder.held(Path(sys.argv[1])):\n print('held', flush=True)\n input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, copied],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"held\n"
        before = tree(copied)
        for flags in (
            {"resume": copied, "epochs": 3},
            {"weights": copied, "testing": True},
            {"save_dir": copied, "data_dir": tmp_path / "tiny.npz"},
        ):
            write_images(tmp_path / "tiny.npz")
            ended = experiment(**flags)
            assert ended.status == 2
            assert f"{copied} is in use by another process" in ended.err
        assert tree(copied) == before
        process.kill()
        process.wait()
    assert experiment(resume=copied, epochs=3).status == 0
    assert experiment(resume=copied, epochs=4).status == 0  # and it lets go when it ends


def test_a_file_system_without_locks_is_no_reason_to_stop(start, monkeypatch):
    def no_lock(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_lock)
    ended = start(epochs=1)
    assert ended.status == 0
    assert "on a file system without locks" in ended.out


def test_rows_that_a_spreadsheet_wrote_are_read(copied):
    path = copied / "metrics.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert experiment(resume=copied, epochs=3).status == 0
    assert [row["epoch"] for row in rows_of(copied)] == ["1", "2", "3"]


# How it stops.


def spoiled_step(number, spoil):
    """Steps whose `number`-th, and only that, gets its state and images from `spoil`."""
    jit_steps = loop.jit_steps

    def spoiled(recipe, mesh):
        train, evaluate = jit_steps(recipe, mesh)

        def step(state, key, images, labels, batch):
            if state.step + 1 == number:
                state, images = spoil(state, images, batch)
            return train(state, key, images, labels, batch)

        return step, evaluate

    return mock.patch.object(loop, "jit_steps", spoiled)


def nan_in_a_parameter(state, images, batch):
    bias = state.params["primary"]["conv"]["bias"].at[3].set(jnp.nan)
    conv = state.params["primary"]["conv"] | {"bias": bias}
    return state._replace(params=state.params | {"primary": {"conv": conv}}), images


def nan_in_an_image(state, images, batch):
    return state, images.astype(jnp.float32).at[batch[0], 5, 5].set(jnp.nan)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (nan_in_a_parameter, "not finite: parameters primary.conv.bias;"),
        (nan_in_an_image, "the mean of its pixels is nan;"),
    ],
    ids=["parameter", "image"],
)
def test_a_nan_stops_the_run_where_it_came_in_and_keeps_the_checkpoint_before(start, spoil, words):
    with spoiled_step(STEPS + 2, spoil):
        ended = start(checkpoint_steps=2, shift_pixels=0)
    assert ended.status == 1
    assert ended.err.startswith(f"error: step {STEPS + 2}: {words}")
    assert str(ended.folder) in ended.err
    assert ended.err.count("\n") == 1
    assert steps_in(ended.folder) == [4, STEPS]
    assert all(np.isfinite(array).all() for array in arrays_of(ended.folder).values())


@pytest.mark.parametrize(
    ("quantity", "value", "words"),
    [
        ("margin", np.nan, "the margin loss is nan"),
        ("reconstruction", np.inf, "the reconstruction loss is inf"),
        ("gradient", np.nan, "not finite: gradient of classes.weight, conv1.bias, conv1.kernel"),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(start, quantity, value, words):
    def spoil(state, report):
        if quantity == "gradient":
            return state, report._replace(gradient=np.full(report.gradient.shape, value))
        return state, report._replace(metrics=report.metrics._replace(**{quantity: value}))

    with after_step(STEPS + 2, spoil):
        ended = start(checkpoint_steps=2)
    assert ended.status == 1
    assert ended.err.startswith(f"error: step {STEPS + 2}: {words}")
    assert steps_in(ended.folder) == [4, STEPS]


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("lr", [1e30, 1e39])
def test_a_learning_rate_far_too_large_stops_the_run_for_real(start, lr):
    ended = start(lr=lr, checkpoint_steps=1)
    assert ended.status == 1
    match = re.match(r"error: step (\d+): (the (margin|reconst)|not finite)", ended.err)
    assert match
    assert steps_in(ended.folder) == list(range(1, int(match[1])))[-2:]
    if int(match[1]) > 1:
        assert all(np.isfinite(array).all() for array in arrays_of(ended.folder).values())


@pytest.mark.filterwarnings("ignore:overflow")
def test_weights_that_overflow_are_no_result(trained, tmp_path):
    net = weights.load(trained().folder / "weights.safetensors")
    net.conv1.kernel[...] = net.conv1.kernel[...] + 3e38
    weights.save(net, tmp_path / "huge.safetensors")
    data_dir = write_images(tmp_path / "tiny.npz")
    ended = experiment(
        weights=tmp_path / "huge.safetensors", testing=True, data_dir=data_dir, save_dir=tmp_path
    )
    assert ended.status == 1
    assert re.match(r"error: step 0: the test \w+ loss is (nan|inf)", ended.err)
    assert "test error" not in ended.out


@pytest.mark.parametrize("split", ["validation", "test"])
def test_an_evaluation_that_is_not_finite_stops_the_run_before_its_checkpoint(start, split):
    evaluate = loop.Runner.evaluate
    calls = []

    def spoiled(self, state, train_indices=None):
        calls.append("test" if train_indices is None else "validation")
        if calls[-1] == split and calls.count(split) == 2:
            run = self._evaluate
            spoil = lambda metrics, classes: (metrics._replace(margin=np.nan), classes)  # noqa: E731
            self._evaluate = lambda *args: spoil(*run(*args))
        return evaluate(self, state, train_indices)

    with mock.patch.object(loop.Runner, "evaluate", spoiled):
        ended = start(validation=10)
    assert ended.status == 1
    assert ended.err.startswith(f"error: step 10: the {split} margin loss is nan")
    assert steps_in(ended.folder) == [5]
    assert len(rows_of(ended.folder)) == 1


# What it asks of the machine.


@pytest.fixture
def cache_folder():
    """JAX's setting, which `machine.prepare` may change."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    yield lambda: jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def c_library(monkeypatch):
    """Stands in for the C library, so that this process keeps its allocator's settings."""
    library = mock.Mock()
    monkeypatch.setattr(allocator.ctypes, "CDLL", library)
    return library


def test_main_prepares_the_machine_first():
    with mock.patch.object(machine, "prepare", side_effect=MemoryError), pytest.raises(MemoryError):
        mnist.main(["--no-such-flag"])


def test_compiled_code_is_kept_below_xdg_cache_home(cache_folder, c_library, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine.prepare()
    assert Path(cache_folder()).parent == tmp_path / "capsjax"
    assert jax.__version__ in cache_folder()


@pytest.mark.parametrize("value", [None, ""], ids=["unset", "empty"])
def test_without_xdg_cache_home_compiled_code_is_kept_in_the_home_folder(
    cache_folder, c_library, tmp_path, monkeypatch, value
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME")
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    machine.prepare()
    assert Path(cache_folder()).parent == tmp_path / ".cache" / "capsjax"


def test_a_compile_cache_that_the_user_set_stays(cache_folder, c_library, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    machine.prepare()
    assert cache_folder() == str(tmp_path)


def test_the_allocator_is_set_on_linux_only(cache_folder, c_library, monkeypatch):
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    machine.prepare()
    assert c_library.return_value.mallopt.call_count == 4
    allocator.give_back_freed_memory()
    c_library.return_value.malloc_trim.assert_called_once_with(0)
    c_library.reset_mock()
    for platform in ("darwin", "win32"):
        monkeypatch.setattr(allocator.sys, "platform", platform)
        machine.prepare()
        allocator.give_back_freed_memory()
    c_library.assert_not_called()


def test_another_c_library_is_left_alone(cache_folder, monkeypatch):
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    machine.prepare()
    allocator.give_back_freed_memory()
