"""CapsNet on MNIST, or on any other images: train it, test it, draw what it learnt.

python experiments/mnist.py --routings 3
python experiments/mnist.py --resume runs/mnist-20260101-120000
python experiments/mnist.py --testing --weights runs/mnist-20260101-120000
python experiments/mnist.py --data-dir my_images --validation 500
"""

import sys
from collections.abc import Mapping, Sequence

import machine
import start
from capsjax import weights
from capsjax.checkpoint import CheckpointError
from capsjax.presets import PRESETS, Preset
from capsjax.train import merge
from loop import Diverged, Runner
from pictures import write_pictures
from plan import make_plan
from run_folder import read_rows
from settings import parse, refusals


def main(args: Sequence[str] | None = None, presets: Mapping[str, Preset] = PRESETS) -> None:
    """Does what the command line says; `presets` may hold other recipes under the same names."""
    machine.prepare()
    settings = parse(args, presets)
    with refusals():
        plan, state = make_plan(settings, presets[settings.recipe.preset])
        runner = Runner(plan)
        folder, state, notes = start.open_run(plan, state)
    print(f"run       {folder}", flush=True)

    if settings.run.testing:
        test = runner.evaluate(state.params)
        print(f"test loss: {test.loss(plan.recipe.lam_recon):.6f}")
    else:
        try:
            state, test = runner.train(folder, state, notes)
            weights.save(merge(plan.recipe.graphdef, state.params), folder / "weights.safetensors")
        except (Diverged, CheckpointError, OSError) as error:
            print(f"error: {error}; what was saved before is kept in {folder}", file=sys.stderr)
            raise SystemExit(1) from error
    model = merge(plan.recipe.graphdef, state.params)
    data = plan.dataset
    rows = read_rows(settings.run.weights or folder if settings.run.testing else folder)
    write_pictures(folder, model, data.x_test, data.y_test, test.classes, data.class_names, rows)
    print(f"test error: {test.error:.2f} % ({test.wrong} of {test.examples})")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before the first step or after the last
        raise SystemExit(130) from None
