"""What the networks in PyTorch share: layers with the initial weights of capsjax, and losses."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarking.contender import LAM_RECON

Params = Mapping[str, np.ndarray]  # by their path in capsjax


def make_parameter(array: np.ndarray) -> nn.Parameter:
    """Makes a parameter of an array."""
    return nn.Parameter(torch.from_numpy(np.array(array, np.float32, order="C")))


def make_conv(params: Params, name: str, **options: Any) -> nn.Conv2d:
    """Makes a convolution."""
    kernel = params[f"{name}.kernel"].transpose(3, 2, 0, 1)
    layer = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2], **options)
    layer.weight, layer.bias = make_parameter(kernel), make_parameter(params[f"{name}.bias"])
    return layer


def make_dense(params: Params, name: str) -> nn.Linear:
    """Makes a dense layer."""
    kernel = params[f"{name}.kernel"]
    layer = nn.Linear(*kernel.shape)
    layer.weight, layer.bias = make_parameter(kernel.T), make_parameter(params[f"{name}.bias"])
    return layer


def make_decoder(params: Params) -> nn.Sequential:
    """Makes the decoder of capsules."""
    first, second, last = (make_dense(params, f"decoder.{number}") for number in range(3))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last, nn.Sigmoid())


def mask(v: torch.Tensor, lengths: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
    """Keeps the capsule of the label, or the longest where there is none, and flattens."""
    labels = lengths.argmax(-1) if y is None else y
    return (v * functional.one_hot(labels, 10).to(v.dtype)[..., None]).flatten(1)


def margin_loss(scores: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Computes the margin loss (eq. 4)."""
    present = functional.one_hot(y, 10).to(scores.dtype)
    too_short, too_long = (0.9 - scores).clamp(min=0) ** 2, (scores - 0.1).clamp(min=0) ** 2
    return (present * too_short + 0.5 * (1 - present) * too_long).sum(1).mean()


def spread_loss(scores: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Computes the spread loss with its first margin."""
    lead = scores.gather(1, y[:, None]) - scores
    absent = 1 - functional.one_hot(y, 10).to(scores.dtype)
    return (absent * (0.2 - lead).clamp(min=0) ** 2).sum(1).mean()


def reconstruction_loss(reconstruction: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Computes the weighted mean squared error."""
    return LAM_RECON * functional.mse_loss(reconstruction, x)
