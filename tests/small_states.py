"""States of few bytes, to save as checkpoints and to compare with what is read."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from capsjax._trees import named_leaves
from capsjax.checkpoint import Checkpoint, Checkpoints
from capsjax.train import Sums, TrainState

NOTES = {"seconds": 12.34, "name": "ünïcode", "list": [1, None]}


def make_state(step: int, **params: np.ndarray) -> TrainState:
    """Makes a state, another one for each step, of arrays so large that Orbax stores each alone."""
    rng = np.random.default_rng(step)
    params = {"kernel": rng.normal(size=(40, 30)).astype(np.float32), **params}
    number: Any = np.int32(step)
    losses = {name: rng.normal(size=()).astype(np.float32) for name in ("loss", "margin")}
    counts = rng.integers(99, size=2, dtype=np.int32)
    sums = Sums(*jax.device_put((losses, *counts)))
    statistics = {"mean": rng.normal(size=3).astype(np.float32)}
    average = jax.tree.map(lambda leaf: np.ascontiguousarray(leaf[::-1]), params)
    return TrainState(number, params, statistics, average, (number,), sums)


def holds(checkpoint: Checkpoint, state: TrainState) -> bool:
    """Returns whether a checkpoint holds the bits of a state, under its step."""
    ours, theirs = checkpoint.arrays, dict(named_leaves(state))
    return (
        checkpoint.step == state.step
        and ours.keys() == theirs.keys()
        and all(
            ours[name].dtype == leaf.dtype and ours[name].tobytes() == np.asarray(leaf).tobytes()
            for name, leaf in theirs.items()
        )
    )


def read_last(checkpoints: Checkpoints) -> Checkpoint:
    """Reads the last checkpoint, which must be there."""
    checkpoint = checkpoints.last()
    assert checkpoint is not None
    return checkpoint


def list_steps(folder: Path) -> list[int]:
    """Lists the steps of the checkpoints in a folder."""
    return sorted(int(path.name) for path in folder.iterdir())


def save_all(folder: Path, *steps: tuple[int, float | None]) -> None:
    """Saves a state for each (step, validation error)."""
    with Checkpoints(folder) as checkpoints:
        for step, error in steps:
            checkpoints.save(make_state(step), NOTES, error)
