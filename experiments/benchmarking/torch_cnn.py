"""The small CNN in PyTorch, with the initial weights of a `capsjax.CNN` and without dropout."""

import torch
from torch import nn
from torch.nn import functional

from benchmarking.torch_layers import Params, make_conv, make_dense


class CNN(nn.Module):
    """A convolutional network on 28×28×1 images in 10 classes."""

    def __init__(self, params: Params):
        super().__init__()
        self.convs = nn.ModuleList(
            make_conv(params, f"convs.{number}", padding="same") for number in range(3)
        )
        self.hidden, self.last = make_dense(params, "dense.0"), make_dense(params, "dense.1")

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None):
        """Returns logits [B, 10] and no reconstructions."""
        for conv in self.convs:
            x = functional.max_pool2d(functional.relu(conv(x)), 2)
        x = x.permute(0, 2, 3, 1).flatten(1)
        return self.last(functional.relu(self.hidden(x))), None
