"""What is refused beside a run that exists: in words, and the run stays as it is."""

import json
import shutil
from unittest import mock

import numpy as np
import pytest

from capsjax.run import Experiment, processes
from hooks import after_step, raise_signal
from tiny_run import (
    EXPERIMENT,
    STEPS,
    make_images,
    read_json,
    read_tree,
    run_command,
    write_images,
)


@pytest.mark.parametrize(
    ("flag", "value", "saved"),
    [
        ("preset", "paper", "seed"),
        ("routings", 1, 3),
        ("epochs", 1, 2),
        ("batch_size", 20, 10),
        ("lr", 0.01, 0.001),
        ("lr_decay", 0.5, 0.9),
        ("loss", "spread", "margin"),
        ("margin_steps", 5, 10_000),
        ("lam_recon", 10.0, 0.05),
        ("shift_pixels", 0.5, 2),
        ("average", 0.9, None),
        ("seed", 1, 0),
        ("precision", "bfloat16", "float32"),
        ("dataset", "kmnist", "mnist"),
        ("download", True, False),
        ("train_size", 40, None),
        ("validation", 10, 0),
        ("checkpoint_steps", 4, 200),
    ],
)
def test_another_setting_beside_resume_is_refused_with_both_values(plain, flag, value, saved):
    before = read_tree(plain.folder)
    outcome = run_command(resume=plain.folder, **{flag: value})
    assert outcome.status == 2
    words = f"--{flag.replace('_', '-')} {value} beside --resume, but this run has {saved}"
    assert words in outcome.err
    assert outcome.err.count("\n") == 1
    assert read_tree(plain.folder) == before


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(start):
    with after_step(STEPS, raise_signal()):
        stopped = start()
    resumed = run_command(resume=stopped.folder, devices=2)
    assert resumed.status == 0
    assert "devices   2 of 8" in resumed.out


def test_a_run_whose_images_were_moved_goes_on(trained, tmp_path):
    run = shutil.copytree(trained(epochs=1).folder, tmp_path / "run")
    moved = write_images(tmp_path / "moved.npz")
    change_config(lambda c: c["settings"]["images"].update(data_dir="/gone/tiny.npz"))(run)
    assert run_command(resume=run, data_dir=moved, epochs=2).status == 0


def test_images_of_a_single_class_are_refused(start, tmp_path):
    zeros = {name: np.zeros_like(make_images()[name]) for name in ("y_train", "y_test")}
    outcome = start(dataset="mine", data_dir=write_images(tmp_path / "one.npz", **zeros))
    assert outcome.status == 2
    assert "expected two classes or more, got only '0'" in outcome.err


def test_a_run_is_not_continued_in_another_folder(plain, tmp_path):
    outcome = run_command(resume=plain.folder, save_dir=tmp_path / "elsewhere")
    assert outcome.status == 2
    assert "--resume continues" in outcome.err
    assert not (tmp_path / "elsewhere").exists()


def write_config(text):
    """Damages a run: config.json holds something else."""

    def damage(folder):
        (folder / "config.json").write_text(text)
        return {"resume": folder}

    return damage


def change_config(change):
    """Damages a run: `change` is called with what config.json holds."""

    def damage(folder):
        config = read_json(folder)
        change(config)
        return write_config(json.dumps(config))(folder)

    return damage


def write_rows(content):
    """Damages a run: metrics.csv holds something else."""

    def damage(folder):
        (folder / "metrics.csv").write_bytes(content)
        return {"resume": folder}

    return damage


def use_images(**changed):
    """Leaves a run as it is and tests it on images of another kind."""

    def flags(folder):
        path = write_images(folder.parent / "other.npz", **changed)
        return {"weights": folder, "testing": True, "data_dir": path}

    return flags


def remove(name):
    """Damages a run: a folder in it is gone."""

    def flags(folder):
        shutil.rmtree(folder / name)
        return {"weights": folder, "testing": True}

    return flags


