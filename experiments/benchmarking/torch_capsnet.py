"""CapsNet in PyTorch, written as its users write it: what capsjax is measured against.

The initial weights are those of a `capsjax.CapsNet`, so that both compute the same.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarking.contender import LAM_RECON


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
        self.conv1, self.conv2 = nn.Conv2d(1, 256, 9), nn.Conv2d(256, 256, 9, 2)
        for layer, ours in ((self.conv1, "conv1"), (self.conv2, "primary.conv")):
            layer.weight = _make_parameter(params[f"{ours}.kernel"].transpose(3, 2, 0, 1))
            layer.bias = _make_parameter(params[f"{ours}.bias"])
        self.weight = _make_parameter(params["class_caps.weight"])  # [j, i, d, k]
        layers: list[nn.Module] = []
        for number in range(3):
            kernel, bias = (params[f"decoder.{number}.{name}"] for name in ("kernel", "bias"))
            dense = nn.Linear(*kernel.shape)
            dense.weight, dense.bias = _make_parameter(kernel.T), _make_parameter(bias)
            layers += [dense, nn.ReLU() if number < 2 else nn.Sigmoid()]
        self.decoder = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None):
        """Returns lengths [B, 10] and reconstructions; the decoder sees `y`, or the longest."""
        x = functional.relu(self.conv1(x))
        u = self.conv2(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 8)
        v = self.route(self.predict(squash(u)))
        lengths = torch.linalg.vector_norm(v, dim=-1)
        labels = lengths.argmax(-1) if y is None else y
        kept = v * functional.one_hot(labels, 10).to(v.dtype)[..., None]
        return lengths, self.decoder(kept.flatten(1)).reshape(-1, 1, 28, 28)

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


def compute_loss(
    lengths: torch.Tensor, y: torch.Tensor, x: torch.Tensor, reconstruction: torch.Tensor
) -> torch.Tensor:
    """Computes the margin loss (eq. 4) plus the weighted reconstruction loss."""
    present = functional.one_hot(y, 10).to(lengths.dtype)
    too_short, too_long = (0.9 - lengths).clamp(min=0) ** 2, (lengths - 0.1).clamp(min=0) ** 2
    margin = (present * too_short + 0.5 * (1 - present) * too_long).sum(1).mean()
    return margin + LAM_RECON * functional.mse_loss(reconstruction, x)


def _make_parameter(array: np.ndarray) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.array(array, np.float32, order="C")))
