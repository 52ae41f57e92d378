"""What an experiment is: the values that its script gives to the harness."""

import dataclasses
from collections.abc import Callable, Mapping

from capsjax.presets import PRESETS, Preset, Training
from capsjax.run.settings import Images, Recipe, Settings
from capsjax.tasks import Classification, Task


def make_classification(training: Training) -> Classification:
    """Makes the task of images of one class each."""
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
      make_task: makes the task from the hyper-parameters.
      dataset: the data set that is loaded unless another is named.
    """

    description: str = "Train a capsule network, test it, and draw what it learnt."
    presets: Mapping[str, Preset] = dataclasses.field(default_factory=lambda: PRESETS)
    make_task: Callable[[Training], Task] = make_classification
    dataset: str = "mnist"

    def settings(self, preset: str | None = None) -> Settings:
        """Returns the settings of a preset, the default one if none is named."""
        name = preset or next(iter(self.presets))
        return Settings(Recipe(name), self.presets[name].training, Images(dataset=self.dataset))
