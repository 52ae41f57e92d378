"""Capsule networks for JAX: pure functions first, thin Flax modules over them."""

from capsjax import data, networks, nn, presets, tasks, weights
from capsjax._decoder import decode, mask, perturb
from capsjax._losses import caps_loss, margin_loss, reconstruction_loss
from capsjax._pretrained import pretrained
from capsjax._primary import primary_capsules
from capsjax._routing import (
    ROUTINGS,
    Agreement,
    Routing,
    RoutingState,
    dense_capsules,
    predictions,
    routing,
    routing_state,
)
from capsjax._vectors import length, squash
from capsjax.networks import NETWORKS, CapsNet, Network, Output, Prediction, predict

__version__ = "0.1.0"

__all__ = [
    "NETWORKS",
    "ROUTINGS",
    "Agreement",
    "CapsNet",
    "Network",
    "Output",
    "Prediction",
    "Routing",
    "RoutingState",
    "caps_loss",
    "data",
    "decode",
    "dense_capsules",
    "length",
    "margin_loss",
    "mask",
    "networks",
    "nn",
    "perturb",
    "predict",
    "predictions",
    "presets",
    "pretrained",
    "primary_capsules",
    "reconstruction_loss",
    "routing",
    "routing_state",
    "squash",
    "tasks",
    "weights",
]
