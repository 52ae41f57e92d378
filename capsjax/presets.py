"""Recipes by name: a network's sizes and how it is trained."""

import dataclasses
import math
from collections.abc import Callable
from numbers import Real
from typing import Any, get_args

import optax

from capsjax._losses import Loss
from capsjax._routing import EM, Agreement
from capsjax.networks import (
    CapsNetConfig,
    CNNConfig,
    EfficientCapsNetConfig,
    MatrixCapsNetConfig,
    NetworkConfig,
)
from capsjax.networks.cnn import MNIST_BASELINE

_Range = tuple[Callable[[Any], bool], str]
_COUNT: _Range = (lambda value: value >= 1 and value % 1 == 0, "an integer of 1 or more")
# What each number must be; a comparison with nan never holds.
_RANGES: dict[str, _Range] = {
    "epochs": _COUNT,
    "batch_size": _COUNT,
    "lr": (lambda value: 0 < value < math.inf, "a number above 0"),
    "lr_decay": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "margin_steps": _COUNT,
    "lam_recon": (lambda value: 0 <= value < math.inf, "a number of 0 or more"),
    "shift_pixels": (lambda value: 0 <= value < math.inf, "0 or more"),
    "rotation": (lambda value: 0 <= value <= 180, "from 0 to 180"),
    "shear": (lambda value: 0 <= value <= 80, "from 0 to 80"),
    "zoom": (lambda value: 0 <= value <= 0.9, "from 0 to 0.9"),
    "elastic": (lambda value: 0 <= value < math.inf, "0 or more"),
    "average": (lambda value: 0 < value < 1, "between 0 and 1"),
    "target": (lambda value: 0 < value <= 100, "above 0 and at most 100"),
}


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
    """Factor on the rate per epoch. None: a cosine to 0 (paper, cnn-paper: 0.96^150 in the end)."""
    loss: Loss = "margin"
    """Loss of the class scores."""
    margin_steps: int = 10_000
    """Steps over which the margin of --loss spread rises from 0.2 to 0.9."""
    lam_recon: float | None = None
    """Weight of the reconstruction loss. None: 0.0005·H·W·C (paper: 0.01·H·W·C)."""
    shift_pixels: float = 2
    """Largest random shift of a training image in each direction, in pixels."""
    rotation: float = 0
    """Largest random rotation of a training image either way, in degrees."""
    shear: float = 0
    """Largest random shear of a training image either way, in degrees."""
    zoom: float = 0
    """Largest random zoom of a training image along each axis: 0.2 for 0.8 to 1.2."""
    elastic: float = 0
    """Standard deviation of a random, smooth distortion of a training image, in pixels."""
    average: float | None = None
    """Decay of a moving average of the weights, which evaluation then uses. None: no average."""
    target: float | None = None
    """Stop after the first epoch whose validation accuracy, in %, reaches this. None: never."""

    def __post_init__(self) -> None:
        kinds = {field.name: field.type for field in dataclasses.fields(self)}
        for name, (holds, expected) in _RANGES.items():
            value = getattr(self, name)
            none = value is None and type(None) in get_args(kinds[name])
            check(none or (isinstance(value, Real) and holds(value)), name, expected, value)
        check(self.loss in get_args(Loss), "loss", f"one of {', '.join(get_args(Loss))}", self.loss)


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
        None; None: a cosine from the initial rate to 0.
      lr_staircase: whether the learning rate falls once an epoch instead of continuously.
      lr_floor: the learning rate falls no lower.
    """

    network: NetworkConfig
    training: Training
    recon_per_pixel: float = 0.0005
    lr_total_decay: float | None = None
    lr_staircase: bool = True
    lr_floor: float = 0.0

    def complete(self, training: Training, image_shape: tuple[int, int, int]) -> Training:
        """Replaces each None in `training` that stands for a number by this preset's number."""
        lam_recon, lr_decay = training.lam_recon, training.lr_decay
        if lam_recon is None:
            lam_recon = self.recon_per_pixel * math.prod(image_shape)
        if lr_decay is None and self.lr_total_decay is not None:
            lr_decay = self.lr_total_decay ** (1 / training.epochs)
        return dataclasses.replace(training, lam_recon=lam_recon, lr_decay=lr_decay)

    def schedule(self, training: Training, steps_per_epoch: int) -> optax.Schedule:
        """Returns the learning rate as a function of the step; `training` is complete."""
        if training.lr_decay is None:
            return optax.cosine_decay_schedule(training.lr, training.epochs * steps_per_epoch)
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

# As `seed`, but with warped digits, averaged weights (Polyak and Juditsky, 1992), and a rate that
# falls to 0 (Loshchilov and Hutter, 2017, arXiv:1608.03983); these were not tried one by one.
# Without the elastic distortions (Simard, Steinkraus, Platt, 2003) the network learns its training
# digits by heart in 30 epochs: their error ends at 0.1 % instead of 0.7 %.
BEST = Preset(
    network=CapsNetConfig(),
    training=Training(
        epochs=30,
        batch_size=128,
        lr_decay=None,
        rotation=7,
        shear=5,
        zoom=0.1,
        elastic=1,
        average=0.999,
    ),
)

# The authors train 150 epochs in batches of 16, with Adam at 5e-4 · 0.97^epoch and no average, and
# keep the epoch that is best on the test images. This recipe needs no such choice.
EFFICIENT = Preset(
    network=EfficientCapsNetConfig(),
    training=dataclasses.replace(BEST.training, batch_size=64),
)

# The authors route three times, with Adam at 0.01 or, as they say elsewhere, 3e-3, times 0.96 every
# 20,000 steps, and raise the margin along a sigmoid whose middle is at 200,000 steps. Here three
# iterations learn slower than two. The rate was found in short runs.
MATRIX = Preset(
    network=MatrixCapsNetConfig(routing=EM(iterations=2)),
    training=Training(
        epochs=30, batch_size=64, lr=0.01, lr_decay=None, loss="spread", average=0.999
    ),
)

# Without capsules: a small network, trained as `best` trains CapsNet, and the paper's baseline,
# trained as `paper` trains CapsNet, since the authors' code gives both the same defaults.
CNN = dataclasses.replace(
    BEST,
    network=CNNConfig(),
    training=dataclasses.replace(BEST.training, loss="cross_entropy"),
)
CNN_PAPER = dataclasses.replace(
    PAPER,
    network=MNIST_BASELINE,
    training=dataclasses.replace(PAPER.training, loss="cross_entropy"),
)

PRESETS = {
    "seed": SEED,
    "paper": PAPER,
    "best": BEST,
    "efficient": EFFICIENT,
    "matrix": MATRIX,
    "cnn": CNN,
    "cnn-paper": CNN_PAPER,
}
