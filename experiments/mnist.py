"""CapsNet on MNIST, or on any other images: train it, test it, draw what it learnt.

python experiments/mnist.py --routings 3
python experiments/mnist.py --resume runs/mnist-20260101-120000
python experiments/mnist.py --testing --weights runs/mnist-20260101-120000
python experiments/mnist.py --data-dir my_images --validation 500
"""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import machine
import processes
import start
from capsjax import weights
from capsjax.checkpoint import CheckpointError
from capsjax.presets import PRESETS, Preset
from capsjax.train import TrainState, merge
from loop import Diverged, Figures, Runner
from pictures import write_pictures
from plan import make_plan
from run_folder import read_rows
from settings import Settings, parse, refusals


def main(args: Sequence[str] | None = None, presets: Mapping[str, Preset] = PRESETS) -> None:
    """Does what the command line says; `presets` may hold other recipes under the same names."""
    machine.prepare()
    settings = parse(args, presets)
    with refusals():
        processes.join(settings.processes, testing=settings.run.testing)
    with processes.end_together():
        run_experiment(settings, presets)


def run_experiment(settings: Settings, presets: Mapping[str, Preset]) -> None:
    """Trains or tests, and leaves pictures."""
    with contextlib.ExitStack() as held:
        with refusals():
            plan, state = make_plan(settings, presets[settings.recipe.preset])
            runner = Runner(plan)
            folder, state, notes = start.open_run(plan, state, held)
        print(f"run       {folder}", flush=True)
        try:
            test = finish(runner, folder, state, notes)
        except (Diverged, CheckpointError, OSError) as error:
            print(f"error: {error}; what was saved before is kept in {folder}", file=sys.stderr)
            raise SystemExit(1) from error
    print(f"test error: {test.error:.2f} % ({test.wrong} of {test.examples})")


def finish(runner: Runner, folder: Path, state: TrainState, notes: dict[str, Any]) -> Figures:
    """Trains from a state to the last epoch, or only tests it, and leaves weights and pictures."""
    plan, run = runner.plan, runner.plan.settings.run
    if run.testing:
        test = runner.evaluate(state)
        print(f"test loss: {test.loss(plan.recipe.lam_recon):.6f}")
    else:
        state, test = runner.train(folder, state, notes)
    if jax.process_index() > 0:
        return test
    # Arrays of this process alone: the others do not take part in what is computed with them.
    model, data = merge(plan.recipe.graphdef, jax.device_get(state.params)), plan.dataset
    if not run.testing:
        weights.save(model, folder / "weights.safetensors")
    rows = read_rows(run.weights if run.testing and run.weights else folder)
    write_pictures(folder, model, data.x_test, data.y_test, test.classes, data.class_names, rows)
    return test


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before the first step or after the last
        raise SystemExit(130) from None
