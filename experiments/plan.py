"""All that a run fixes before its first step."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from capsjax import data, sharding, weights
from capsjax.nn import CapsNet
from capsjax.presets import Preset
from capsjax.train import Recipe, TrainState, create
from settings import Images, Settings
from settings import Recipe as Flags


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static parts, images, and the sizes that the loop runs over."""

    settings: Settings  # with the numbers in place of None that follow from preset and images
    recipe: Recipe
    schedule: Callable[[int], Any]  # step -> learning rate
    mesh: jax.sharding.Mesh
    dataset: data.Dataset
    train_indices: np.ndarray  # int32, into x_train
    validation_indices: np.ndarray
    steps: int  # an epoch; a last, smaller batch is dropped

    def epoch_order(self, epoch: int) -> np.ndarray:
        """The batches of an epoch, int32 [steps, batch]: the same for a seed, also resumed."""
        recipe = self.settings.recipe
        order = np.random.default_rng((recipe.seed, epoch)).permutation(self.train_indices)
        return order[: self.steps * recipe.batch_size].reshape(self.steps, recipe.batch_size)

    @functools.cached_property
    def fingerprint(self) -> int:
        """Tells other images from the same ones."""
        data = self.dataset
        crc = 0
        for array in (data.x_train, data.y_train, data.x_test, data.y_test):
            crc = zlib.crc32(array.tobytes(), crc)
        return crc


def make_plan(settings: Settings, preset: Preset) -> tuple[Plan, TrainState]:
    """Loads the images, draws the first parameters, and prints what there is; writes nothing.

    Raises:
      ValueError: in words, if the settings do not fit the images or the devices.
    """
    dataset, train_indices, validation_indices = _load(settings)
    steps = len(train_indices) // settings.recipe.batch_size
    if not steps:
        raise ValueError(
            f"--batch-size {settings.recipe.batch_size}: there are {len(train_indices)} images to "
            "train on"
        )
    mesh = sharding.make_mesh(settings.recipe.batch_size, settings.run.devices)
    print(f"devices   {mesh.size} of {jax.device_count()} × {jax.devices()[0].device_kind}")
    lam_recon, lr_decay = _rates(settings.recipe, preset, dataset)
    recipe = dataclasses.replace(settings.recipe, lam_recon=lam_recon, lr_decay=lr_decay)
    # optax takes the end of a rate that does not decay for its ceiling.
    floor = min(preset.lr_floor, recipe.lr) if lr_decay < 1 else None
    schedule = optax.exponential_decay(
        recipe.lr, steps, lr_decay, staircase=preset.lr_staircase, end_value=floor
    )
    optimizer, file = optax.adam(schedule), settings.run.network
    if file is None:
        # One compilation instead of one for each kind of array.
        graphdef, state = jax.jit(lambda: create(_draw(recipe, preset, dataset), optimizer))()
    else:
        graphdef, state = create(_read(file, dataset, recipe.routings), optimizer)
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(f"network   {size:,} parameters" + (f" of {file}" if file else ""))
    static = Recipe(graphdef, optimizer, lam_recon, recipe.shift_pixels, recipe.precision)
    plan = Plan(
        dataclasses.replace(settings, recipe=recipe),
        static,
        schedule,
        mesh,
        dataset,
        train_indices,
        validation_indices,
        steps,
    )
    return plan, state


def _load(settings: Settings) -> tuple[data.Dataset, np.ndarray, np.ndarray]:
    """The images, and which of the training images are trained on and which held out."""
    images, recipe = settings.images, settings.recipe
    dataset = data.load(images.dataset, images.data_dir, download=images.download)
    height, width, channels = dataset.image_shape
    print(f"data      {dataset.source}")
    print(
        f"          {len(dataset.y_train):,} training and {len(dataset.y_test):,} test images of "
        f"{height}×{width}×{channels} in {len(dataset.class_names)} classes"
    )
    if recipe.shift_pixels >= min(height, width):
        raise ValueError(
            f"--shift-pixels {recipe.shift_pixels} would move images of {height}×{width} pixels "
            "out of sight"
        )
    train, held_out = _split(len(dataset.y_train), images, recipe.seed)
    if images.train_size or images.validation:  # the devices hold only what is used
        used = np.concatenate([train, held_out])
        dataset = dataclasses.replace(
            dataset, x_train=dataset.x_train[used], y_train=dataset.y_train[used]
        )
    numbers = np.arange(len(train) + len(held_out), dtype=np.int32)
    train, held_out = np.split(numbers, [len(train)])
    return dataset, train, held_out


def _rates(flags: Flags, preset: Preset, dataset: data.Dataset) -> tuple[float, float]:
    """The weight of the reconstruction and the decay of the learning rate, by flag or preset."""
    per_image = preset.recon_per_pixel * math.prod(dataset.image_shape)
    per_epoch = (preset.lr_total_decay or 1) ** (1 / flags.epochs)
    lam_recon = per_image if flags.lam_recon is None else flags.lam_recon
    lr_decay = per_epoch if flags.lr_decay is None else flags.lr_decay
    return lam_recon, lr_decay


def _draw(flags: Flags, preset: Preset, dataset: data.Dataset) -> CapsNet:
    """A new network for these images."""
    return CapsNet(
        dataset.image_shape,
        len(dataset.class_names),
        flags.routings,
        **dataclasses.asdict(preset.model),
        rngs=nnx.Rngs(flags.seed),
    )


def _read(file: Path, dataset: data.Dataset, routings: int) -> CapsNet:
    """The network of a file, if it is one for these images."""
    model = weights.load(file, image_shape=dataset.image_shape, routings=routings)
    theirs, ours = (
        (model.image_shape, model.classes.weight.shape[0]),
        (dataset.image_shape, len(dataset.class_names)),
    )
    if theirs != ours:
        raise ValueError(
            f"the network of {file} takes images {list(theirs[0])} in {theirs[1]} classes; these "
            f"are {list(ours[0])} in {ours[1]}"
        )
    return model


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
