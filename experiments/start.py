"""Where a run starts: in a new folder, from another run's weights, or where it stopped."""

import contextlib
import json
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

import run_folder
from capsjax import sharding, weights
from capsjax._trees import fill, named_leaves
from capsjax.checkpoint import Checkpoint, Checkpoints
from capsjax.train import TrainState, merge
from plan import Plan
from settings import in_common, to_json


def open_run(
    plan: Plan, state: TrainState, held: contextlib.ExitStack
) -> tuple[Path, TrainState, dict[str, Any]]:
    """Finds or makes the folder of the run, and keeps other processes out of it.

    Of several processes that train together, the first writes.

    Args:
      plan: of the run.
      state: its first values, or those of the file it starts from.
      held: until it is left, no other process gets into the folder.

    Returns:
      The folder, the state to start from, and the notes of the checkpoint it came from.

    Raises:
      ValueError: in words, if there is no such run, its network is another one, the new folder
        holds a run already, or another process is in it.
      OSError: if the folder cannot be written.
    """
    sharding.agree("settings", zlib.crc32(json.dumps(in_common(plan.settings)).encode()))
    sharding.agree("images", plan.fingerprint)
    run, first = plan.settings.run, jax.process_index() == 0
    notes: dict[str, Any] = {}
    if run.weights is not None and not run.weights.is_file():
        state = _load_weights(run.weights, state)
    again = run.resume or (run.weights if run.testing and run.save_dir is None else None)
    if again is not None and not again.is_file():
        run_folder.read_config(again)
        folder = again
    else:
        folder = run.save_dir or run_folder.named_after(plan.settings.images.dataset)
        if first:
            run_folder.create(folder)
    if first:
        held.enter_context(run_folder.held(folder))
    if run.resume is not None:
        state, notes = _resume(folder, plan, state)
    elif first and folder != again:
        run_folder.refuse_a_run(folder)
        if not run.testing:
            _begin(folder, plan, state)
    if jax.process_count() > 1:  # and none goes on before the folder is ready
        sharding.agree("weights", _checksum(state))
    return folder, state, notes


def checkpoints(folder: Path) -> Checkpoints:
    """The checkpoints of a run."""
    return Checkpoints(folder / "checkpoints")


def _checksum(state: TrainState) -> int:
    crc = 0
    for _, leaf in named_leaves(state):
        crc = zlib.crc32(np.asarray(leaf).tobytes(), crc)
    return crc


def _begin(folder: Path, plan: Plan, state: TrainState) -> None:
    """Writes what a new run is; config.json last, for with it the folder is a run."""
    if plan.settings.run.weights is not None:
        weights.save(merge(plan.recipe.graphdef, state.params), folder / run_folder.START)
    else:
        (folder / run_folder.START).unlink(missing_ok=True)  # of a run that did not get this far
    config = {
        "settings": to_json(plan.settings),
        **run_folder.provenance(),
        "data": {"source": plan.dataset.source, "crc32": plan.fingerprint},
        "steps_per_epoch": plan.steps,
    }
    run_folder.write_config(folder, config)


def _resume(folder: Path, plan: Plan, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    config = run_folder.read_config(folder)
    if config["data"]["crc32"] != plan.fingerprint:
        raise ValueError(f"{folder} was trained on other images than {plan.dataset.source}")
    run_folder.read_rows(folder)  # refused now, not after an epoch
    with checkpoints(folder) as saved:
        checkpoint = saved.last()
    epochs, notes = plan.settings.recipe.epochs, {}
    if checkpoint is not None:
        _report(checkpoint)
        print(f"resume    step {checkpoint.step} of {epochs * plan.steps}")
        state, notes = fill(state, checkpoint.arrays), checkpoint.notes
    else:
        print("resume    no checkpoint yet: from the start")
    if config["settings"]["recipe"]["epochs"] != epochs and jax.process_index() == 0:
        config["settings"]["recipe"]["epochs"] = epochs
        run_folder.write_config(folder, config)
    return state, notes


def _report(checkpoint: Checkpoint) -> None:
    for step in checkpoint.unsound:
        print(f"the checkpoint of step {step} is damaged and was passed over")


def _load_weights(folder: Path, state: TrainState) -> TrainState:
    """Takes the parameters of another run: its best on validation images, or else its last."""
    run_folder.read_config(folder)
    if not (folder / "checkpoints").is_dir():  # to open them would make the folder
        raise ValueError(f"{folder} holds no weights: it ended before its first checkpoint")
    with checkpoints(folder) as saved:
        checkpoint = saved.best()
    _report(checkpoint)
    return state._replace(params=fill(state.params, checkpoint.arrays, "params."))
