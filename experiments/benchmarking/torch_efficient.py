"""Efficient-CapsNet in PyTorch, with the initial weights of a `capsjax.EfficientCapsNet`."""

import math

import torch
from torch import nn
from torch.nn import functional

from benchmarking.torch_layers import Params, make_conv, make_decoder, make_parameter, mask


def squash(s: torch.Tensor) -> torch.Tensor:
    """Shortens vectors to a length below 1, short ones hardly at all."""
    norm = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    return (1 - torch.exp(-norm)) * s / (norm + 1e-8)


class EfficientCapsNet(nn.Module):
    """Efficient-CapsNet on 28×28×1 images in 10 classes."""

    def __init__(self, params: Params):
        super().__init__()
        self.convs = nn.ModuleList(
            make_conv(params, f"convs.{number}", stride=stride)
            for number, stride in enumerate((1, 1, 1, 2))
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01) for channels in (32, 64, 64, 128)
        )
        kernel = params["depthwise"].transpose(2, 0, 1)[:, None]  # [channel, 1, row, column]
        self.depthwise = nn.Conv2d(128, 128, kernel.shape[-1], groups=128)
        self.depthwise.weight = make_parameter(kernel)
        self.depthwise.bias = make_parameter(params["depthwise_bias"])
        self.weight = make_parameter(params["class_caps.weight"])  # [j, i, d, k]
        self.bias = make_parameter(params["class_caps.bias"])  # [j, i]
        self.decoder = make_decoder(params)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None):
        """Returns lengths [B, 10] and reconstructions; the decoder sees `y`, or the longest."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(functional.relu(conv(x)))
        u = squash(self.depthwise(x).reshape(x.shape[0], 16, 8))
        v = self.route(torch.einsum("jidk,bik->bjid", self.weight, u))
        lengths = torch.linalg.vector_norm(v, dim=-1)
        return lengths, self.decoder(mask(v, lengths, y)).reshape(-1, 1, 28, 28)

    def route(self, u_hat: torch.Tensor) -> torch.Tensor:
        """Routes by self-attention."""
        agreement = (u_hat * u_hat.sum(2, keepdim=True)).sum(-1)
        couplings = functional.softmax(agreement / math.sqrt(u_hat.shape[-1]), 1)
        return squash(((couplings + self.bias)[..., None] * u_hat).sum(2))
