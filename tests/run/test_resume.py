"""--resume: a stopped or killed run continues to the bits of a run that nobody stopped."""

import json
import signal
from unittest import mock

import pytest

from capsjax import weights
from capsjax.checkpoint import Checkpoints
from capsjax.run import loop
from hooks import after_step, kill, raise_signal
from tiny_run import (
    STEPS,
    have_same_bits,
    list_steps,
    read_arrays,
    read_json,
    read_params,
    read_rows,
    read_tree,
    run_command,
    write_images,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("flags", "stops"),
    [
        ({}, [3]),
        ({}, [STEPS]),
        ({}, [4, STEPS + 3]),
        ({"validation": 10}, [7]),
        ({"devices": 2}, [8]),
        ({"average": 0.9}, [8]),
    ],
    ids=["first-epoch", "epoch's-end", "twice", "validation", "two-devices", "average"],
)
def test_a_stopped_run_goes_on_to_the_bits_and_rows_of_an_unbroken_one(
    trained, start, flags, stops
):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    resume = None
    for stop, number in zip(stops, (signal.SIGTERM, signal.SIGINT), strict=False):
        with after_step(stop, raise_signal(number)):
            outcome = run_command(resume=resume) if resume else start(**flags)
        assert outcome.status == 128 + number
        assert f"{number.name}: ends after this step, with a checkpoint" in outcome.out
        assert f"stopped   step {stop}; --resume {outcome.folder} goes on\n" in outcome.out
        resume = outcome.folder
        assert list_steps(resume)[-1] == stop
    assert resume is not None
    config = (resume / "config.json").read_bytes()
    resumed = run_command(resume=resume)
    whole = trained(**flags)
    assert resumed.status == 0
    assert f"resume    step {stops[-1]} of {read_rows(whole.folder)[-1]['step']}\n" in resumed.out
    assert have_same_bits(read_arrays(resume), read_arrays(whole.folder))
    assert read_rows(resume) == read_rows(whole.folder)
    assert resumed.out.splitlines()[-1] == whole.out.splitlines()[-1]
    assert (resume / "config.json").read_bytes() == config
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("call", [1, 2], ids=["validation", "test"])
def test_a_signal_during_an_evaluation_ends_the_run_and_the_evaluation_is_done_again(
    trained, start, call
):
    evaluate, calls = loop.Runner.evaluate, []

    def evaluate_interrupted(self, state, train_indices=None):
        calls.append(train_indices)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(self, state, train_indices)

    with mock.patch.object(loop.Runner, "evaluate", evaluate_interrupted):
        outcome = start(validation=10)
    assert outcome.status == 143
    assert len(calls) == call
    assert list_steps(outcome.folder) == [5]
    assert run_command(resume=outcome.folder).status == 0
    assert have_same_bits(read_arrays(outcome.folder), read_arrays(trained(validation=10).folder))
    assert read_rows(outcome.folder) == read_rows(trained(validation=10).folder)


def test_a_signal_after_the_last_epoch_loses_no_result(trained, start):
    save = Checkpoints.save

    def save_interrupted(self, state, *rest):
        save(self, state, *rest)
        if int(state.step) == 10:
            signal.raise_signal(signal.SIGTERM)

    with mock.patch.object(Checkpoints, "save", save_interrupted):
        outcome = start(validation=10)
    assert outcome.status == 143
    resumed = run_command(resume=outcome.folder)
    assert resumed.out.splitlines()[-1] == trained(validation=10).out.splitlines()[-1]


def test_a_run_with_relative_paths_is_resumed_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "tiny.npz")
    run_command(data_dir="tiny.npz", save_dir="run", devices=1, epochs=1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_command(resume="../run").status == 0


@pytest.mark.parametrize("from_weights", [False, True], ids=["new", "from-weights"])
def test_a_run_without_a_checkpoint_yet_starts_at_step_0(start, trained, tmp_path, from_weights):
    flags = {"weights": trained(seed=1).folder} if from_weights else {}
    with after_step(2, kill), pytest.raises(MemoryError):
        start(**flags)
    assert not list_steps(tmp_path / "run")
    resumed = run_command(resume=tmp_path / "run")
    assert "resume    no checkpoint yet: from the start\n" in resumed.out
    assert have_same_bits(read_arrays(tmp_path / "run"), read_arrays(trained(**flags).folder))
    assert read_rows(tmp_path / "run") == read_rows(trained(**flags).folder)


def test_a_run_killed_between_row_and_checkpoint_has_each_epoch_once(start, tmp_path, plain):
    save = Checkpoints.save

    def save_or_die(self, state, *rest):
        if int(state.step) == 2 * STEPS:
            raise MemoryError
        save(self, state, *rest)

    with mock.patch.object(Checkpoints, "save", save_or_die), pytest.raises(MemoryError):
        start()
    assert len(read_rows(tmp_path / "run")) == 2
    run_command(resume=tmp_path / "run")
    assert read_rows(tmp_path / "run") == read_rows(plain.folder)
    assert have_same_bits(read_arrays(tmp_path / "run"), read_arrays(plain.folder))


def test_a_damaged_newest_checkpoint_is_passed_over_in_words(start, plain):
    with after_step(9, raise_signal()):
        folder = start().folder
    path = max((folder / "checkpoints/9/state").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    resumed = run_command(resume=folder)
    assert "the checkpoint of step 9 is damaged and was passed over" in resumed.out
    assert f"resume    step {STEPS} of" in resumed.out
    assert have_same_bits(read_arrays(folder), read_arrays(plain.folder))
    assert read_rows(folder) == read_rows(plain.folder)


def test_a_run_that_ended_is_not_trained_on_and_prints_its_result_again(copied, plain):
    before = read_tree(copied)
    resumed = run_command(resume=copied)
    assert resumed.status == 0
    assert resumed.out.splitlines()[-1] == plain.out.splitlines()[-1]
    assert have_same_bits(weights.arrays_of(resumed.drawn[0]), read_params(plain.folder))
    assert read_tree(copied) == before


def test_a_run_from_before_a_setting_was_there_goes_on_with_its_default(copied, plain, tmp_path):
    config = read_json(copied)
    for name in ("loss", "margin_steps", "elastic"):
        del config["settings"]["training"][name]
    (copied / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for flags in ({"resume": copied}, {"weights": copied, "testing": True, "save_dir": tmp_path}):
        outcome = run_command(**flags)
        assert outcome.status == 0, outcome.err
        assert outcome.out.splitlines()[-1] == plain.out.splitlines()[-1]


def test_more_epochs_go_on(copied, trained):
    resumed = run_command(resume=copied, epochs=3)
    whole = trained(epochs=3)
    assert resumed.status == 0
    assert have_same_bits(read_arrays(copied), read_arrays(whole.folder))
    assert read_rows(copied) == read_rows(whole.folder)
    assert read_json(copied)["settings"]["training"]["epochs"] == 3
