"""Where a run starts: in a new folder, from another run's weights, or where it stopped."""

from pathlib import Path
from typing import Any

import run_folder
from capsjax._named import fill
from capsjax.checkpoint import Checkpoint, Checkpoints
from capsjax.train import TrainState
from plan import Plan
from settings import to_json


def open_run(plan: Plan, state: TrainState) -> tuple[Path, TrainState, dict[str, Any]]:
    """Finds or makes the folder of the run.

    Returns the folder, the state to start from, and the notes of the checkpoint it came from.

    Raises:
      ValueError: in words, if there is no such run, its network is another one, or the new folder
        holds a run already.
      OSError: if the folder cannot be written.
    """
    run = plan.settings.run
    if run.resume is not None:
        return _resume(run.resume, plan, state)
    if run.weights is not None:
        state = _load_weights(run.weights, state)
    if run.testing and run.save_dir is None and run.weights is not None:
        return run.weights, state, {}
    folder = run_folder.create(run.save_dir, plan.settings.images.dataset)
    if not run.testing:
        config = {
            "settings": to_json(plan.settings),
            **run_folder.provenance(),
            "data": {"source": plan.dataset.source, "crc32": plan.fingerprint()},
            "steps_per_epoch": plan.steps,
        }
        run_folder.write_config(folder, config)
    return folder, state, {}


def checkpoints(folder: Path) -> Checkpoints:
    """The checkpoints of a run."""
    return Checkpoints(folder / "checkpoints")


def _resume(folder: Path, plan: Plan, state: TrainState) -> tuple[Path, TrainState, dict[str, Any]]:
    config = run_folder.read_config(folder)
    if config["data"]["crc32"] != plan.fingerprint():
        raise ValueError(f"{folder} was trained on other images than {plan.dataset.source}")
    with checkpoints(folder) as saved:
        checkpoint = saved.last()
    epochs, weights = plan.settings.recipe.epochs, config["settings"]["run"]["weights"]
    notes = {}
    if checkpoint is not None:
        _report(checkpoint)
        print(f"resume    step {checkpoint.step} of {epochs * plan.steps}")
        state, notes = fill(state, checkpoint.arrays), checkpoint.notes
    elif weights is not None:
        state = _load_weights(Path(weights), state)
    if config["settings"]["recipe"]["epochs"] != epochs:
        config["settings"]["recipe"]["epochs"] = epochs
        run_folder.write_config(folder, config)
    return folder, state, notes


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
