"""What a run fixes before its first step: learning rate, order of the images, validation."""

import numpy as np
import pytest

from capsjax.run.command_line import parse
from capsjax.run.plan import Plan, make_plan
from tiny_run import EXPERIMENT, make_arguments


@pytest.fixture
def plan(base, capsys):
    """Makes the plan of a command line."""

    def plan(**flags) -> Plan:
        settings = parse(make_arguments(**base | flags), EXPERIMENT)
        return make_plan(settings, EXPERIMENT)[0]

    return plan


@pytest.mark.parametrize("preset", ["seed", "paper"])
def test_a_rate_that_does_not_decay_stays_as_it_is(plan, preset):
    schedule = plan(preset=preset, lr_decay=1.0).schedule
    assert [float(schedule(step)) for step in (0, 7, 100)] == pytest.approx([0.001] * 3)


def test_the_order_follows_from_seed_and_epoch_and_takes_each_image_at_most_once(plan):
    first = plan(batch_size=8)
    order = first.epoch_order(0)
    assert order.shape == (7, 8)
    assert len(np.unique(order)) == order.size
    np.testing.assert_array_equal(order, plan(batch_size=8).epoch_order(0))
    assert not np.array_equal(order, first.epoch_order(1))
    assert not np.array_equal(order, plan(batch_size=8, seed=1).epoch_order(0))


def test_validation_images_are_never_trained_on(plan):
    split = plan(validation=15, train_size=30)
    taken = np.concatenate([split.epoch_order(epoch).ravel() for epoch in range(3)])
    assert len(np.unique(taken)) == 30
    assert len(np.unique(split.validation_indices)) == 15
    assert not np.intersect1d(taken, split.validation_indices).size