def change_labels(folder):
    """Damages a run: its images lie where others lay before."""
    path = write_images(folder.parent / "changed.npz", y_train=make_images()["y_train"][::-1])
    return change_config(lambda c: c["settings"]["images"].update(data_dir=str(path)))(folder)


FIVE = {"y_train": make_images()["y_train"] % 5, "y_test": make_images()["y_test"] % 5}
TALL = {
    f"x_{split}": np.pad(make_images()[f"x_{split}"], ((0, 0), (1, 1), (0, 0)))
    for split in ("train", "test")
}


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (write_config("{"), ["config.json is damaged"]),
        (write_config(""), ["config.json is damaged"]),
        (write_config("[]"), ["config.json is damaged"]),
        (write_config('{"settings": {}}'), ["config.json is damaged"]),
        (change_config(lambda c: c["settings"].pop("run")), ["config.json is damaged", "'run'"]),
        (change_config(lambda c: c["settings"].pop("training")), ["config.json is damaged"]),
        (change_config(lambda c: c["data"].pop("crc32")), ["config.json is damaged"]),
        (change_config(lambda c: c.update(network="capsnet")), ["config.json is damaged"]),
        (write_rows(b"epoch;step\r\n1;6\r\n"), ["metrics.csv is damaged", "epoch, step,"]),
        (write_rows(b""), ["metrics.csv is damaged"]),
        (write_rows(b"\xff\xfe"), ["metrics.csv is damaged"]),
        (
            change_config(lambda c: c["settings"]["recipe"].update(depth=3)),
            ["config.json is damaged", "'depth'"],
        ),
        (
            change_config(lambda c: c["settings"]["training"].update(epochs="two")),
            ["config.json is damaged"],
        ),
        (change_labels, ["was trained on other images than"]),
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
        (use_images(**FIVE), ["params.class_caps.weight", "[5, 18, 4, 8]", "[10, 18, 4, 8]"]),
        (use_images(**TALL), ["[10, 24, 4, 8]", "[10, 18, 4, 8]"]),
        (remove("checkpoints"), ["holds no weights", "before its first checkpoint"]),
    ],
)
def test_a_run_that_cannot_be_used_is_refused_in_words_and_left_as_it_is(
    copied, base, prepare, words, monkeypatch
):
    monkeypatch.chdir(copied.parent)
    flags = prepare(copied)
    if "resume" not in flags and "testing" not in flags:
        flags = base | flags
    before = read_tree(copied.parent)
    outcome = run_command(**flags)
    assert outcome.status == 2
    assert outcome.err.startswith("error: ") or "Value error" in outcome.err
    message = " ".join(outcome.err.split())
    for word in words:
        assert word in message
    assert "Traceback" not in message
    assert read_tree(copied.parent) == before


def test_images_too_large_for_the_devices_are_refused_before_anything_is_written(start, tmp_path):
    before = read_tree(tmp_path)
    with mock.patch("capsjax.sharding._find_memory", return_value=1000):
        outcome = start()
    assert outcome.status == 2
    assert "GiB" in outcome.err
    assert read_tree(tmp_path) == before


@pytest.mark.parametrize("flag", ["resume", "weights"])
def test_the_run_of_another_experiments_preset_is_refused_in_words(plain, flag):
    other = Experiment(presets={"mine": EXPERIMENT.presets["paper"]})
    testing = {"testing": True} if flag == "weights" else {}
    outcome = run_command(other, **{flag: plain.folder}, **testing)
    assert outcome.status == 2
    assert "error: there is no preset 'seed' here, only mine" in outcome.err


def test_processes_that_see_different_folders_are_refused_before_one_of_them_goes_on(start):
    seen = mock.patch.object(processes, "agree", side_effect=ValueError("different folders"))
    with seen as agree:
        outcome = start()
    assert (outcome.status, outcome.err) == (2, "error: different folders\n")
    agree.assert_called_once_with("folders", 0)
