"""Where a run starts: in a new folder, from another run's weights, or where it stopped."""

import contextlib
import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from capsjax import weights
from capsjax._trees import fill, named_leaves
from capsjax.checkpoint import Checkpoint, Checkpoints
from capsjax.networks._config_json import config_to_json
from capsjax.run.folder import (
    INITIAL_WEIGHTS,
    create_folder,
    create_named_folder,
    describe_provenance,
    holds_run,
    lock_folder,
    read_config,
    read_rows,
    refuse_results,
    refuse_run,
    write_config,
)
from capsjax.run.plan import Plan
from capsjax.run.processes import agree
from capsjax.run.settings import (
    from_json,
    read_settings,
    refuse_changes,
    shared_settings,
    to_json,
)
from capsjax.tasks import batch_shape
from capsjax.train import TrainState, merge


class Opened(NamedTuple):
    """A run that is ready for its next step."""

    folder: Path
    state: TrainState
    notes: dict[str, Any]  # of the checkpoint that the state came from


def open_run(plan: Plan, state: TrainState, stack: contextlib.ExitStack) -> Opened:
    """Finds or makes the folder of the run, and keeps other processes out of it.

    A folder in which the same run was begun is continued. Where several processes train together,
    only the first writes.

    Args:
      plan: of the run.
      state: the initial one, or that of the file it starts from.
      stack: until it is left, no other process gets into the folder.

    Returns:
      The folder, the state to start from, and the notes of the checkpoint it came from.

    Raises:
      ValueError: if the folder holds a run with other settings, images or another network, or
        another process is in it.
      OSError: if the folder cannot be written.
    """
    run, first, notes = plan.settings.run, jax.process_index() == 0, dict[str, Any]()
    named = run.resume or run.save_dir or (run.weights_folder if run.testing else None)
    # Before any process gets past the next line and may begin it.
    began = named is not None and holds_run(named)
    agree("settings", zlib.crc32(json.dumps(shared_settings(plan.settings)).encode()))
    agree("images", plan.fingerprint)
    if run.resume is not None:
        read_config(run.resume)  # a run must be there
    if run.weights_folder is not None:
        state = _load_weights(run.weights_folder, state)
    folder = named or create_named_folder(plan.settings.images.dataset)
    if first:
        create_folder(folder)
        stack.enter_context(lock_folder(folder))
    if not run.testing and began:
        state, notes = _resume(folder, plan, state)
    elif first and folder != run.weights_folder:
        refuse_run(folder)
        if not run.testing:
            _begin(folder, plan, state)
    if jax.process_count() > 1:  # no process starts before the folder is ready
        agree("weights", _checksum(state))
    return Opened(folder, state, notes)


def open_checkpoints(folder: Path) -> Checkpoints:
    """Opens the checkpoints of a run."""
    return Checkpoints(folder / "checkpoints")


def _begin(folder: Path, plan: Plan, state: TrainState) -> None:
    """Writes what a new run is; config.json last, because with it the folder holds a run."""
    refuse_results(folder)
    if plan.settings.run.weights:
        weights.save(merge(plan.setup.graphdef, state), folder / INITIAL_WEIGHTS)
    else:
        (folder / INITIAL_WEIGHTS).unlink(missing_ok=True)  # of a run that did not get this far
    config = {
        "settings": to_json(plan.settings),
        "network": _describe_network(plan, state),
        "image_shape": batch_shape(plan.setup.task, plan.dataset.x_test, plan.dataset.y_test),
        "num_classes": plan.dataset.num_classes,
        **describe_provenance(),
        "data": {"source": plan.dataset.source, "crc32": plan.fingerprint},
        "steps_per_epoch": plan.steps,
    }
    write_config(folder, config)


def _resume(folder: Path, plan: Plan, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Reads the newest checkpoint; without one the run starts again from its initial state."""
    config, epochs = read_config(folder), plan.settings.training.epochs
    options = plan.settings.options
    asked = from_json(to_json(plan.settings), options)  # with absolute paths, as they were saved
    saved, run = read_settings(folder, options), asked.run
    # --resume continues with the weights that the run was begun with.
    if plan.settings.run.resume is None:
        run = dataclasses.replace(run, weights=saved.run.weights)
    refuse_changes(asked, dataclasses.replace(saved, run=run))
    if config.get("network") != (network := _describe_network(plan, state)):
        raise ValueError(
            f"{folder} holds another network: expected {config.get('network')}, got {network}"
        )
    if config["data"]["crc32"] != plan.fingerprint:
        raise ValueError(f"{folder} was trained on other images than {plan.dataset.source}")
    read_rows(folder, plan.columns)  # refused now, not after an epoch
    with open_checkpoints(folder) as checkpoints:
        checkpoint = checkpoints.last()
    notes = {}
    if checkpoint is None:
        print("resume    no checkpoint yet: from the start")
    else:
        _report_damage(checkpoint)
        print(f"resume    step {checkpoint.step} of {epochs * plan.steps}")
        state, notes = fill(state, checkpoint.arrays), checkpoint.notes
    if config["settings"]["training"]["epochs"] != epochs and jax.process_index() == 0:
        config["settings"]["training"]["epochs"] = epochs
        write_config(folder, config)
    return state, notes


def _describe_network(plan: Plan, state: TrainState) -> dict[str, Any]:
    return config_to_json(merge(plan.setup.graphdef, state).config)


def _load_weights(folder: Path, state: TrainState) -> TrainState:
    """Takes the weights of another run: its best on validation images, or else its last."""
    read_config(folder)
    if not (folder / "checkpoints").is_dir():  # to open them would make the folder
        raise ValueError(f"{folder} holds no weights: it ended before its first checkpoint")
    with open_checkpoints(folder) as checkpoints:
        checkpoint = checkpoints.best()
    _report_damage(checkpoint)
    arrays = checkpoint.arrays
    averaged = any(name.startswith("average.") for name in arrays)
    params = fill(state.params, arrays, "average." if averaged else "params.")
    return state._replace(
        params=params,
        average=jax.tree.map(jnp.array, params) if state.average else {},
        statistics=fill(state.statistics, arrays, "statistics."),
    )


def _report_damage(checkpoint: Checkpoint) -> None:
    for step in checkpoint.unsound:
        print(f"the checkpoint of step {step} is damaged and was passed over")


def _checksum(state: TrainState) -> int:
    crc = 0
    for _, leaf in named_leaves(state):
        crc = zlib.crc32(np.asarray(leaf).tobytes(), crc)
    return crc
