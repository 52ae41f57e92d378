"""Recipes by name: every number that a training run follows."""

import dataclasses
from typing import Literal

from capsjax._primary import Grouping

Init = Literal["uniform", "truncated_normal"]


@dataclasses.dataclass(frozen=True)
class Model:
    """The architecture; the keyword arguments of `capsjax.nn.CapsNet`."""

    channels: int = 256  # of the first convolution
    kernel_size: int = 9  # of both convolutions, pixels
    types: int = 32  # of primary capsules
    dim_primary: int = 8
    dim_class: int = 16
    hidden: tuple[int, ...] = (512, 1024)  # units of the decoder's hidden layers
    grouping: Grouping = "channels"
    primary_coupling: float = 1.0
    routing_bias: bool = False
    stop_gradient: bool = True
    init: Init = "uniform"


@dataclasses.dataclass(frozen=True)
class Preset:
    """An architecture and how it is trained."""

    model: Model
    lr: float  # Adam's first learning rate
    lr_decay: float | None  # factor an epoch; None: `lr_total_decay` spread over all epochs
    lr_total_decay: float | None  # factor over the whole run
    lr_staircase: bool  # True: one step an epoch; False: continuous
    lr_floor: float
    recon_per_pixel: float  # lam_recon = recon_per_pixel · H·W·C
    shift_pixels: int
    batch_size: int
    epochs: int


# XifengGuo/CapsNet-Pytorch; 0.0005·784 = 0.392.
SEED = Preset(
    model=Model(),
    lr=1e-3,
    lr_decay=0.9,
    lr_total_decay=None,
    lr_staircase=True,
    lr_floor=0.0,
    recon_per_pixel=0.0005,
    shift_pixels=2,
    batch_size=100,
    epochs=50,
)

# Sarasra/models, research/capsules. Its margin loss is half of the paper's and divided by the
# number of classes, so beside the paper's margin loss its reconstruction weighs 20 times 0.0005.
PAPER = Preset(
    model=Model(
        primary_coupling=1 / 32, routing_bias=True, stop_gradient=False, init="truncated_normal"
    ),
    lr=1e-3,
    lr_decay=None,
    lr_total_decay=0.96**150,  # 0.96 per 2,000 steps, over 300,000 steps
    lr_staircase=False,
    lr_floor=1e-6,
    recon_per_pixel=0.01,
    shift_pixels=2,
    batch_size=128,
    epochs=640,
)

PRESETS = {"seed": SEED, "paper": PAPER}
