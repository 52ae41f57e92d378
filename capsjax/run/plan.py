"""Everything that a run fixes before its first step."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from capsjax import data, sharding, weights
from capsjax.networks import Ensemble, Network
from capsjax.networks._config_json import with_iterations, with_routing
from capsjax.presets import Preset, Training
from capsjax.run.experiment import Experiment
from capsjax.run.metrics import list_columns
from capsjax.run.settings import Images, Recipe, Settings
from capsjax.tasks import Task, batch_shape, example_batch
from capsjax.train import Setup, TrainState, create


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static parts, images, and the sizes that the loop runs over."""

    settings: Settings  # complete: numbers in place of each None that stands for one
    setup: Setup
    schedule: Callable[[int], Any]  # step -> learning rate
    mesh: jax.sharding.Mesh
    dataset: data.Dataset
    train_indices: np.ndarray  # int32, into x_train
    validation_indices: np.ndarray
    steps: int  # an epoch; a last, smaller batch is dropped
    columns: tuple[str, ...]  # of metrics.csv

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Returns the batches of an epoch, int32 [steps, batch]; a seed always gives the same."""
        seed, batch_size = self.settings.recipe.seed, self.settings.training.batch_size
        order = np.random.default_rng((seed, epoch)).permutation(self.train_indices)
        return order[: self.steps * batch_size].reshape(self.steps, batch_size)

    @functools.cached_property
    def fingerprint(self) -> int:
        """CRC-32 of all images and labels."""
        data = self.dataset
        crc = 0
        for array in (data.x_train, data.y_train, data.x_test, data.y_test):
            crc = zlib.crc32(array.tobytes(), crc)
        return crc


def make_plan(settings: Settings, experiment: Experiment) -> tuple[Plan, TrainState]:
    """Loads the images, draws the initial weights, and prints what there is; writes nothing.

    Raises:
      ValueError: if the settings do not fit the images or the devices.
    """
    preset = _find_preset(settings.recipe.preset, experiment)
    dataset, train_indices, validation_indices = _load(settings, experiment)
    batch_size = settings.training.batch_size
    steps = len(train_indices) // batch_size
    if not steps:
        if not settings.run.testing:
            raise ValueError(
                f"--batch-size {batch_size}: there are {len(train_indices)} images to train on"
            )
        steps = 1  # a test takes none, but the schedule needs one
    mesh = sharding.make_mesh(batch_size, settings.run.devices)
    print(f"devices   {mesh.size} of {jax.device_count()} × {jax.devices()[0].device_kind}")
    training, task = _make_task(settings, preset, experiment, dataset)
    settings = dataclasses.replace(settings, training=training)
    optimizer = preset.optimizer(training, steps)
    graphdef, state = _make_state(settings, preset, task, optimizer, dataset)
    setup = Setup(graphdef, optimizer, task, settings.recipe.precision, training.average)
    plan = Plan(
        settings=settings,
        setup=setup,
        schedule=preset.schedule(training, steps),
        mesh=mesh,
        dataset=dataset,
        train_indices=train_indices,
        validation_indices=validation_indices,
        steps=steps,
        columns=list_columns(state.sums.losses),
    )
    return plan, state


def _find_preset(name: str, experiment: Experiment) -> Preset:
    if name not in experiment.presets:  # told by the folder of another experiment's run
        raise ValueError(
            f"there is no preset {name!r} here, only {', '.join(experiment.presets)}: use the "
            "experiment that began the run"
        )
    return experiment.presets[name]


def _make_task(
    settings: Settings, preset: Preset, experiment: Experiment, dataset: data.Dataset
) -> tuple[Training, Task]:
    """Makes the task, and completes the hyper-parameters for the images that it makes."""
    training, options = settings.training, settings.options
    task = experiment.task(preset.complete(training, dataset.image_shape), options)
    shape = batch_shape(task, dataset.x_test, dataset.y_test)
    training = preset.complete(training, shape)
    return training, experiment.task(training, options)


def _load(
    settings: Settings, experiment: Experiment
) -> tuple[data.Dataset, np.ndarray, np.ndarray]:
    """Loads the images; returns also which of them are trained on and which held out."""
    images = settings.images
    dataset = data.load(images.dataset, images.data_dir, download=images.download)
    if dataset.num_classes < 2:
        raise data.DataError(
            f"{dataset.source}: expected two classes or more, got only {dataset.class_names[0]!r}"
        )
    dataset, train, held_out = _select(dataset, images, settings.recipe.seed)
    if experiment.prepare is not None:
        dataset = experiment.prepare(dataset, held_out, settings.options)
    height, width, channels = dataset.image_shape
    print(f"data      {dataset.source}")
    print(
        f"          {len(train):,} training"
        + (f", {len(held_out):,} validation" if len(held_out) else "")
        + f" and {len(dataset.y_test):,} test images of {height}×{width}×{channels} in "
        f"{dataset.num_classes} classes"
    )
    if settings.training.target is not None and not len(held_out):
        raise ValueError("--target is reached on validation images: add --validation")
    for flag in ("shift_pixels", "elastic"):
        if (pixels := getattr(settings.training, flag)) >= min(height, width):
            raise ValueError(
                f"--{flag.replace('_', '-')} {pixels} would move images of {height}×{width} pixels "
                "out of sight"
            )
    return dataset, train, held_out


def _select(
    dataset: data.Dataset, images: Images, seed: int
) -> tuple[data.Dataset, np.ndarray, np.ndarray]:
    """Keeps the training images that are used; returns also which to train on and to hold out."""
    train, held_out = _split(len(dataset.y_train), images, seed)
    if images.train_size or images.validation:  # the devices hold only what is used
        used = np.concatenate([train, held_out])
        dataset = dataclasses.replace(
            dataset, x_train=dataset.x_train[used], y_train=dataset.y_train[used]
        )
    numbers = np.arange(len(train) + len(held_out), dtype=np.int32)
    train, held_out = np.split(numbers, [len(train)])
    return dataset, train, held_out


def _split(total: int, images: Images, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws training and validation images from `total` of them.

    At random, since folders of images come sorted by class.
    """
    left = total - images.validation
    if left < 1:
        raise ValueError(f"--validation {images.validation}: there are {total} training images")
    if images.train_size is not None and images.train_size > left:
        raise ValueError(f"--train-size {images.train_size}: there are {left} training images")
    order = np.random.default_rng(seed).permutation(total).astype(np.int32)
    held_out, rest = order[: images.validation], order[images.validation :]
    return np.sort(rest[: images.train_size]), np.sort(held_out)


