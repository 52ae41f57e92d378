"""The ablation: a grid of runs that is continued where it was stopped, its table and its figure."""

import dataclasses
import sys
from unittest import mock

import numpy as np
import pytest
from PIL import Image

import ablation
from capsjax.run import loop
from data_files import digits, write_npz
from tiny_run import SIZES, read_json, read_rows


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Calls the command in a folder, on a grid of two tiny networks."""
    tiny = {
        name: dataclasses.replace(
            preset, network=dataclasses.replace(preset.network, **SIZES["capsnet"])
        )
        for name, preset in ablation.GRID.items()
        if name in ("routings-3", "random")
    }
    monkeypatch.setattr(ablation, "GRID", tiny)
    monkeypatch.setattr(ablation, "ABLATION", dataclasses.replace(ablation.ABLATION, presets=tiny))
    monkeypatch.setattr(ablation, "configure", lambda: None)  # of this process
    source = write_npz(tmp_path / "digits.npz", digits(220, 20))

    def call(**flags):
        flags = {"folder": tmp_path / "grid", "data-dir": source, "epochs": 1} | flags
        words = [w for flag, value in flags.items() for w in (f"--{flag}", str(value))]
        monkeypatch.setattr(sys, "argv", ["ablation.py", "--train-size", "200", *words])
        ablation.main()

    return call


@pytest.mark.slow
def test_the_grid_is_trained_once_continued_and_drawn(call, tmp_path, capsys):
    call(seeds=1)
    folder = tmp_path / "grid"
    assert {path.name for path in folder.iterdir()} == {"routings-3", "random", "ablation.png"}
    first = {path: path.read_bytes() for path in folder.glob("*/0/metrics.csv")}
    assert len(first) == 2
    trained = []
    epoch = loop.Runner._train_epoch
    with mock.patch.object(
        loop.Runner,
        "_train_epoch",
        lambda self, *rest: trained.append(self.plan.settings) or epoch(self, *rest),
    ):
        call(seeds=2)
    assert [(s.recipe.preset, s.recipe.seed) for s in trained] == [("routings-3", 1), ("random", 1)]
    assert {path: path.read_bytes() for path in first} == first
    table = capsys.readouterr().out.splitlines()[-4:]
    for name, line in zip(("routings-3", "random"), table[-3:-1], strict=True):
        errors = [
            float(read_rows(folder / name / str(seed))[-1]["test_error"]) for seed in range(2)
        ]
        mean, spread = np.mean(errors), np.std(errors, ddof=1)
        each = ", ".join(f"{error:.2f}" for error in errors)
        assert line == f"| {name} | {mean:.3f} ± {spread:.3f} | {each} |"
    assert read_json(folder / "random" / "1")["settings"]["recipe"]["preset"] == "random"
    with Image.open(folder / "ablation.png") as picture:
        assert min(picture.size) > 90


def test_every_network_of_the_grid_differs_from_the_control_in_one_respect():
    grid = dict(ablation.GRID)
    control = grid.pop(ablation.CONTROL)
    assert control == ablation.SEED
    assert len({*map(repr, grid.values())}) == len(grid) == 8
    for preset in grid.values():
        pairs = ((preset.network, control.network), (preset.training, control.training))
        changed = [
            field.name
            for ours, theirs in pairs
            for field in dataclasses.fields(ours)
            if getattr(ours, field.name) != getattr(theirs, field.name)
        ]
        assert len(changed) == 1
        assert (
            dataclasses.replace(preset, network=control.network, training=control.training)
            == control
        )


def test_nonsense_is_refused_in_words(call, tmp_path, capsys):
    for flags, words in (({"seeds": 0}, "--seeds must be 1 or more"), ({"epochs": 0}, "--epochs")):
        with pytest.raises(SystemExit) as end:
            call(**flags)
        assert end.value.code == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        call(**{"data-dir": tmp_path / "absent"})
    assert end.value.code == 2
    assert "does not exist" in capsys.readouterr().err
