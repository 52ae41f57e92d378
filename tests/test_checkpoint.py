"""A checkpoint holds what was saved bit for bit; the last two and the best are kept."""

from unittest import mock

import chex
import jax
import numpy as np
import pytest

import tiny
from capsjax._trees import fill
from capsjax.checkpoint import CheckpointError, Checkpoints
from capsjax.sharding import make_mesh, replicated
from small_states import NOTES, holds, list_steps, make_state, read_last, save_all


def run(state, batches, devices=1):
    """Trains the tiny network from a state."""
    mesh = make_mesh(tiny.BATCH, devices)
    data = tiny.place_data(mesh, *tiny.make_images())
    step, _ = tiny.jit_steps(devices)
    state = jax.device_put(state, replicated(mesh))
    for batch in batches:
        state, _ = step(state, jax.random.key(0), *data, batch[None])
    return state


@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 1)])
def test_a_whole_state_is_read_back_bit_for_bit_on_any_number_of_devices(tmp_path, before, after):
    state = run(tiny.make_state(), tiny.draw_batches(2))
    state = jax.device_put(state, replicated(make_mesh(tiny.BATCH, before)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, NOTES)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoint = read_last(checkpoints)
    assert holds(checkpoint, state)
    assert checkpoint.notes == NOTES
    assert checkpoint.unsound == []
    restored = fill(tiny.make_state(seed=1), checkpoint.arrays)
    chex.assert_trees_all_equal_structs(restored, state)
    restored = jax.device_put(restored, replicated(make_mesh(tiny.BATCH, after)))
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)
    chex.assert_trees_all_equal(*map(jax.device_get, (restored, state)))


def test_notes_are_read_back_as_json_has_them_and_a_stray_file_is_no_checkpoint(tmp_path):
    (tmp_path / ".replaced").mkdir()
    (tmp_path / ".replaced" / ".nfs0001").touch()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1), {"errors": {9: 0.1, 10: 0.2}})
        assert read_last(checkpoints).notes == {"errors": {"9": 0.1, "10": 0.2}}


def test_statistics_and_average_are_read_back_into_their_places(tmp_path):
    save_all(tmp_path, (2, None))
    with Checkpoints(tmp_path) as checkpoints:
        restored = fill(make_state(1), read_last(checkpoints).arrays)
    chex.assert_trees_all_equal(restored, jax.device_get(make_state(2)))
    assert {"mean"} == restored.statistics.keys()
    assert restored.average.keys() == restored.params.keys()


def test_a_resumed_run_ends_in_the_bits_of_an_unbroken_one(tmp_path):
    batches = tiny.draw_batches(8)
    unbroken = jax.device_get(run(tiny.make_state(), batches))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(run(tiny.make_state(), batches[:3]), {})
    with Checkpoints(tmp_path) as checkpoints:
        state = fill(tiny.make_state(seed=1), read_last(checkpoints).arrays)
    assert state.sums.examples == 3 * tiny.BATCH
    resumed = jax.device_get(run(state, batches[state.step :]))
    chex.assert_trees_all_equal(resumed, unbroken)


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    state = run(tiny.make_state(), tiny.draw_batches(1))
    before = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        later = run(state, tiny.draw_batches(20))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        checkpoints.wait()
        assert holds(read_last(checkpoints), before)
    # The copy in the background did not change what the steps compute.
    again = run(run(tiny.make_state(), tiny.draw_batches(1)), tiny.draw_batches(20))
    chex.assert_trees_all_equal(*map(jax.device_get, (later, again)))


def test_what_is_being_saved_can_be_read(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(make_state(step), NOTES, 1 / step)
            assert holds(read_last(checkpoints), make_state(step))
            assert holds(checkpoints.best(), make_state(step))


def test_arrays_of_every_dtype_and_shape_are_read_back(tmp_path):
    bfloat16 = np.dtype("bfloat16")
    state = make_state(
        3,
        half=np.arange(6).astype(bfloat16).reshape(3, 1, 2),
        flags=np.array([True, False, True]),
        bytes=np.arange(5, dtype=np.uint8),
        empty=np.zeros((0, 4), np.float32),
        transposed=np.arange(6, dtype=np.float32).reshape(2, 3).T,
        special=np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        checkpoints.wait()
        read = read_last(checkpoints)
    assert holds(read, state)
    for name, array in state.params.items():
        assert read.arrays[f"params.{name}"].shape == array.shape


def test_before_the_first_checkpoint_there_is_neither_last_nor_best(tmp_path):
    with Checkpoints(tmp_path / "new" / "folder") as checkpoints:
        assert checkpoints.last() is None
        with pytest.raises(CheckpointError, match=r"no checkpoint in .*folder yet"):
            checkpoints.best()


def test_the_last_two_and_the_best_are_kept(tmp_path):
    folder = tmp_path / "run"
    save_all(folder, (1, 0.5), (2, 0.1), (3, 0.3), (4, None), (5, 0.2), (6, None))
    assert list_steps(folder) == [2, 5, 6]
    save_all(folder, (7, 0.05), (8, 0.3), (9, 0.3), (10, None))  # as another process would
    assert list_steps(folder) == [7, 9, 10]


def test_without_any_error_the_last_two_are_kept(tmp_path):
    folder = tmp_path / "run"
    save_all(folder, *((step, None) for step in range(1, 6)))
    assert list_steps(folder) == [4, 5]


@pytest.mark.parametrize(
    ("errors", "best"),
    [
        ([0.5, 0.1, 0.3], 2),
        ([0.1, 0.1], 2),  # of equal ones the last
        ([0.3, None, None], 1),
        ([None, None], 2),  # no validation: the last
        ([0.0, 1.0], 1),
    ],
)
def test_best_is_of_least_error_and_without_any_the_last(tmp_path, errors, best):
    folder = tmp_path / "run"
    save_all(folder, *enumerate(errors, 1))
    with Checkpoints(folder) as checkpoints:
        assert holds(checkpoints.best(), make_state(best))
        assert holds(read_last(checkpoints), make_state(len(errors)))


@pytest.mark.parametrize("waits", [True, False])
def test_saving_a_step_again_replaces_it_and_its_error(tmp_path, waits):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make_state(1), {}, 0.3)
        checkpoints.save(make_state(2), {}, 0.1)
        if waits:
            checkpoints.wait()
        changed = make_state(2)._replace(params={"kernel": np.ones((2, 2), np.float32)})
        checkpoints.save(changed, {"second": True}, 0.5)
        checkpoints.wait()
        assert holds(read_last(checkpoints), changed)
        assert read_last(checkpoints).notes == {"second": True}
        assert checkpoints.best().step == 1
    assert list_steps(tmp_path) == [1, 2]


def test_a_step_saved_again_without_success_is_still_there(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    save_all(folder, (1, 0.1), (2, 0.2))
    changed = make_state(2)._replace(params={"kernel": np.ones((2, 2), np.float32)})
    with monkeypatch.context() as patch, Checkpoints(folder) as checkpoints:
        patch.setattr(checkpoints._manager, "save", mock.Mock(side_effect=OSError("no space")))
        with pytest.raises(CheckpointError, match="a checkpoint cannot be written: no space"):
            checkpoints.save(changed, {})
    for _ in range(2):  # reading does not change it
        with Checkpoints(folder) as checkpoints:
            assert holds(read_last(checkpoints), make_state(2))
            assert read_last(checkpoints).notes == NOTES
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(changed, {})
    with Checkpoints(folder) as checkpoints:
        assert holds(read_last(checkpoints), changed)
    assert list_steps(folder) == [1, 2]
