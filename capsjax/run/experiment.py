"""What an experiment is: the values that its script gives to the harness."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from capsjax.data import Dataset
from capsjax.presets import PRESETS, Preset, Training
from capsjax.run.settings import Images, Recipe, Settings
from capsjax.tasks import Classification, Task


def make_classification(training: Training, options: Any = None) -> Classification:
    """Makes the task of images of one class each, whatever the options."""
    assert training.lam_recon is not None  # the preset gives it where the user does not
    return Classification(
        lam_recon=training.lam_recon,
        shift_pixels=training.shift_pixels,
        rotation=training.rotation,
        shear=training.shear,
        zoom=training.zoom,
        elastic=training.elastic,
        loss=training.loss,
        margin_steps=training.margin_steps,
    )


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The values of an experiment.

    Attributes:
      description: the first lines of its `--help`.
      presets: recipes by name; the first is the default.
      make_task: makes the task from the hyper-parameters and, where there are any, the options.
      dataset: the data set that is loaded unless another is named.
      validation: the training images held out for validation unless another number is given.
      prepare: changes the data set once it is loaded, where there is something to change:
        prepare(dataset, the held-out training images' indices, options) -> dataset.
      options: a frozen dataclass of this experiment's own settings; each of its fields becomes a
        flag, whose help is the field's docstring.
      draw: draws pictures in place of those of a classification:
        draw(folder, model, task, dataset, rows of metrics.csv).
    """

    description: str = "Train a capsule network, test it, and draw what it learnt."
    presets: Mapping[str, Preset] = dataclasses.field(default_factory=lambda: PRESETS)
    make_task: Callable[..., Task] = make_classification
    dataset: str = "mnist"
    validation: int = 0
    prepare: Callable[[Dataset, np.ndarray, Any], Dataset] | None = None
    options: Any = None
    draw: Callable[..., None] | None = None

    def settings(self, preset: str | None = None) -> Settings:
        """Returns the settings of a preset, the default one if none is named."""
        name = preset or next(iter(self.presets))
        recipe, images = Recipe(name), Images(dataset=self.dataset, validation=self.validation)
        return Settings(recipe, self.presets[name].training, images, options=self.options)

    def task(self, training: Training, options: Any) -> Task:
        """Makes the task of hyper-parameters and options."""
        return self.make_task(training, *(() if options is None else (options,)))