def _make_state(
    settings: Settings,
    preset: Preset,
    task: Task,
    optimizer: optax.GradientTransformation,
    dataset: data.Dataset,
) -> tuple[nnx.GraphDef, TrainState]:
    """Draws the initial weights, or reads them from the file that tells the network."""
    example = example_batch(task, dataset.x_test, dataset.y_test)
    image_shape = batch_shape(task, dataset.x_test, dataset.y_test)
    options: dict[str, Any] = {"average": settings.training.average, "example": example}
    files = settings.run.network_files
    if not files:

        def draw() -> tuple[nnx.GraphDef, TrainState]:
            model = _draw(settings, preset, image_shape, dataset.num_classes)
            drawn = create(model, optimizer, task, **options)
            # A step returns no weak types, so with them it would be compiled a second time.
            return jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), drawn)

        graphdef, state = jax.jit(draw)()  # one compilation instead of one for each kind of array
    else:
        members = [_read(file, settings.recipe, image_shape, dataset.num_classes) for file in files]
        model = members[0] if len(members) == 1 else Ensemble(members)
        graphdef, state = create(model, optimizer, task, **options)
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(f"network   {size:,} parameters" + (f" of {', '.join(map(str, files))}" if files else ""))
    return graphdef, state


def _draw(
    settings: Settings, preset: Preset, image_shape: tuple[int, int, int], num_classes: int
) -> Network:
    """Draws a new network for these images."""
    config, recipe = preset.network, settings.recipe
    if recipe.network not in (None, config.name):
        raise ValueError(
            f"--network {recipe.network}, but the network of --preset {recipe.preset} is "
            f"{config.name}"
        )
    if recipe.routing is not None:
        config = with_routing(config, recipe.routing)
    if recipe.routings is not None:
        config = with_iterations(config, recipe.routings)
    return config.build(image_shape, num_classes, rngs=nnx.Rngs(settings.recipe.seed))


def _read(
    file: Path, recipe: Recipe, image_shape: tuple[int, int, int], num_classes: int
) -> Network:
    """Reads the network of a file, if it is one for these images and that routing."""
    model = weights.load(file, image_shape=image_shape, routings=recipe.routings)
    if recipe.network not in (None, model.config.name):
        raise ValueError(
            f"--network {recipe.network}: the network of {file} is {model.config.name}"
        )
    if recipe.routing is not None and with_routing(model.config, recipe.routing) != model.config:
        raise ValueError(
            f"--routing {recipe.routing}: the network of {file} was trained with "
            f"{model.config.routing.name}"
        )
    if (model.image_shape, model.num_classes) != (image_shape, num_classes):
        raise ValueError(
            f"the network of {file} takes images {list(model.image_shape)} in {model.num_classes} "
            f"classes; these are {list(image_shape)} in {num_classes}"
        )
    return model
