"""What is saved comes back bit for bit, or is known not to."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from capsjax._trees import WeightsError, fill, named_leaves
from capsjax.checkpoint import Checkpoint, CheckpointError, Checkpoints
from capsjax.sharding import make_mesh, replicate, replicated
from capsjax.train import Metrics, TrainState

NOTES = {"seconds": 12.34, "name": "ünïcode", "list": [1, None]}


def small(step: int, **params: np.ndarray) -> TrainState:
    """A state of few bytes, others for each step; enough that Orbax stores them by themselves."""
    rng = np.random.default_rng(step)
    params = {"kernel": rng.normal(size=(40, 30)).astype(np.float32), **params}
    number: Any = np.int32(step)
    losses, counts = rng.normal(size=2).astype(np.float32), rng.integers(99, size=2, dtype=np.int32)
    return TrainState(number, params, (number,), Metrics(*jax.device_put([*losses, *counts])))


def is_of(checkpoint, state) -> bool:
    """Whether a checkpoint holds the bits of a state, under its step."""
    ours, theirs = checkpoint.arrays, dict(named_leaves(state))
    return (
        checkpoint.step == state.step
        and ours.keys() == theirs.keys()
        and all(
            ours[name].dtype == leaf.dtype and ours[name].tobytes() == np.asarray(leaf).tobytes()
            for name, leaf in theirs.items()
        )
    )


def last(checkpoints: Checkpoints) -> Checkpoint:
    checkpoint = checkpoints.last()
    assert checkpoint is not None
    return checkpoint


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir())


@pytest.fixture
def saved(tmp_path):
    """Saves (step, error) after (step, error), and gives their folder."""

    def save(*steps):
        with Checkpoints(tmp_path / "run") as checkpoints:
            for step, error in steps:
                checkpoints.save(small(step), NOTES, error)
        return tmp_path / "run"

    return save


def train(state, batches, devices=1):
    mesh = make_mesh(tiny.BATCH, devices)
    data = [replicate(mesh, array) for array in tiny.images()]
    step, _ = tiny.steps(devices)
    state = jax.device_put(state, replicated(mesh))
    for batch in batches:
        state, _ = step(state, jax.random.key(0), *data, batch)
    return state


@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 1)])
def test_a_whole_state_comes_back_bit_for_bit_on_any_number_of_devices(tmp_path, before, after):
    state = train(tiny.state(), tiny.batches(2))
    state = jax.device_put(state, replicated(make_mesh(tiny.BATCH, before)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, NOTES)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoint = last(checkpoints)
    assert is_of(checkpoint, state)
    assert checkpoint.notes == NOTES
    assert checkpoint.unsound == []
    restored = fill(tiny.state(seed=1), checkpoint.arrays)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    restored = jax.device_put(restored, replicated(make_mesh(tiny.BATCH, after)))
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)
    chex.assert_trees_all_equal(*map(jax.device_get, (restored, state)))


def test_a_resumed_run_ends_in_the_bits_of_an_unbroken_one(tmp_path):
    batches = tiny.batches(8)
    unbroken = jax.device_get(train(tiny.state(), batches))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(train(tiny.state(), batches[:3]), {})
    with Checkpoints(tmp_path) as checkpoints:
        state = fill(tiny.state(seed=1), last(checkpoints).arrays)
    assert state.sums.examples == 3 * tiny.BATCH
    resumed = jax.device_get(train(state, batches[state.step :]))
    chex.assert_trees_all_equal(resumed, unbroken)


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    state = train(tiny.state(), tiny.batches(1))
    before = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        later = train(state, tiny.batches(20))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        checkpoints.wait()
        assert is_of(last(checkpoints), before)
    # The copy in the background did not keep the steps from what they should compute.
    again = train(train(tiny.state(), tiny.batches(1)), tiny.batches(20))
    chex.assert_trees_all_equal(*map(jax.device_get, (later, again)))


def test_leaves_are_named_by_their_path():
    names = dict(named_leaves(tiny.state()))
    assert {
        "step",
        "params.conv1.kernel",
        "params.primary.conv.bias",
        "params.classes.weight",
        "params.decoder.0.kernel",
        "sums.correct",
    } <= names.keys()
    assert [*dict(named_leaves({"a": [1, 2]}, "x."))] == ["x.a.0", "x.a.1"]


def test_what_is_being_saved_can_be_read(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(small(step), NOTES, 1 / step)
            assert is_of(last(checkpoints), small(step))
            assert is_of(checkpoints.best(), small(step))


def test_arrays_of_every_dtype_and_shape_come_back(tmp_path):
    bfloat16 = np.dtype("bfloat16")
    state = small(
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
        read = last(checkpoints)
    assert is_of(read, state)
    for name, array in state.params.items():
        assert read.arrays[f"params.{name}"].shape == array.shape


def test_before_the_first_checkpoint_there_is_neither_last_nor_best(tmp_path):
    with Checkpoints(tmp_path / "new" / "folder") as checkpoints:
        assert checkpoints.last() is None
        with pytest.raises(CheckpointError, match=r"no checkpoint in .*folder yet"):
            checkpoints.best()


def test_the_last_two_and_the_best_are_kept(saved):
    folder = saved((1, 0.5), (2, 0.1), (3, 0.3), (4, None), (5, 0.2), (6, None))
    assert kept(folder) == [2, 5, 6]
    saved((7, 0.05), (8, 0.3), (9, 0.3), (10, None))  # by another process, as it were
    assert kept(folder) == [7, 9, 10]


def test_without_any_error_the_last_two_are_kept(saved):
    assert kept(saved(*((step, None) for step in range(1, 6)))) == [4, 5]


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
def test_best_is_of_least_error_and_without_any_the_last(saved, errors, best):
    folder = saved(*enumerate(errors, 1))
    with Checkpoints(folder) as checkpoints:
        assert is_of(checkpoints.best(), small(best))
        assert is_of(last(checkpoints), small(len(errors)))


@pytest.mark.parametrize("waits", [True, False])
def test_saving_a_step_again_replaces_it_and_its_error(tmp_path, waits):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(small(1), {}, 0.3)
        checkpoints.save(small(2), {}, 0.1)
        if waits:
            checkpoints.wait()
        changed = small(2)._replace(params={"kernel": np.ones((2, 2), np.float32)})
        checkpoints.save(changed, {"second": True}, 0.5)
        checkpoints.wait()
        assert is_of(last(checkpoints), changed)
        assert last(checkpoints).notes == {"second": True}
        assert checkpoints.best().step == 1
    assert kept(tmp_path) == [1, 2]


def test_a_step_saved_again_without_success_is_still_there(saved, monkeypatch):
    folder = saved((1, 0.1), (2, 0.2))
    changed = small(2)._replace(params={"kernel": np.ones((2, 2), np.float32)})
    with monkeypatch.context() as patch, Checkpoints(folder) as checkpoints:
        patch.setattr(checkpoints._manager, "save", mock.Mock(side_effect=OSError("no space")))
        with pytest.raises(CheckpointError, match="a checkpoint cannot be written: no space"):
            checkpoints.save(changed, {})
    for _ in range(2):  # to read it does not change it
        with Checkpoints(folder) as checkpoints:
            assert is_of(last(checkpoints), small(2))
            assert last(checkpoints).notes == NOTES
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(changed, {})
    with Checkpoints(folder) as checkpoints:
        assert is_of(last(checkpoints), changed)
    assert kept(folder) == [1, 2]


def damaged(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes({"emptied": b"", "truncated": content[: len(content) // 2]}[kind])


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["missing", "emptied", "truncated"])
def test_a_checkpoint_with_a_damaged_file_is_passed_over_and_named(saved, tmp_path, kind):
    folder = saved((1, 0.5), (2, 0.3), (3, 0.1))
    assert kept(folder) == [2, 3]
    passed_over = 0
    for number, path in enumerate(files(folder / "3")):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        damaged(copy / path.relative_to(folder), kind)
        with Checkpoints(copy) as checkpoints:
            found = last(checkpoints)
            assert is_of(found, small(found.step))
            assert found.notes == NOTES
            assert found.unsound == [3][: 3 - found.step]
            passed_over += found.step == 2
            # Training goes on from there: what it saves is there, and the damaged one is not.
            checkpoints.save(small(found.step + 1), {}, 0.2)
            checkpoints.wait()
            assert is_of(last(checkpoints), small(found.step + 1))
            assert last(checkpoints).unsound == []
    assert passed_over >= 4  # manifest, array, its description, the notes


def test_a_step_before_a_damaged_one_is_saved(saved):
    folder = saved((10, None), (20, None))
    for path in files(folder / "20" / "state"):
        damaged(path, "emptied")
    with Checkpoints(folder) as checkpoints:
        assert last(checkpoints).step == 10
        checkpoints.save(small(15), {})
    with Checkpoints(folder) as checkpoints:
        assert is_of(last(checkpoints), small(15))
        assert last(checkpoints).unsound == []
    assert kept(folder) == [10, 15]


def test_a_flipped_bit_anywhere_is_harmless_or_found(saved):
    folder = saved((1, 0.5), (2, 0.3))
    rng = np.random.default_rng(0)
    harmless, found = [], []
    for path in files(folder / "2"):
        content = path.read_bytes()
        for position in rng.permutation(len(content))[:12]:
            flipped = bytearray(content)
            flipped[position] ^= 1 << rng.integers(8)
            path.write_bytes(flipped)
            with Checkpoints(folder) as checkpoints:
                checkpoint = last(checkpoints)
            assert is_of(checkpoint, small(checkpoint.step)), (path, position)
            assert checkpoint.notes == NOTES
            (harmless if checkpoint.step == 2 else found).append(path.name)
        path.write_bytes(content)
    largest = max(files(folder / "2"), key=lambda path: path.stat().st_size)
    assert {"metadata", largest.name} <= set(found)
    assert "metadata" not in harmless


@pytest.mark.parametrize("kind", ["emptied", "truncated"])
def test_when_all_are_damaged_it_is_an_error_in_words(saved, kind):
    folder = saved((1, 0.5), (2, 0.3))
    for path in files(folder):
        damaged(path, kind)
    with Checkpoints(folder) as checkpoints:
        message = r"all checkpoints in .*run are damaged: steps \[2, 1\]"
        with pytest.raises(CheckpointError, match=message):
            checkpoints.last()
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoints.best()


def test_a_damaged_best_is_an_error_and_no_other_in_its_place(saved):
    folder = saved((1, 0.1), (2, 0.3))
    for path in files(folder / "1" / "state"):
        damaged(path, "truncated")
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(CheckpointError, match="step 1 cannot be read"):
            checkpoints.best()
        assert last(checkpoints).step == 2


def test_fill_names_the_first_array_that_differs(tmp_path):
    def arrays(tree):
        return dict(named_leaves(tree, "params."))

    ours = {"conv1": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}, "last": np.zeros(1)}
    ones = jax.tree.map(np.ones_like, ours)
    filled = fill(ours, {**arrays(ones), "step": np.zeros(3)}, "params.")
    chex.assert_trees_all_equal(filled, ones)
    for theirs, message in (
        (
            {**ours, "conv1": {"kernel": np.zeros((2, 4)), "bias": np.zeros(4)}},
            r"params.conv1.bias is \[3\] here and \[4\] there",
        ),
        (
            {**ours, "conv1": {"kernel": np.zeros((2, 4)), "bias": np.zeros(3)}},
            r"params.conv1.kernel is \[2, 3\] here and \[2, 4\] there",
        ),
        (
            {"conv1": ours["conv1"]},
            r"params.last is \[1\] here and no such array there",
        ),
        (
            {**ours, "more": np.zeros((2, 2))},
            r"params.more is no such array here and \[2, 2\] there",
        ),
    ):
        with pytest.raises(WeightsError, match=f"weights of another network: {message}"):
            fill(ours, arrays(theirs), "params.")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_fill_refuses_what_is_not_finite(value, dtype):
    ours = {"conv1": {"kernel": np.zeros((2, 3), dtype)}}
    with pytest.raises(WeightsError, match=r"conv1\.kernel holds values that are not finite"):
        fill(ours, {"conv1.kernel": np.array([[0, 1, 2], [3, value, 5]], dtype)})


def test_fill_gives_each_leaf_the_dtype_of_its_place():
    filled = fill({"a": np.zeros(2, np.float32)}, {"a": np.ones(2)})
    assert filled["a"].dtype == np.float32


ENDLESS = """
import sys
from pathlib import Path
import numpy as np
from capsjax.checkpoint import Checkpoints
from capsjax.train import Metrics, TrainState
with Checkpoints(Path(sys.argv[1])) as checkpoints:
    step = getattr(checkpoints.last(), "step", 0)
    while True:
        step += 1
        kernel = np.random.default_rng(step).normal(size=200_000).astype(np.float32)
        sums = Metrics(*(np.zeros((), dtype) for dtype in ("f4", "f4", "i4", "i4")))
        checkpoints.save(TrainState(np.int32(step), {"kernel": kernel}, (), sums), {}, 1 / step)
        print(step, flush=True)
"""


@pytest.mark.slow
def test_a_save_that_is_killed_never_becomes_a_checkpoint(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    folder, before, left_behind = tmp_path / "run", 0, 0
    for delay in np.random.default_rng(0).uniform(0, 0.1, size=5):
        process = subprocess.Popen(
            [sys.executable, "-c", ENDLESS, str(folder)], stdout=subprocess.PIPE, text=True, env=env
        )
        assert process.stdout is not None
        while int(process.stdout.readline()) < before + 3:
            pass
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        left_behind += not all(path.name.isdigit() for path in folder.iterdir())
        with Checkpoints(folder) as checkpoints:
            checkpoint = last(checkpoints)
            assert checkpoint.unsound == []
            assert checkpoint.step > before
            for found in (checkpoint, checkpoints.best()):
                kernel = np.random.default_rng(found.step).normal(size=200_000)
                np.testing.assert_array_equal(
                    found.arrays["params.kernel"], kernel.astype(np.float32)
                )
        before = checkpoint.step
    assert left_behind  # at least one was killed while it saved
