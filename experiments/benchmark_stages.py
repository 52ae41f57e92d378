"""The parts of a train step, one by one, in capsjax and in PyTorch, and what they must cost."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

_CONV1, _CONV2 = 20 * 20 * 81 * 256, 6 * 6 * 81 * 256 * 256  # multiplications for an image
_ROUTING = 10 * 1152 * 8 * 16  # of one sum over all predictions
_DECODER = 160 * 512 + 512 * 1024 + 1024 * 784
_PARAMETERS = 8_215_568
_IMAGE, _MAPS, _OUT = 28 * 28, 20 * 20 * 256, 6 * 6 * 256  # numbers of an image
_K1, _K2, _W = 81 * 256, 81 * 256 * 256, 10 * 1152 * 16 * 8  # numbers in the weights
_SIDE, _LENGTH = 2048, 2**26  # of what the machine's peaks are measured with


class Cost(NamedTuple):
    """What a stage must do, by its definition: the least of any way to do it directly."""

    flop: float
    bytes: float  # what it reads and writes, once


def costs(batch: int) -> dict[str, Cost]:
    """Of each stage, in float32."""
    numbers = {
        "conv1 forward": (_CONV1, _IMAGE + _MAPS, _K1),
        "conv1 kernel gradient": (_CONV1, _IMAGE + _MAPS, _K1),
        "conv2 forward": (_CONV2, _MAPS + _OUT, _K2),
        "conv2 image gradient": (_CONV2, _MAPS + _OUT, _K2),
        "conv2 kernel gradient": (_CONV2, _MAPS + _OUT, _K2),
        "predictions and routing forward": (5 * _ROUTING, _OUT + 160, _W),
        "predictions and routing with gradients": (7 * _ROUTING, 2 * (_OUT + 160), 2 * _W),
        "decoder with gradients": (3 * _DECODER, 160 + 2 * _IMAGE, 2 * _DECODER),
        "optimiser": (0, 0, 7 * _PARAMETERS),
    }
    stages = {
        name: Cost(2 * batch * products, 4 * (batch * each + once))
        for name, (products, each, once) in numbers.items()
    }
    peaks = {"matrix product": Cost(2 * _SIDE**3, 0), "copy": Cost(0, 8 * _LENGTH)}
    return stages | peaks


def arrays(batch: int) -> dict[str, np.ndarray]:
    """Inputs of all stages, channels last."""
    rng = np.random.default_rng(0)
    shapes = {
        "x": (batch, 28, 28, 1),
        "h": (batch, 20, 20, 256),
        "dy": (batch, 6, 6, 256),
        "u": (batch, 1152, 8),
        "v": (batch, 10, 16),
    }
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


def capsjax_tasks(batch: int) -> dict[str, Callable[[], None]]:
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    import capsjax
    from benchmark_worker import network
    from capsjax._conv import conv

    params = nnx.to_pure_dict(nnx.split(network(3))[1])
    conv1, conv2 = params["conv1"], params["primary"]["conv"]
    weight, decoder = params["classes"]["weight"], list(params["decoder"].values())
    layers = [(layer["kernel"], layer["bias"]) for layer in decoder]
    x, h, dy, u, v = (jnp.asarray(array) for array in arrays(batch).values())
    labels, optimizer = jnp.zeros(batch, int), optax.adam(1e-3)

    def second(x: Any, kernel: Any) -> Any:
        return conv(x, kernel, conv2["bias"], strides=2)

    def draw(layers: Any, v: Any) -> Any:
        pixels = capsjax.decode(layers, capsjax.mask(v, labels)).reshape(x.shape)
        return jnp.mean(capsjax.reconstruction_loss(pixels, x))

    def adam(gradient: Any, state: Any, params: Any) -> Any:
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    stages: dict[str, tuple[Any, ...]] = {
        "conv1 forward": (conv, x, conv1["kernel"], conv1["bias"]),
        "conv1 kernel gradient": (
            lambda k, b, h: jax.vjp(lambda k, b: conv(x, k, b), k, b)[1](h),
            *(conv1["kernel"], conv1["bias"], h),
        ),
        "conv2 forward": (second, h, conv2["kernel"]),
        "conv2 image gradient": (
            lambda h, k, dy: jax.vjp(lambda h: second(h, k), h)[1](dy),
            *(h, conv2["kernel"], dy),
        ),
        "conv2 kernel gradient": (
            lambda h, k, dy: jax.vjp(lambda k: second(h, k), k)[1](dy),
            *(h, conv2["kernel"], dy),
        ),
        "predictions and routing forward": (capsjax.dense_capsules, u, weight),
        "predictions and routing with gradients": (
            lambda u, w, v: jax.vjp(capsjax.dense_capsules, u, w)[1](v),
            *(u, weight, v),
        ),
        "decoder with gradients": (jax.grad(draw, (0, 1)), layers, v),
        "optimiser": (adam, params, optimizer.init(params), params),
    }

    def task(function: Any, *arguments: Any) -> Callable[[], None]:
        compiled = jax.jit(function)
        return lambda: jax.block_until_ready(compiled(*arguments))

    peaks = {
        "matrix product": (jnp.matmul, *jnp.ones((2, _SIDE, _SIDE))),
        "copy": (jnp.negative, jnp.ones(_LENGTH)),
    }
    return {name: task(*stage) for name, stage in (stages | peaks).items()}


def torch_tasks(batch: int) -> dict[str, Callable[[], None]]:
    import jax
    import torch
    from flax import nnx
    from torch.nn import functional

    import torch_capsnet
    from benchmark_worker import network

    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(network(3))[1]))
    net = torch_capsnet.CapsNet(params)
    tensors = {name: torch.from_numpy(array) for name, array in arrays(batch).items()}
    x, h, dy = (tensors[name].permute(0, 3, 1, 2).contiguous() for name in ("x", "h", "dy"))
    u, v = tensors["u"], tensors["v"]
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def forward(function: Callable, *inputs: Any) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                function(*inputs)

        return run

    def backward(function: Callable, wanted: Any, cotangent: Any = None) -> Callable[[], None]:
        """The gradient alone: the graph is kept from one forward pass."""
        output = function()
        return lambda: torch.autograd.grad(output, wanted, cotangent, retain_graph=True)

    def both(function: Callable, wanted: Any, cotangent: Any = None) -> Callable[[], None]:
        return lambda: torch.autograd.grad(function(), wanted, cotangent)

    image, capsules, classes = h.clone(), u.clone(), v.clone()
    for leaf in (image, capsules, classes):
        leaf.requires_grad_()
    kernel1, kernel2, bias = net.conv1.weight, net.conv2.weight, net.conv2.bias

    def layer() -> Any:
        u_hat = torch.matmul(net.weight, capsules[:, None, :, :, None]).squeeze(-1)
        return net.route(u_hat)

    def draw() -> Any:
        kept = classes.clone()
        kept[:, 1:] = 0
        return functional.mse_loss(net.decoder(kept.flatten(1)), x.flatten(1))

    return {
        "conv1 forward": forward(net.conv1, x),
        "conv1 kernel gradient": backward(lambda: net.conv1(x), (kernel1, net.conv1.bias), h),
        "conv2 forward": forward(net.conv2, h),
        "conv2 image gradient": backward(
            lambda: functional.conv2d(image, kernel2.detach(), bias, 2), (image,), dy
        ),
        "conv2 kernel gradient": backward(lambda: net.conv2(h), (kernel2,), dy),
        "predictions and routing forward": forward(layer),
        "predictions and routing with gradients": both(layer, (net.weight, capsules), v),
        "decoder with gradients": both(draw, (classes, *net.decoder.parameters())),
        "optimiser": optimizer.step,
    }


TASKS = {"capsjax": capsjax_tasks, "torch": torch_tasks}
