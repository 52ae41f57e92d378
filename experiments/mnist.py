"""CapsNet on MNIST, or on any other images: train, test, and draw what it learnt.

    python experiments/mnist.py --routings 3
    python experiments/mnist.py --testing --weights runs/mnist-20260101-120000
    python experiments/mnist.py --data-dir my_images --validation 500
"""

import dataclasses
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import machine
import run_folder
from capsjax import data, sharding
from capsjax.checkpoint import Checkpoint, Checkpoints, fill
from capsjax.nn import CapsNet
from capsjax.presets import PRESETS, Preset
from capsjax.train import Recipe, TrainState, create, merge
from loop import Diverged, Evaluation, Plan, Runner
from pictures import write_pictures
from settings import Settings, parse, refusals, to_json


def main(args: Sequence[str] | None = None, presets: Mapping[str, Preset] = PRESETS) -> None:
    """Runs the command line; `presets` may hold other recipes under the same names."""
    machine.prepare()
    settings = parse(args, presets)
    with refusals():
        settings, plan, state = plan_run(settings, presets[settings.preset])
        runner = Runner(plan)
        folder, state, notes = open_run(settings, plan, state)
        print(f"run       {folder}")
    test = None
    if not settings.testing:
        state, test = train(runner, folder, state, notes, settings)
    if test is None:
        test = runner.evaluate(state.params)
    draw(folder, plan, state, test)
    if settings.testing:
        loss = test.margin + plan.recipe.lam_recon * test.reconstruction
        print(f"test loss: {loss:.6f}")
    print(f"test error: {test.error:.2f} % ({test.wrong} of {test.examples})")


def plan_run(settings: Settings, preset: Preset) -> tuple[Settings, Plan, TrainState]:
    """Fixes everything before the first step, and says it; no file is written yet."""
    name, folder = settings.dataset, settings.data_dir
    dataset = data.load(name, folder, download=settings.download)
    print(f"data      {dataset.source}")
    height, width, channels = shape = dataset.image_shape
    if settings.shift_pixels >= min(height, width):
        raise ValueError(
            f"--shift-pixels {settings.shift_pixels} moves images of {height}×{width} out of sight"
        )
    train_indices, validation_indices = split(len(dataset.y_train), settings)
    mesh = sharding.make_mesh(settings.batch_size, settings.devices)
    print(f"devices   {mesh.size} of {jax.device_count()} × {jax.devices()[0].device_kind}")

    settings = dataclasses.replace(
        settings,
        lam_recon=pick(settings.lam_recon, preset.recon_per_pixel * height * width * channels),
        lr_decay=pick(settings.lr_decay, (preset.lr_total_decay or 1) ** (1 / settings.epochs)),
    )
    schedule = optax.exponential_decay(
        settings.lr,
        len(train_indices) // settings.batch_size,
        settings.lr_decay,
        staircase=preset.lr_staircase,
        end_value=preset.lr_floor,
    )
    model = CapsNet(
        shape,
        len(dataset.class_names),
        settings.routings,
        **dataclasses.asdict(preset.model),
        rngs=nnx.Rngs(settings.seed),
    )
    optimizer = optax.adam(schedule)
    graphdef, state = create(model, optimizer)
    print(f"network   {sum(leaf.size for leaf in jax.tree.leaves(state.params)):,} parameters")
    recipe = Recipe(
        graphdef, optimizer, settings.lam_recon, settings.shift_pixels, settings.precision
    )
    plan = Plan(
        recipe,
        schedule,
        mesh,
        dataset,
        train_indices,
        validation_indices,
        settings.batch_size,
        settings.epochs,
        settings.seed,
        settings.checkpoint_steps,
    )
    return settings, plan, state


def pick(given: Any, otherwise: Any) -> Any:
    """What the user gave, or else what follows from the preset."""
    return otherwise if given is None else given


