"""A run as a value: the same settings give the same result, and nothing is trained twice."""

import concurrent.futures
import dataclasses
import signal
from unittest import mock

import pytest

from capsjax.run import Result, Run, Settings, loop, run
from capsjax.run.command_line import parse
from hooks import after_step, kill, raise_signal
from tiny_run import (
    EXPERIMENT,
    STEPS,
    have_same_bits,
    make_arguments,
    make_images,
    read_arrays,
    read_json,
    read_rows,
    read_tree,
    write_images,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def make_settings(base, tmp_path):
    """Makes the settings of a run in a folder of its own."""

    def make(**flags) -> Settings:
        flags = base | {"save_dir": tmp_path / "run"} | flags
        return parse(make_arguments(**flags), EXPERIMENT)

    return make


def run_without_pictures(settings: Settings) -> Result:
    with mock.patch("capsjax.run.lifecycle.write_pictures"):
        return run(EXPERIMENT, settings)


def test_a_run_trains_and_returns_its_folder_and_the_test_metrics(make_settings, trained, tmp_path):
    result = run_without_pictures(make_settings(seed=1))
    whole = trained(seed=1)
    assert result.folder == tmp_path / "run"
    assert have_same_bits(read_arrays(result.folder), read_arrays(whole.folder))
    row = read_rows(result.folder)[-1]
    for name in ("loss", "margin", "reconstruction"):
        assert f"{result.test.losses[name]:.6f}" == row[f"test_{name}"]
    assert result.test.loss == result.test.losses["loss"]
    assert f"{result.test.error:.4f}" == row["test_error"]
    assert whole.out.splitlines()[-1].endswith(f"({result.test.wrong} of {result.test.examples})")


@pytest.mark.parametrize("flags", [{}, {"validation": 10}, {"average": 0.9}], ids=str)
def test_the_same_settings_return_the_same_result_without_training_again(make_settings, flags):
    settings = make_settings(**flags)
    first = run_without_pictures(settings)
    before = read_tree(first.folder)
    with mock.patch.object(loop.Runner, "_train_epoch", side_effect=AssertionError):
        again = run_without_pictures(settings)
    assert again == first
    assert read_tree(first.folder) == before


def test_after_a_kill_the_same_settings_continue_to_the_same_bits(make_settings, plain, capsys):
    settings = make_settings(checkpoint_steps=4)
    with after_step(STEPS + 5, kill), pytest.raises(MemoryError):
        run_without_pictures(settings)
    result = run_without_pictures(settings)
    assert f"resume    step {STEPS + 4} of {2 * STEPS}\n" in capsys.readouterr().out
    assert have_same_bits(read_arrays(result.folder), read_arrays(plain.folder))
    assert read_rows(result.folder) == read_rows(plain.folder)


def test_a_signal_ends_a_run_that_the_same_settings_continue(make_settings, plain):
    with after_step(3, raise_signal(signal.SIGTERM)), pytest.raises(SystemExit) as end:
        run_without_pictures(make_settings())
    assert end.value.code == 143
    result = run_without_pictures(make_settings())
    assert have_same_bits(read_arrays(result.folder), read_arrays(plain.folder))


def test_a_run_in_another_thread_trains_to_its_end(make_settings, plain):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        result = pool.submit(run_without_pictures, make_settings()).result()
    assert have_same_bits(read_arrays(result.folder), read_arrays(plain.folder))


def test_more_epochs_continue_a_run(make_settings, trained):
    run_without_pictures(make_settings())
    result = run_without_pictures(make_settings(epochs=3))
    assert have_same_bits(read_arrays(result.folder), read_arrays(trained(epochs=3).folder))
    assert read_json(result.folder)["settings"]["training"]["epochs"] == 3


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("preset", "paper"), ("routings", 2), ("precision", "bfloat16"), ("seed", 1)),
        *(("epochs", 1), ("batch_size", 20), ("lr", 0.01), ("lr_decay", 0.5), ("average", 0.9)),
        *(("lam_recon", 10.0), ("shift_pixels", 0), ("train_size", 50), ("validation", 10)),
    ],
)
def test_other_settings_in_the_folder_of_a_run_are_an_error(make_settings, copied, flag, value):
    before = read_tree(copied)
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} {value}.* this run has"):
        run_without_pictures(make_settings(save_dir=copied, **{flag: value}))
    assert read_tree(copied) == before


def test_other_initial_weights_in_the_folder_of_a_run_are_an_error(
    make_settings, plain, trained, copied
):
    with pytest.raises(ValueError, match=r"--weights .* but this run has None"):
        run_without_pictures(make_settings(save_dir=copied, weights=plain.folder))
    first = run_without_pictures(make_settings(weights=plain.folder, epochs=1))
    before = read_tree(first.folder)
    assert run_without_pictures(make_settings(weights=plain.folder, epochs=1)) == first
    for other in (None, trained(seed=1).folder):
        with pytest.raises(
            ValueError, match=f"--weights {other} .* but this run has {plain.folder}"
        ):
            run_without_pictures(make_settings(weights=other, epochs=1))
    assert read_tree(first.folder) == before


def test_other_images_in_the_folder_of_a_run_are_an_error(make_settings, tmp_path):
    data_dir = write_images(tmp_path / "mine.npz")
    settings = make_settings(data_dir=data_dir, epochs=1)
    run_without_pictures(settings)
    write_images(data_dir, y_train=make_images()["y_train"][::-1])
    with pytest.raises(ValueError, match="was trained on other images"):
        run_without_pictures(settings)


def test_a_test_of_a_run_returns_the_metrics_that_the_run_returned(make_settings, tmp_path):
    trained = run_without_pictures(make_settings())
    before = read_tree(trained.folder)
    tested = run_without_pictures(
        make_settings(weights=trained.folder, testing=True, save_dir=None, data_dir=None)
    )
    assert tested == trained
    assert read_tree(trained.folder).items() - before.items() == {
        ("test.json", (trained.folder / "test.json").read_bytes())
    }


def test_another_network_in_the_folder_of_a_run_is_an_error(make_settings, copied):
    settings, preset = make_settings(save_dir=copied), EXPERIMENT.presets["seed"]
    network = dataclasses.replace(preset.network, primary_coupling=0.5)
    other = dataclasses.replace(
        EXPERIMENT, presets={"seed": dataclasses.replace(preset, network=network)}
    )
    before = read_tree(copied)
    with pytest.raises(ValueError, match=r"another network: .*'primary_coupling': 1\.0.* 0\.5"):
        run(other, settings)
    assert read_tree(copied) == before


def test_a_run_to_resume_that_is_not_there_is_an_error(make_settings, tmp_path):
    settings = make_settings(save_dir=None)
    missing = dataclasses.replace(settings, run=Run(resume=tmp_path / "none", devices=1))
    with pytest.raises(ValueError, match="holds no run"):
        run(EXPERIMENT, missing)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("preset", [None, "seed", "paper"])
def test_the_settings_of_a_preset_are_those_of_its_command_line(preset):
    parsed = parse(make_arguments(preset=preset, routings="None"), EXPERIMENT)
    assert EXPERIMENT.settings(preset) == parsed
    assert parsed.training == EXPERIMENT.presets[preset or "seed"].training
