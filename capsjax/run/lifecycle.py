"""A run from its settings to its result, as a value and from the command line."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from capsjax import weights
from capsjax.checkpoint import CheckpointError
from capsjax.run import machine, processes
from capsjax.run.command_line import parse, refusals
from capsjax.run.experiment import Experiment
from capsjax.run.folder import (
    FINAL_WEIGHTS,
    describe_provenance,
    holds_run,
    read_rows,
    refuse_run,
    write_test,
)
from capsjax.run.loop import Diverged, Runner
from capsjax.run.metrics import Metrics
from capsjax.run.opening import Opened, open_run
from capsjax.run.pictures import write_pictures
from capsjax.run.plan import make_plan
from capsjax.run.settings import Settings
from capsjax.tasks import batch_shape
from capsjax.train import TrainState, merge


class Result(NamedTuple):
    """What a run ends with."""

    folder: Path
    test: Metrics  # of the last epoch, or the best on the validation images if there are any


def run(experiment: Experiment, settings: Settings) -> Result:
    """Trains, or tests; what is already in the run's folder is continued or found finished.

    The same settings in the same `save_dir` give the same result again without training again, so
    an ablation is a loop over settings that may be stopped and started anew.

    Args:
      experiment: its presets and task.
      settings: of the run.

    Returns:
      The `Result`.

    Raises:
      ValueError: if the settings do not fit the images, the devices or the run in the folder.
      Diverged: if something is no longer finite.
      OSError: if the folder cannot be written.
      SystemExit: after SIGINT or SIGTERM and a checkpoint.
    """
    with contextlib.ExitStack() as stack:
        runner, opened = prepare(experiment, settings, stack)
        return finish(experiment, runner, opened)


def main(experiment: Experiment, args: Sequence[str] | None = None) -> None:
    """Does what the command line says."""
    try:
        machine.configure()
        settings = parse(args, experiment)
        with refusals():
            processes.join(settings.processes, testing=settings.run.testing)
        with processes.end_together(), contextlib.ExitStack() as stack:
            with refusals():
                _refuse_used_folder(settings)
                runner, opened = prepare(experiment, settings, stack)
            with failures(opened.folder):
                test = finish(experiment, runner, opened).test
            print(f"test error: {test.error:.2f} % ({test.wrong} of {test.examples})")
    except KeyboardInterrupt:  # before the first step or after the last
        raise SystemExit(130) from None


def _refuse_used_folder(settings: Settings) -> None:
    """Raises ValueError, in all processes, if a new run is to begin in a folder that holds one."""
    folder = settings.run.save_dir
    if folder is not None and settings.run.resume is None:
        processes.agree("folders", int(holds_run(folder)))
        refuse_run(folder)


@contextlib.contextmanager
def failures(folder: Path) -> Iterator[None]:
    """Turns the failure of a run that has begun into one message and exit status 1."""
    try:
        yield
    except (Diverged, CheckpointError, OSError) as error:
        print(f"error: {error}; what was saved before is kept in {folder}", file=sys.stderr)
        raise SystemExit(1) from error


def prepare(
    experiment: Experiment, settings: Settings, stack: contextlib.ExitStack
) -> tuple[Runner, Opened]:
    """Makes a run ready for its first step; its folder is locked until the stack is left."""
    plan, state = make_plan(settings, experiment)
    runner = Runner(plan)
    opened = open_run(plan, state, stack)
    print(f"run       {opened.folder}", flush=True)
    return runner, opened


def finish(experiment: Experiment, runner: Runner, opened: Opened) -> Result:
    """Trains to the last epoch, or only tests, and leaves weights and pictures."""
    run, folder = runner.plan.settings.run, opened.folder
    if run.testing:
        state = opened.state
        test, predicted = runner.evaluate(state)
        print(f"test loss: {test.loss:.6f}")
    else:
        state, test, predicted = runner.train(folder, opened.state, opened.notes)
    if jax.process_index() == 0:
        _leave(experiment, runner, folder, state, test, predicted)
    return Result(folder, test)


def _leave(
    experiment: Experiment,
    runner: Runner,
    folder: Path,
    state: TrainState,
    test: Metrics,
    predicted: np.ndarray,
) -> None:
    """Writes weights and pictures."""
    plan = runner.plan
    run, data = plan.settings.run, plan.dataset
    # Arrays of this process alone, because the others do not take part in the computations here.
    model = merge(plan.setup.graphdef, jax.device_get(state))
    if run.testing:
        write_test(folder, [path.name for path in run.weights], data.source, test)
    else:
        notes = {
            "preset": plan.settings.recipe.preset,
            "test_error": round(test.error, 4),
            "commit": describe_provenance()["git"],
            "class_names": data.class_names,
        }
        weights.save(model, folder / FINAL_WEIGHTS, notes)
    tested = run.weights_folder if run.testing else None
    rows = read_rows(tested or folder, plan.columns)
    if experiment.draw is not None:
        experiment.draw(folder, model, plan.setup.task, data, rows)
        return
    x_test = _show_test_images(runner)
    write_pictures(folder, model, x_test, data.y_test, predicted, data.class_names, rows)


def _show_test_images(runner: Runner) -> np.ndarray:
    """Returns the test images as the task makes them, uint8 [N, H, W, C]."""
    data, task = runner.plan.dataset, runner.plan.setup.task
    if batch_shape(task, data.x_test, data.y_test) == data.image_shape:
        return data.x_test
    images, labels = jnp.asarray(data.x_test), jnp.asarray(data.y_test)
    batch = task.test_batch(images, labels, np.arange(len(data.y_test)))
    return np.rint(255 * np.asarray(batch.images)).astype(np.uint8)
