"""The command line and config.json: what each flag sets, and what is refused in words."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from capsjax.presets import Training
from capsjax.run import Experiment, Images, Recipe, Run, Settings
from capsjax.run.command_line import parse
from capsjax.run.settings import from_json, to_json
from tiny_run import make_arguments, read_tree, run_command, write_images

NUMBERS = {
    "routings": int,
    "epochs": int,
    "batch_size": int,
    "lr": float,
    "lr_decay": float,
    "margin_steps": int,
    "lam_recon": float,
    "shift_pixels": float,
    "rotation": float,
    "shear": float,
    "zoom": float,
    "elastic": float,
    "average": float,
    "seed": int,
    "train_size": int,
    "validation": int,
    "checkpoint_steps": int,
    "devices": int,
}
MAY_BE_ZERO = (
    "lam_recon",
    "shift_pixels",
    "rotation",
    "shear",
    "zoom",
    "elastic",
    "seed",
    "validation",
)
MAY_BE_NONE = ("routings", "lr_decay", "lam_recon", "average", "train_size", "devices")


def parse_flags(**flags) -> Settings:
    return parse(make_arguments(**flags), Experiment())


def flatten(settings: Settings) -> dict:
    groups = (settings.recipe, settings.training, settings.images, settings.run)
    return {name: v for group in groups for name, v in dataclasses.asdict(group).items()}


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Runs a command that must be refused, and returns its message as one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    path = write_images(tmp_path / "tiny.npz")

    def call(**flags) -> str:
        before = read_tree(tmp_path)
        given: dict[str, Any] = {"data_dir": path, **flags}
        outcome = run_command(**given)
        assert outcome.status == 2
        assert "Traceback" not in outcome.out + outcome.err
        assert outcome.err.count("\n") <= 20
        assert read_tree(tmp_path) == before
        return " ".join(re.sub("[│╭╮╰╯─]", " ", outcome.err).split())

    return call


# What may be said.


def test_without_flags_the_settings_are_the_seed_presets():
    recipe = Recipe(preset="seed", routings=3, precision="float32", seed=0)
    training = Training(
        epochs=50,
        batch_size=100,
        lr=1e-3,
        lr_decay=0.9,
        lam_recon=None,
        shift_pixels=2,
        average=None,
    )
    assert parse_flags() == Settings(recipe, training, Images(), Run())


def test_preset_paper_brings_its_own_defaults_and_flags_go_before_them():
    training = parse_flags(preset="paper").training
    assert (training.epochs, training.batch_size, training.lr_decay) == (640, 128, None)
    changed = parse_flags(preset="paper", epochs=3)
    assert changed.training == dataclasses.replace(training, epochs=3)
    assert changed.recipe == Recipe(preset="paper", routings=3)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("weights", (Path(__file__), Path("/"))),  # any that exist
        ("preset", "paper"),
        ("routing", "uniform"),
        ("routings", 1),
        ("epochs", 7),
        ("batch_size", 25),
        ("lr", 0.5),
        ("lr_decay", 1.0),
        ("loss", "cross_entropy"),
        ("margin_steps", 5),
        ("lam_recon", 0.0),
        ("shift_pixels", 0),
        ("average", 0.999),
        ("precision", "bfloat16"),
        ("seed", 2**32 - 1),
        ("dataset", "emnist/letters"),
        ("data_dir", Path("images")),
        ("download", True),
        ("train_size", 5),
        ("validation", 5),
        ("save_dir", Path("out")),
        ("checkpoint_steps", 5),
        ("devices", 3),
    ],
)
def test_every_flag_sets_what_it_names(flag, value):
    testing = True if flag == "weights" else None
    assert flatten(parse_flags(**{flag: value}, testing=testing))[flag] == value


@pytest.mark.parametrize("flag", MAY_BE_NONE)
def test_none_asks_for_what_follows_from_the_rest(flag):
    assert flatten(parse([f"--{flag.replace('_', '-')}", "None"], Experiment()))[flag] is None


def test_json_keeps_the_settings():
    flags = {"preset": "paper", "average": 0.9, "data_dir": "/a/b.npz", "weights": __file__}
    settings = parse_flags(validation=5, devices=2, **flags)
    assert from_json(json.loads(json.dumps(to_json(settings)))) == settings


def test_config_json_holds_whole_paths_but_not_where_the_run_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w").touch()
    groups = to_json(parse_flags(data_dir="a/b.npz", weights="w", save_dir="r"))
    assert groups["images"]["data_dir"] == str(tmp_path / "a" / "b.npz")
    assert groups["run"] == {
        "checkpoint_steps": 200,
        "devices": None,
        "weights": [str(tmp_path / "w")],
    }


@pytest.mark.parametrize("columns", [60, 80])
def test_help_names_every_flag_its_default_and_unit_and_fits_the_terminal(
    capsys, monkeypatch, columns
):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as end:
        parse_flags(help=True)
    assert end.value.code == 0
    page = capsys.readouterr().out
    lines = page.splitlines()[1:]  # the first is the usage, with the path of the script
    assert max(map(len, lines)) <= columns
    words = " ".join(re.sub("[│|]", " ", page).split())
    names = [f.name for g in vars(Settings()).values() if g for f in dataclasses.fields(g)]
    for name in names:
        assert f"--{name.replace('_', '-')} " in words
    for unit in ("pixels", "per epoch", "Passes", "Images per step", "Steps between"):
        assert unit in words
    assert words.count("(default:") == len(names)


def test_help_of_a_preset_shows_its_defaults(capsys):
    with pytest.raises(SystemExit):
        parse_flags(preset="paper", help=True)
    assert "(default: 640)" in " ".join(capsys.readouterr().out.split())


# What is refused: one short message, status 2, and nothing is written.


@pytest.mark.parametrize("flag", NUMBERS)
@pytest.mark.parametrize("value", ["-1", "nan", "inf", "-inf", "many", ""])
def test_a_value_that_cannot_be_meant_is_refused(refused, flag, value):
    message = refused(**{flag: value})
    assert f"--{flag.replace('_', '-')}" in message
    assert value in message


@pytest.mark.parametrize("flag", [flag for flag in NUMBERS if flag not in MAY_BE_ZERO])
def test_zero_is_refused_where_it_means_nothing(refused, flag):
    message = refused(**{flag: 0})
    assert re.search(rf"--{flag.replace('_', '-')} must be .* got 0", message)


@pytest.mark.parametrize("flag", [flag for flag in NUMBERS if NUMBERS[flag] is int])
def test_a_fraction_is_refused_where_a_count_is_asked_for(refused, flag):
    assert "1.5" in refused(**{flag: 1.5})


@pytest.mark.parametrize("flag", [flag for flag in NUMBERS if flag not in MAY_BE_NONE])
def test_none_is_refused_where_it_means_nothing(refused, flag):
    assert "None" in refused(**{flag: "None"})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"lr_decay": 1.5}, ["--lr-decay must be above 0 and at most 1", "1.5"]),
        ({"average": 1.0}, ["--average must be between 0 and 1, got 1.0"]),
        ({"seed": 2**32}, ["--seed must be from 0", str(2**32)]),
        ({"preset": "worst"}, ["'worst'", "--preset", "'seed'", "'paper'"]),
        ({"precision": "float16"}, ["'float16'", "--precision", "'float32'", "'bfloat16'"]),
        ({"loss": "hinge"}, ["'hinge'", "--loss", "'spread'", "'cross_entropy'"]),
        ({"testing": True}, ["--testing needs --weights"]),
        ({"no_such_flag": True}, ["--no-such-flag"]),
        ({"process_id": 0}, ["--coordinator, --num-processes and --process-id go together"]),
        (
            {"coordinator": "host", "num_processes": 2, "process_id": 0},
            ["--coordinator must be HOST:PORT, got host"],
        ),
        (
            {"coordinator": ":5000", "num_processes": 2, "process_id": 0},
            ["--coordinator must be HOST:PORT, got :5000"],
        ),
        (
            {"coordinator": "host:65536", "num_processes": 2, "process_id": 0},
            ["--coordinator must be HOST:PORT, got host:65536"],
        ),
        (
            {"coordinator": "host:1", "num_processes": 2, "process_id": 2},
            ["--process-id must be from 0 to 1, got 2"],
        ),
        (
            {"coordinator": "h:1", "num_processes": 1, "process_id": 0, "distributed": True},
            ["--distributed finds --coordinator"],
        ),
        ({"devices": 3, "batch_size": 10}, ["3 devices do not divide a batch of 10"]),
        ({"devices": 9, "batch_size": 9}, ["9 devices asked for, 8 found"]),
        ({"shift_pixels": 10}, ["--shift-pixels 10", "10×10 pixels"]),
        ({"elastic": 10}, ["--elastic 10", "10×10 pixels"]),
        ({"shift_pixels": 2**70}, ["--shift-pixels"]),
        ({"batch_size": 61}, ["--batch-size 61", "60 images"]),
        ({"batch_size": 10**30}, ["--batch-size", "60 images"]),
        ({"validation": 60}, ["--validation 60", "60 training images"]),
        ({"validation": 55, "batch_size": 6}, ["--batch-size 6", "5 images"]),
        ({"train_size": 61}, ["--train-size 61", "60 training images"]),
        ({"train_size": 51, "validation": 10}, ["--train-size 51", "50 training images"]),
        ({"dataset": "no_such_set", "data_dir": None}, ["no_such_set", "TFDS", "--data-dir"]),
        ({"dataset": "kmnist", "data_dir": None}, ["--dataset kmnist --download"]),
        ({"dataset": "cifar10", "data_dir": None}, ["tfds build cifar10"]),
        ({"dataset": "../mnist", "data_dir": None}, ["'../mnist'"]),
        ({"dataset": "mnst", "data_dir": None}, ["mnst", "did you mean mnist"]),
        ({"data_dir": "nowhere"}, ["nowhere does not exist"]),
        ({"resume": "nowhere"}, ["nowhere holds no run"]),
        ({"weights": "nowhere", "testing": True}, ["--weights nowhere: there is no such file"]),
    ],
)
def test_what_does_not_fit_is_refused_in_words(refused, flags, words):
    message = refused(**flags)
    for word in words:
        assert word in message


def test_a_flag_without_its_value_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--save-dir"], Experiment())
    assert end.value.code == 2
    assert "--save-dir" in capsys.readouterr().err
