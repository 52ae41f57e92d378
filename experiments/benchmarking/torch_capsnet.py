"""CapsNet in PyTorch, written as its users write it: what capsjax is measured against.

The initial weights are those of a `capsjax.CapsNet`, so that both compute the same.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarking.torch_layers import make_conv, make_decoder, make_parameter, mask


def squash(s: torch.Tensor) -> torch.Tensor:
    """Shortens vectors to a length below 1 (eq. 1)."""
    norm = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    return norm**2 / (1 + norm**2) / (norm + 1e-8) * s


class CapsNet(nn.Module):
    """CapsNet on 28×28×1 images in 10 classes; capsules are groups of channels.

    `rewritten` computes the predictions by an einsum: the matmul of the widespread code copies the
    weights for every image.
    """

    def __init__(
        self, params: Mapping[str, np.ndarray], routings: int = 3, rewritten: bool = False
    ):
        super().__init__()
        self.routings, self.rewritten = routings, rewritten
        self.conv1 = make_conv(params, "conv1")
        self.conv2 = make_conv(params, "primary.conv", stride=2)
        self.weight = make_parameter(params["class_caps.weight"])  # [j, i, d, k]
        self.decoder = make_decoder(params)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None):
        """Returns lengths [B, 10] and reconstructions; the decoder sees `y`, or the longest."""
        x = functional.relu(self.conv1(x))
        u = self.conv2(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 8)
        v = self.route(self.predict(squash(u)))
        lengths = torch.linalg.vector_norm(v, dim=-1)
        return lengths, self.decoder(mask(v, lengths, y)).reshape(-1, 1, 28, 28)

    def predict(self, u: torch.Tensor) -> torch.Tensor:
        """Computes the predictions û [B, j, i, d] (eq. 2)."""
        if self.rewritten:
            return torch.einsum("jidk,bik->bjid", self.weight, u)
        return torch.matmul(self.weight, u[:, None, :, :, None]).squeeze(-1)

    def route(self, u_hat: torch.Tensor) -> torch.Tensor:
        """Routes by agreement (procedure 1)."""
        detached = u_hat.detach()
        b = torch.zeros(u_hat.shape[:-1], device=u_hat.device)
        for _ in range(self.routings - 1):
            v = squash((functional.softmax(b, 1)[..., None] * detached).sum(-2))
            b = b + (detached * v[:, :, None]).sum(-1)
        return squash((functional.softmax(b, 1)[..., None] * u_hat).sum(-2))
