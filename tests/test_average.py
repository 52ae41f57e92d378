"""The moving average of the parameters."""

import dataclasses
from typing import Any

import chex
import jax
import numpy as np
import pytest

import tiny
from capsjax import sharding, train

KEY = jax.random.key(7)
IMAGES, LABELS = tiny.make_images()
STEPS = 12
BATCHES = tiny.draw_batches(STEPS)
MESH = sharding.make_mesh(tiny.BATCH, 1)
WHOLE = sharding.replicated(MESH)
DATA = tiny.place_data(MESH, IMAGES, LABELS)
COUNTED = np.ones(tiny.BATCH, bool)


def run(decay: float | None) -> tuple[train.Setup, list[train.TrainState]]:
    """Trains with an average of this decay: every state, the first one included."""
    setup = dataclasses.replace(tiny.SETUP, average=decay)
    _, state = train.create(tiny.make_capsnet(), tiny.OPTIMIZER, tiny.TASK, average=decay)
    step, _ = train.jit_steps(setup, MESH)
    states = [jax.device_get(state)]
    for batch in BATCHES:
        state, _ = step(jax.device_put(state, WHOLE), KEY, *DATA, batch[None])
        states.append(jax.device_get(state))
    return setup, states


@pytest.fixture(scope="module")
def averaged():
    """A run whose decay is reached after eight steps."""
    return run(0.5)


def average_by_hand(states, decay):
    """The average after the last state, by a loop in float64."""
    average = jax.tree.map(np.float64, states[0].params)
    for t, state in enumerate(states[1:]):
        delta = min(decay, (1 + t) / (10 + t))
        average = jax.tree.map(
            lambda old, new, delta=delta: delta * old + (1 - delta) * new, average, state.params
        )
    return average


def test_the_average_is_that_of_a_loop_whose_decay_rises_to_the_one_asked_for(averaged):
    _, states = averaged
    assert (1 + STEPS) / (10 + STEPS) > 0.5
    for steps in (0, 1, STEPS):
        expected = average_by_hand(states[: steps + 1], 0.5)
        chex.assert_trees_all_close(states[steps].average, expected, rtol=1e-5, atol=1e-7)
    # Without the limit of the decay it would be another one.
    other = average_by_hand(states, 1.0)
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), states[-1].average, other)
    assert min(jax.tree.leaves(apart)) > 1e-4


def test_a_run_without_an_average_has_none(averaged):
    _, states = run(None)
    assert [state.average for state in states] == [{}] * (STEPS + 1)
    chex.assert_trees_all_equal(states[-1].params, averaged[1][-1].params)


def test_evaluation_is_of_the_average(averaged):
    setup, states = averaged
    state = jax.device_put(states[-1], WHOLE)
    results = train.jit_steps(setup, MESH)[1](state, *DATA, BATCHES[0], COUNTED)
    as_parameters = state._replace(params=state.average, average={})
    expected = tiny.jit_steps()[1](as_parameters, *DATA, BATCHES[0], COUNTED)
    chex.assert_trees_all_close(results, expected, rtol=1e-6)
    of_parameters, _ = tiny.jit_steps()[1](state._replace(average={}), *DATA, BATCHES[0], COUNTED)
    assert abs(of_parameters.losses["loss"] / results[0].losses["loss"] - 1) > 1e-3


def test_the_network_that_counts_has_the_averaged_parameters(averaged):
    setup, states = averaged
    model: Any = train.merge(setup.graphdef, states[-1])
    np.testing.assert_array_equal(
        model.class_caps.weight[...], states[-1].average["class_caps"]["weight"]
    )
    model = train.merge(setup.graphdef, states[-1]._replace(average={}))
    np.testing.assert_array_equal(
        model.class_caps.weight[...], states[-1].params["class_caps"]["weight"]
    )
