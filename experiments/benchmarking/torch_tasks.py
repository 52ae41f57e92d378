"""The tasks that are timed in PyTorch: those of `capsjax_tasks`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarking.contender import Contender, Inputs, Tasks, parameters_of
from benchmarking.stages import draw_arrays
from benchmarking.torch_capsnet import CapsNet
from benchmarking.torch_cnn import CNN
from benchmarking.torch_efficient import EfficientCapsNet
from benchmarking.torch_layers import margin_loss, reconstruction_loss, spread_loss
from benchmarking.torch_matrix import MatrixCapsNet


def make_step_tasks(contender: Contender, inputs: Inputs) -> tuple[Tasks, Tasks]:
    """Returns tasks to time, and figures known without timing, of which there are none."""
    _, train, predict = make_network_tasks(contender, inputs)
    x, y = (inputs[name][: contender.batch_size] for name in ("x", "y"))
    return {"train": lambda: train(x, y), "forward": lambda: predict(x)}, {}


def make_network_tasks(contender: Contender, inputs: Inputs) -> tuple[Any, Callable, Callable]:
    """Returns the network, train(pixels, labels) -> loss and predict(pixels) -> classes."""
    net, score_loss = _make_network(contender, parameters_of(contender.network, inputs))
    layout = torch.channels_last if contender.channels_last else torch.contiguous_format
    net = net.to(memory_format=layout)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=contender.rewritten or None)
    called: Any = torch.compile(net) if contender.compiled else net
    low = contender.dtype == "bfloat16"

    def train(pixels: np.ndarray, labels: np.ndarray) -> float:
        x, y = _to_images(pixels).to(memory_format=layout), torch.from_numpy(labels).long()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            scores, reconstruction = called.train()(x, y)
        value = score_loss(scores.float(), y)
        if reconstruction is not None:
            value = value + reconstruction_loss(reconstruction.float(), x)
        value.backward()
        optimizer.step()
        return value.item()

    def predict(pixels: np.ndarray) -> np.ndarray:
        x = _to_images(pixels).to(memory_format=layout)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            return called.eval()(x)[0].argmax(-1).numpy()

    return net, train, predict


def _make_network(contender: Contender, params: Inputs) -> tuple[Any, Callable]:
    """Returns a network and the loss of its class scores."""
    match contender.network:
        case "efficient":
            return EfficientCapsNet(params), margin_loss
        case "matrix":
            return MatrixCapsNet(params), spread_loss
        case "cnn":
            return CNN(params), functional.cross_entropy
        case _:
            return CapsNet(params, contender.routings, contender.rewritten), margin_loss


def _to_images(pixels: np.ndarray) -> torch.Tensor:
    """Returns images [B, 1, 28, 28], pixels from 0 to 1."""
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255)


def make_stage_tasks(inputs: Inputs, batch: int) -> Tasks:
    """Returns each stage of a step as a task to time."""
    net = CapsNet(parameters_of("capsnet", inputs))
    tensors = {name: torch.from_numpy(array) for name, array in draw_arrays(batch).items()}
    for name in ("x", "h", "dy"):
        tensors[name] = tensors[name].permute(0, 3, 1, 2).contiguous()
    return {
        **_make_conv_tasks(net, tensors),
        **_make_capsule_tasks(net, tensors),
        **_make_decoder_tasks(net, tensors),
        **_make_optimizer_tasks(net),
    }


def _make_conv_tasks(net: Any, tensors: dict[str, torch.Tensor]) -> Tasks:
    x, h, dy = tensors["x"], tensors["h"], tensors["dy"]
    image = h.clone().requires_grad_()
    first, second = [*net.conv1.parameters()], [*net.conv2.parameters()]
    return {
        "conv1 forward": _run_forward(lambda: net.conv1(x)),
        "conv1 kernel gradient": _run_backward(net.conv1(x), first, h),
        "conv2 forward": _run_forward(lambda: net.conv2(h)),
        "conv2 image gradient": _run_backward(net.conv2(image), [image], dy),
        "conv2 kernel gradient": _run_backward(net.conv2(h), second, dy),
    }


def _make_capsule_tasks(net: Any, tensors: dict[str, torch.Tensor]) -> Tasks:
    u, cotangent = tensors["u"].requires_grad_(), tensors["v"].detach()

    def layer() -> torch.Tensor:
        return net.route(net.predict(u))

    return {
        "predictions and routing forward": _run_forward(layer),
        "predictions and routing with gradients": _run_both(layer, [net.weight, u], cotangent),
    }


def _make_decoder_tasks(net: Any, tensors: dict[str, torch.Tensor]) -> Tasks:
    v, target = tensors["v"].clone().requires_grad_(), tensors["x"].flatten(1)

    def loss() -> torch.Tensor:
        kept = torch.cat([v[:, :1], torch.zeros_like(v[:, 1:])], 1)
        return functional.mse_loss(net.decoder(kept.flatten(1)), target)

    return {"decoder with gradients": _run_both(loss, [v, *net.decoder.parameters()])}


def _make_optimizer_tasks(net: Any) -> Tasks:
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return {"optimiser": optimizer.step}


def _run_forward(function: Callable) -> Callable[[], Any]:
    return torch.no_grad()(function)


def _run_backward(output: torch.Tensor, wanted: Any, cotangent: Any) -> Callable[[], Any]:
    """Returns a task of the backward pass alone: one forward pass's graph is kept."""
    return lambda: torch.autograd.grad(output, wanted, cotangent, retain_graph=True)


def _run_both(function: Callable, wanted: Any, cotangent: Any = None) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(function(), wanted, cotangent)
