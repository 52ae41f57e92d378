"""Capsule networks for JAX: pure functions first, thin Flax modules over them."""

from capsjax import data, nn, presets, weights
from capsjax._decoder import decode, mask
from capsjax._losses import caps_loss, margin_loss, reconstruction_loss
from capsjax._primary import primary_capsules
from capsjax._routing import (
    RoutingState,
    dense_capsules,
    predictions,
    routing,
    routing_state,
)
from capsjax._vectors import length, squash
from capsjax.nn import Prediction, predict

__version__ = "0.1.0"

__all__ = [
    "Prediction",
    "RoutingState",
    "caps_loss",
    "data",
    "decode",
    "dense_capsules",
    "length",
    "margin_loss",
    "mask",
    "nn",
    "predict",
    "predictions",
    "presets",
    "primary_capsules",
    "reconstruction_loss",
    "routing",
    "routing_state",
    "squash",
    "weights",
]
