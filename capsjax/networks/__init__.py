"""Networks, one a file: the frozen config with its sizes, and the module that it builds."""

from capsjax.networks._ensemble import Ensemble
from capsjax.networks._network import (
    Network,
    NetworkConfig,
    Output,
    Prediction,
    predict,
)
from capsjax.networks.capsnet import CapsNet, CapsNetConfig
from capsjax.networks.cnn import CNN, CNNConfig
from capsjax.networks.efficient import EfficientCapsNet, EfficientCapsNetConfig
from capsjax.networks.matrix import MatrixCapsNet, MatrixCapsNetConfig

# By the name that a saved network stores. A network of your own joins with
# `capsjax.NETWORKS[MyConfig.name] = MyConfig`.
NETWORKS: dict[str, type[NetworkConfig]] = {
    kind.name: kind
    for kind in (CapsNetConfig, EfficientCapsNetConfig, MatrixCapsNetConfig, CNNConfig)
}

__all__ = [
    "CNN",
    "NETWORKS",
    "CNNConfig",
    "CapsNet",
    "CapsNetConfig",
    "EfficientCapsNet",
    "EfficientCapsNetConfig",
    "Ensemble",
    "MatrixCapsNet",
    "MatrixCapsNetConfig",
    "Network",
    "NetworkConfig",
    "Output",
    "Prediction",
    "predict",
]
