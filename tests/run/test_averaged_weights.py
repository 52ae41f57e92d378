"""--average: the moving average of the weights replaces them in all that a run tells and leaves."""

import numpy as np
import pytest

import capsjax
from capsjax import weights
from tiny_run import (
    have_same_bits,
    make_images,
    read_arrays,
    read_json,
    read_params,
    read_rows,
    read_weights,
    run_command,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def averaged(trained):
    return trained(average=0.9)


def read_average(folder):
    return read_params(folder, "average.")


def test_a_checkpoint_holds_the_average_beside_the_parameters(averaged, plain):
    params, average = read_params(averaged.folder), read_average(averaged.folder)
    assert params.keys() == average.keys()
    for name, array in average.items():
        assert np.any(array != params[name]), name
    assert not [name for name in read_arrays(plain.folder) if name.startswith("average.")]
    assert read_json(averaged.folder)["settings"]["training"]["average"] == 0.9


def test_the_average_changes_no_step_of_training(averaged, plain):
    ours, theirs = read_params(averaged.folder), read_params(plain.folder)
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=0, atol=1e-7)
    for row, expected in zip(read_rows(averaged.folder), read_rows(plain.folder), strict=True):
        assert float(row["train_loss"]) == pytest.approx(float(expected["train_loss"]), abs=2e-6)


def test_the_average_is_what_is_evaluated(averaged, plain):
    images = make_images()
    model = weights.load(averaged.folder / "weights.safetensors")
    predicted, scores, _ = capsjax.predict(model, images["x_test"])
    margin = float(np.mean(capsjax.margin_loss(scores, images["y_test"])))
    row, other = read_rows(averaged.folder)[-1], read_rows(plain.folder)[-1]
    assert float(row["test_margin"]) == pytest.approx(margin, abs=2e-6)
    assert float(other["test_margin"]) != pytest.approx(margin, abs=2e-6)
    wrong = int(np.sum(np.asarray(predicted) != images["y_test"]))
    assert averaged.out.splitlines()[-1] == f"test error: {100 * wrong / 23:.2f} % ({wrong} of 23)"


def test_the_average_is_saved_and_drawn(averaged):
    average = read_average(averaged.folder)
    assert have_same_bits(read_weights(averaged.folder), average)
    assert have_same_bits(weights.arrays_of(averaged.drawn[0]), average)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_testing_takes_the_average(averaged, base, tmp_path, kind):
    folder = averaged.folder
    file = {"weights": folder / "weights.safetensors", "data_dir": base["data_dir"]}
    source = {"weights": folder} if kind == "folder" else file
    tested = run_command(testing=True, save_dir=tmp_path, **source)
    assert tested.out.splitlines()[-1] == averaged.out.splitlines()[-1]
    assert f"test loss: {read_rows(folder)[-1]['test_loss']}\n" in tested.out
    assert have_same_bits(weights.arrays_of(tested.drawn[0]), read_average(folder))


@pytest.mark.parametrize("average", [None, 0.9])
def test_training_starts_from_the_average_of_another_run(averaged, start, average):
    outcome = start(weights=averaged.folder, lr=1e-12, epochs=1, average=average)
    for prefix in ("params.", *(["average."] if average else [])):
        ours = read_params(outcome.folder, prefix)
        for name, array in read_average(averaged.folder).items():
            np.testing.assert_allclose(ours[name], array, rtol=0, atol=1e-7)
