"""Recipes by name: a network's sizes and how it is trained."""

import dataclasses
import math

import optax

from capsjax._routing import Agreement
from capsjax.networks import CapsNetConfig, NetworkConfig


@dataclasses.dataclass(frozen=True)
class Training:
    """How the network is trained."""

    epochs: int = 50
    """Passes over the training images."""
    batch_size: int = 100
    """Images per step, over all devices."""
    lr: float = 1e-3
    """Adam's initial learning rate."""
    lr_decay: float | None = 0.9
    """Factor on the learning rate per epoch. None: 0.96^150 over all epochs (paper)."""
    lam_recon: float | None = None
    """Weight of the reconstruction loss. None: 0.0005·H·W·C (paper: 0.01·H·W·C)."""
    shift_pixels: int = 2
    """Largest random shift of a training image in each direction, in pixels."""
    average: float | None = None
    """Decay of a moving average of the weights, which evaluation then uses. None: no average."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            check(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))
        check(self.shift_pixels >= 0, "shift_pixels", "0 or more", self.shift_pixels)
        check(0 < self.lr < math.inf, "lr", "a number above 0", self.lr)
        decay, lam, average = self.lr_decay, self.lam_recon, self.average
        check(decay is None or 0 < decay <= 1, "lr_decay", "above 0 and at most 1", decay)
        check(lam is None or 0 <= lam < math.inf, "lam_recon", "a number of 0 or more", lam)
        check(average is None or 0 < average < 1, "average", "between 0 and 1", average)


def check(holds: bool, name: str, expected: str, got: object) -> None:
    """Raises ValueError naming the flag, what was expected and what was given, unless it holds."""
    if not holds:
        raise ValueError(f"--{name.replace('_', '-')} must be {expected}, got {got}")


@dataclasses.dataclass(frozen=True)
class Preset:
    """A recipe.

    Attributes:
      network: the sizes.
      training: the hyper-parameters that the command line may change.
      recon_per_pixel: lam_recon = recon_per_pixel · H·W·C, where `training` gives none.
      lr_total_decay: factor on the learning rate over the whole run, where `training.lr_decay` is
        None.
      lr_staircase: whether the learning rate falls once an epoch instead of continuously.
      lr_floor: the learning rate falls no lower.
    """

    network: NetworkConfig
    training: Training
    recon_per_pixel: float = 0.0005
    lr_total_decay: float = 1.0
    lr_staircase: bool = True
    lr_floor: float = 0.0

    def complete(self, training: Training, image_shape: tuple[int, int, int]) -> Training:
        """Replaces each None in `training` that stands for a number by this preset's number."""
        lam_recon, lr_decay = training.lam_recon, training.lr_decay
        if lam_recon is None:
            lam_recon = self.recon_per_pixel * math.prod(image_shape)
        if lr_decay is None:
            lr_decay = self.lr_total_decay ** (1 / training.epochs)
        return dataclasses.replace(training, lam_recon=lam_recon, lr_decay=lr_decay)

    def schedule(self, training: Training, steps_per_epoch: int) -> optax.Schedule:
        """Returns the learning rate as a function of the step; `training` is complete."""
        assert training.lr_decay is not None
        # With decay 1, optax treats end_value as an upper bound, so none is passed.
        floor = min(self.lr_floor, training.lr) if training.lr_decay < 1 else None
        return optax.exponential_decay(
            training.lr,
            steps_per_epoch,
            training.lr_decay,
            staircase=self.lr_staircase,
            end_value=floor,
        )

    def optimizer(self, training: Training, steps_per_epoch: int) -> optax.GradientTransformation:
        """Returns Adam with the schedule."""
        return optax.adam(self.schedule(training, steps_per_epoch))


# XifengGuo/CapsNet-Pytorch; 0.0005·784 = 0.392.
SEED = Preset(network=CapsNetConfig(), training=Training())

# Sarasra/models, research/capsules. Its margin loss is half of the paper's and divided by the
# number of classes, so beside the paper's margin loss its reconstruction weighs 20 times 0.0005.
PAPER = Preset(
    network=CapsNetConfig(
        primary_coupling=1 / 32,
        routing=Agreement(bias=True, stop_gradient=False),
        init="truncated_normal",
    ),
    training=Training(epochs=640, batch_size=128, lr_decay=None),
    recon_per_pixel=0.01,
    lr_total_decay=0.96**150,  # 0.96 per 2,000 steps, over 300,000 steps
    lr_staircase=False,
    lr_floor=1e-6,
)

PRESETS = {"seed": SEED, "paper": PAPER}
