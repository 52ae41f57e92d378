"""Matrix capsules in PyTorch, with the initial weights of a `capsjax.MatrixCapsNet`."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from benchmarking.torch_layers import Params, make_conv, make_parameter


class MatrixCapsNet(nn.Module):
    """Matrix capsules on 28×28×1 images in 10 classes.

    Poses are [B, positions, types, 16], each a 4×4 matrix, column by column.
    """

    def __init__(self, params: Params):
        super().__init__()
        self.conv = make_conv(params, "conv", stride=2)
        self.poses = make_parameter(params["primary.poses"])
        self.activations = make_parameter(params["primary.activations"])
        self.first = ConvCaps(params, "conv_caps.0", positions=12, stride=2)
        self.second = ConvCaps(params, "conv_caps.1", positions=5, stride=1)
        self.last = ClassCaps(params, positions=3)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None):
        """Returns activations [B, 10] and no reconstructions."""
        x = functional.relu(self.conv(x)).flatten(2).transpose(1, 2)
        poses = (x @ self.poses).unflatten(-1, (-1, 16))
        capsules = poses, torch.sigmoid(x @ self.activations)
        for layer in (self.first, self.second, self.last):
            capsules = layer(*capsules)
        return capsules[1][:, 0], None


class ConvCaps(nn.Module):
    """Capsules of windows of 3×3 positions, routed by EM."""

    windows: torch.Tensor  # [windows, 9]: the positions that each holds

    def __init__(self, params: Params, name: str, positions: int, stride: int):
        super().__init__()
        self.weight, self.beta_u, self.beta_a = make_routing_parameters(params, name)
        lines = torch.arange(0, positions - 2, stride)[:, None] + torch.arange(3)
        windows = positions * lines[:, None, :, None] + lines[:, None, :]
        self.register_buffer("windows", windows.reshape(-1, 9))
        self.positions = positions**2

    def forward(self, poses: torch.Tensor, a: torch.Tensor):
        """Returns poses and activations at the windows."""
        votes = make_votes(poses[:, self.windows].flatten(2, 3), self.weight)
        a = a[:, self.windows].flatten(2)
        return route(votes, a, self.beta_u, self.beta_a, self.add_up)

    def add_up(self, logs: torch.Tensor) -> torch.Tensor:
        """Adds logarithms [B, windows, 9·types] of all windows that hold the same capsule."""
        logs = logs.unflatten(-1, (9, -1)).flatten(1, 2)
        windows = self.windows.flatten()
        index = windows[None, :, None].expand_as(logs)
        lowest = logs.new_full((len(logs), self.positions, logs.shape[-1]), -torch.inf)
        peak = lowest.scatter_reduce(1, index, logs.detach(), "amax")[:, windows]
        total = torch.zeros_like(lowest).index_add(1, windows, torch.exp(logs - peak))
        told = peak + torch.log(total[:, windows])
        return told.unflatten(1, self.windows.shape).flatten(2)


class ClassCaps(nn.Module):
    """Class capsules, which see all positions with the same matrices."""

    coordinates: torch.Tensor  # [positions·types, 16]: is added to their votes

    def __init__(self, params: Params, positions: int):
        super().__init__()
        self.weight, self.beta_u, self.beta_a = make_routing_parameters(params, "class_caps")
        places = (torch.cartesian_prod(*[torch.arange(positions)] * 2) + 0.5) / positions
        coordinates = torch.zeros(positions**2, 16)
        coordinates[:, 12:14] = places  # at the top of the right-hand column
        types = self.weight.shape[1]
        self.register_buffer("coordinates", coordinates.repeat_interleave(types, 0))

    def forward(self, poses: torch.Tensor, a: torch.Tensor):
        """Returns poses and activations, at one position."""
        weight = self.weight.repeat(1, poses.shape[1], 1, 1)
        votes = make_votes(poses.flatten(1, 2)[:, None], weight) + self.coordinates
        return route(votes, a.flatten(1)[:, None], self.beta_u, self.beta_a, lambda logs: logs)


def make_routing_parameters(params: Params, name: str) -> list[nn.Parameter]:
    """Makes W [j, i, 4, 4], β_u [j] and β_a [j], which counts in hundreds."""
    return [make_parameter(params[f"{name}.{which}"]) for which in ("weight", "beta_u", "beta_a")]


def make_votes(poses: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiplies poses [B, p, i, 16] by matrices: votes [B, p, j, i, 16]."""
    matrices = poses.unflatten(-1, (4, 4))  # the column, then the row
    return torch.einsum("bpimr,jimc->bpjicr", matrices, weight).flatten(-2).float()


def route(
    votes: torch.Tensor,
    a: torch.Tensor,
    beta_u: torch.Tensor,
    beta_a: torch.Tensor,
    add_up: Callable,
    iterations: int = 3,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routes by EM: poses [B, p, j, 16] and activations [B, p, j]."""
    j, i = votes.shape[2:4]
    r = torch.exp(-add_up(torch.full_like(a, math.log(j))))[:, :, None].expand(votes.shape[:-1])
    for step in range(iterations):
        weights = r * a[:, :, None]
        total = weights.sum(-1, keepdim=True)
        shares = (weights / (total + 1e-9))[..., None]
        mean = (shares * votes).sum(-2, keepdim=True)
        variance = (shares * (votes - mean) ** 2).sum(-2, keepdim=True) + 1e-4
        cost = (beta_u[:, None] + torch.log(variance[..., 0, :]) / 2).sum(-1) * total[..., 0]
        temperature = 0.01 * (1 - 0.95 ** (step + 1))
        logits = temperature * (100 * beta_a - cost * 100 * j / i)
        if step < iterations - 1:
            squares = (votes - mean) ** 2 / variance + torch.log(2 * math.pi * variance)
            scores = functional.logsigmoid(logits)[..., None] - squares.sum(-1) / 2
            r = torch.exp(scores - add_up(torch.logsumexp(scores, 2))[:, :, None])
    return mean[..., 0, :], torch.sigmoid(logits)
