"""Capsule networks for JAX: pure functions first, thin Flax modules over them."""

from capsjax import data, networks, nn, presets, tasks, weights
from capsjax._decoder import decode, mask, perturb
from capsjax._losses import caps_loss, margin_loss, reconstruction_loss
from capsjax._pretrained import pretrained
from capsjax._primary import primary_capsules
from capsjax._routing import (
    ROUTINGS,
    Agreement,
    Capsules,
    DenseVotes,
    EMState,
    Random,
    Routing,
    RoutingState,
    SelfAttention,
    Uniform,
    VariationalState,
    attention_routing,
    dense_capsules,
    em_routing,
    predictions,
    random_routing,
    routing,
    routing_state,
    self_attention_routing,
    self_routing,
    uniform_routing,
    variational_routing,
)
from capsjax._vectors import length, squash, squash_exp
from capsjax.networks import NETWORKS, CapsNet, Network, Output, Prediction, predict

__version__ = "0.1.0"

__all__ = [
    "NETWORKS",
    "ROUTINGS",
    "Agreement",
    "CapsNet",
    "Capsules",
    "DenseVotes",
    "EMState",
    "Network",
    "Output",
    "Prediction",
    "Random",
    "Routing",
    "RoutingState",
    "SelfAttention",
    "Uniform",
    "VariationalState",
    "attention_routing",
    "caps_loss",
    "data",
    "decode",
    "dense_capsules",
    "em_routing",
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
    "random_routing",
    "reconstruction_loss",
    "routing",
    "routing_state",
    "self_attention_routing",
    "self_routing",
    "squash",
    "squash_exp",
    "tasks",
    "uniform_routing",
    "variational_routing",
    "weights",
]
