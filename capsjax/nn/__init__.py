"""Flax NNX layers: they hold the parameters and call the functions."""

from capsjax.nn._conv_caps import ConvCaps
from capsjax.nn._em_caps import ConvEMCaps, EMCaps, PrimaryEMCaps, as_em
from capsjax.nn._layers import (
    Affine,
    Conv,
    Decoder,
    Dense,
    DenseCaps,
    Dropout,
    Initializer,
    PrimaryCaps,
    as_routing,
    fan_in_uniform,
)

__all__ = [
    "Affine",
    "Conv",
    "ConvCaps",
    "ConvEMCaps",
    "Decoder",
    "Dense",
    "DenseCaps",
    "Dropout",
    "EMCaps",
    "Initializer",
    "PrimaryCaps",
    "PrimaryEMCaps",
    "as_em",
    "as_routing",
    "fan_in_uniform",
]
