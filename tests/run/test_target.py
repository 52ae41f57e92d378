"""A target: training stops after the first epoch that reads the validation images well enough."""

from unittest import mock

import pytest

from capsjax.run import loop
from tiny_run import read_rows, run_command


@pytest.fixture
def scripted():
    """Makes the numbers of misread validation images come from a list, of 20 images each."""
    wrongs = []
    evaluate = loop.Runner.evaluate

    def evaluate_as_scripted(self, state, train_indices=None):
        metrics, predicted = evaluate(self, state, train_indices)
        return metrics if train_indices is None else metrics._replace(
            wrong=wrongs.pop(0)
        ), predicted

    with mock.patch.object(loop.Runner, "evaluate", evaluate_as_scripted):
        yield wrongs


@pytest.mark.slow
def test_training_stops_at_the_first_epoch_that_reaches_it_and_stays_stopped(start, scripted):
    scripted += [9, 3, 2]
    run = start(validation=20, epochs=4, target=85)  # 3 of 20 are wrong in just as many
    assert run.status == 0, run.err
    assert [row["validation_error"] for row in read_rows(run.folder)] == ["45.0000", "15.0000"]
    assert "target    85.0 % of the validation images, reached after epoch 2\n" in run.out
    assert "best on the validation images: epoch 2\n" in run.out
    resumed = run_command(resume=run.folder)
    assert resumed.out.splitlines()[-1] == run.out.splitlines()[-1]
    assert len(read_rows(run.folder)) == 2
    assert scripted == [2]


def test_a_target_that_is_not_reached_leaves_the_best_of_all_epochs(start, scripted):
    scripted += [4, 9]
    run = start(validation=20, epochs=2, target=85)
    assert len(read_rows(run.folder)) == 2
    assert "target    85.0 % of the validation images, not reached\n" in run.out
    assert "best on the validation images: epoch 1\n" in run.out


def test_a_target_needs_validation_images_and_is_a_percentage(start):
    assert "--target is reached on validation images: add --validation" in start(target=99).err
    for target in (0, 101):
        assert "--target must be above 0 and at most 100" in start(target=target).err