def split(images: int, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Draws the validation images, then the training images, from `images` of them.

    At random, since folders of images come sorted by class.
    """
    left = images - settings.validation
    if left < 1:
        raise ValueError(f"--validation {settings.validation}: there are {images} training images")
    if pick(settings.train_size, 1) > left:
        raise ValueError(f"--train-size {settings.train_size}: there are {left} training images")
    order = np.random.default_rng(settings.seed).permutation(images).astype(np.int32)
    train = np.sort(order[settings.validation :][: settings.train_size])
    if len(train) < settings.batch_size:
        raise ValueError(
            f"--batch-size {settings.batch_size}: there are {len(train)} images to train on"
        )
    return train, np.sort(order[: settings.validation])


def open_run(
    settings: Settings, plan: Plan, state: TrainState
) -> tuple[Path, TrainState, dict[str, Any]]:
    """Finds or makes the run's folder, and the state and notes to start from."""
    if settings.resume is not None:
        return resume(settings, settings.resume, plan, state)
    if settings.weights is not None:
        checkpoint = best_checkpoint(settings.weights)
        if checkpoint is None:
            raise ValueError(f"{settings.weights} holds no weights: it was stopped before its first")
        state = state._replace(params=fill(state.params, checkpoint.arrays, "params."))
    if settings.testing and settings.save_dir is None:
        assert settings.weights is not None
        return settings.weights, state, {}
    folder = run_folder.create(settings.save_dir, settings.dataset)
    if not settings.testing:
        run_folder.write_config(
            folder,
            {
                "settings": to_json(settings),
                **run_folder.provenance(),
                "data": {"source": plan.dataset.source, "crc32": fingerprint(plan.dataset)},
                "steps_per_epoch": plan.steps,
            },
        )
    return folder, state, {}


def resume(
    settings: Settings, folder: Path, plan: Plan, state: TrainState
) -> tuple[Path, TrainState, dict[str, Any]]:
    """Takes up a run where its last checkpoint left it; with none yet, at step 0."""
    config = run_folder.read_config(folder)
    if config["data"]["crc32"] != fingerprint(plan.dataset):
        raise ValueError(f"{folder} was trained on other images than {plan.dataset.source}")
    if config["settings"]["epochs"] != settings.epochs:
        config["settings"]["epochs"] = settings.epochs
        run_folder.write_config(folder, config)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoint = checkpoints.last()
    if checkpoint is None:
        if config["settings"]["weights"] is not None:
            start = best_checkpoint(Path(config["settings"]["weights"]))
            state = state._replace(params=fill(state.params, start.arrays, "params."))
        return folder, state, {}
    for step in checkpoint.unsound:
        print(f"the checkpoint of step {step} is damaged and was passed over")
    print(f"resume    step {checkpoint.step}")
    return folder, fill(state, checkpoint.arrays), checkpoint.notes


def best_checkpoint(folder: Path) -> Checkpoint | None:
    """The weights that a run ended with, or has so far."""
    run_folder.read_config(folder)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return checkpoints.best()


def fingerprint(dataset: data.Dataset) -> int:
    """Tells other images from the same ones."""
    return zlib.crc32(dataset.y_train.tobytes(), zlib.crc32(dataset.x_train))


def train(
    runner: Runner, folder: Path, state: TrainState, notes: dict[str, Any], settings: Settings
) -> tuple[TrainState, Evaluation | None]:
    """Trains; returns the last state, or the best on the validation images if there are any."""
    with Checkpoints(folder / "checkpoints") as checkpoints:
        try:
            state, test = runner.train(folder, state, notes, checkpoints)
        except Diverged as error:
            print(
                f"error: {error}. The last good checkpoint is kept in {folder / 'checkpoints'}; "
                f"a smaller --lr than {settings.lr} may help",
                file=sys.stderr,
            )
            raise SystemExit(1) from error
        if settings.validation:
            checkpoints.wait()
            best = checkpoints.best()
            print(f"best on the validation images: epoch {best.step // runner.plan.steps}")
            return fill(state, best.arrays), None
    return state, test


def draw(folder: Path, plan: Plan, state: TrainState, test: Evaluation) -> None:
    """Writes the four pictures into the run's folder."""
    write_pictures(
        folder,
        merge(plan.recipe.graphdef, state.params),
        plan.dataset.x_test,
        plan.dataset.y_test,
        test.classes,
        plan.dataset.class_names,
        run_folder.read_rows(folder),
    )


if __name__ == "__main__":
    main()
