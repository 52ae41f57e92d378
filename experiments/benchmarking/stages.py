"""The parts of a train step, one by one, in capsjax and in PyTorch, and what they must cost."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

Task = Callable[[], Any]

_CONV1, _CONV2 = 20 * 20 * 81 * 256, 6 * 6 * 81 * 256 * 256  # multiplications for an image
_PREDICTIONS = 10 * 1152 * 8 * 16
_DECODER = 160 * 512 + 512 * 1024 + 1024 * 784
_PARAMETERS = 8_215_568
_IMAGE, _MAPS, _OUT = 28 * 28, 20 * 20 * 256, 6 * 6 * 256  # numbers of an image
_K1, _K2, _W = 81 * 256, 81 * 256 * 256, 10 * 1152 * 16 * 8  # numbers in the weights
PEAKS = PRODUCT, COPY = "matrix product", "copy"  # what the machine can do at most
_SIDE, _LENGTH = 2048, 2**26  # of the arrays that tell


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
        # û once; then three sums and two agreements over it, each 1/8 of that.
        "predictions and routing forward": (_PREDICTIONS * 13 / 8, _OUT + 160, _W),
        "predictions and routing with gradients": (
            *(_PREDICTIONS * (3 + 6 / 8), 2 * (_OUT + 160), 2 * _W),
        ),
        "decoder with gradients": (3 * _DECODER, 160 + 2 * _IMAGE, 2 * _DECODER),
        "optimiser": (0, 0, 7 * _PARAMETERS),
    }
    stages = {
        name: Cost(2 * batch * products, 4 * (batch * each + once))
        for name, (products, each, once) in numbers.items()
    }
    return stages | dict(zip(PEAKS, (Cost(2 * _SIDE**3, 0), Cost(0, 8 * _LENGTH)), strict=True))


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


def capsjax_tasks(inputs: Mapping[str, np.ndarray], batch: int) -> dict[str, Task]:
    import jax
    import jax.numpy as jnp
    import optax

    import capsjax
    from capsjax._conv import conv

    params = {name: jnp.asarray(a) for name, a in inputs.items() if name not in ("x", "y")}
    first = params["conv1.kernel"], params["conv1.bias"]
    second = params["primary.conv.kernel"], params["primary.conv.bias"]
    layers = [(params[f"decoder.{n}.kernel"], params[f"decoder.{n}.bias"]) for n in range(3)]
    x, h, dy, u, v = (jnp.asarray(array) for array in arrays(batch).values())
    conv2, capsules = partial(conv, strides=2), (u, params["classes.weight"])
    optimizer = optax.adam(1e-3)

    def gradients(function: Callable, *numbers: int) -> Callable:
        """Of some arguments; the output's cotangent comes as one more."""
        return lambda *a: [jax.vjp(function, *a[:-1])[1](a[-1])[n] for n in numbers]

    def draw(layers: Any, v: Any) -> Any:
        pixels = capsjax.decode(layers, capsjax.mask(v, jnp.zeros(batch, int))).reshape(x.shape)
        return jnp.mean(capsjax.reconstruction_loss(pixels, x))

    def adam(gradient: Any, state: Any, params: Any) -> Any:
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    stages: dict[str, tuple[Any, ...]] = {
        "conv1 forward": (conv, x, *first),
        "conv1 kernel gradient": (gradients(conv, 1, 2), x, *first, h),
        "conv2 forward": (conv2, h, *second),
        "conv2 image gradient": (gradients(conv2, 0), h, *second, dy),
        "conv2 kernel gradient": (gradients(conv2, 1, 2), h, *second, dy),
        "predictions and routing forward": (capsjax.dense_capsules, *capsules),
        "predictions and routing with gradients": (
            *(gradients(capsjax.dense_capsules, 0, 1), *capsules, v),
        ),
        "decoder with gradients": (jax.grad(draw, (0, 1)), layers, v),
        "optimiser": (adam, params, optimizer.init(params), params),
        PRODUCT: (jnp.matmul, *jnp.ones((2, _SIDE, _SIDE))),
        COPY: (jnp.negative, jnp.ones(_LENGTH)),
    }

    def task(function: Callable, *arguments: Any) -> Task:
        compiled = jax.jit(function)
        return lambda: jax.block_until_ready(compiled(*arguments))

    return {name: task(*stage) for name, stage in stages.items()}


def torch_tasks(inputs: Mapping[str, np.ndarray], batch: int) -> dict[str, Task]:
    import torch
    from torch.nn import functional

    import torch_capsnet

    net = torch_capsnet.CapsNet(inputs)
    tensors = {name: torch.from_numpy(array) for name, array in arrays(batch).items()}
    x, h, dy = (tensors[name].permute(0, 3, 1, 2).contiguous() for name in ("x", "h", "dy"))
    u, v = (tensors[name].requires_grad_() for name in ("u", "v"))
    image, cotangent = h.clone().requires_grad_(), v.detach()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def forward(function: Callable) -> Task:
        return torch.no_grad()(function)

    def gradients(function: Callable, wanted: Any, cotangent: Any) -> Task:
        """These alone: the graph is kept from one forward pass."""
        output = function()
        return lambda: torch.autograd.grad(output, wanted, cotangent, retain_graph=True)

    def both(function: Callable, wanted: Any, cotangent: Any = None) -> Task:
        return lambda: torch.autograd.grad(function(), wanted, cotangent)

    def layer() -> Any:
        return net.route(net.predict(u))

    def draw() -> Any:
        kept = torch.cat([v[:, :1], torch.zeros_like(v[:, 1:])], 1)
        return functional.mse_loss(net.decoder(kept.flatten(1)), x.flatten(1))

    return {
        "conv1 forward": forward(lambda: net.conv1(x)),
        "conv1 kernel gradient": gradients(lambda: net.conv1(x), [*net.conv1.parameters()], h),
        "conv2 forward": forward(lambda: net.conv2(h)),
        "conv2 image gradient": gradients(lambda: net.conv2(image), [image], dy),
        "conv2 kernel gradient": gradients(lambda: net.conv2(h), [*net.conv2.parameters()], dy),
        "predictions and routing forward": forward(layer),
        "predictions and routing with gradients": both(layer, [net.weight, u], cotangent),
        "decoder with gradients": both(draw, [v, *net.decoder.parameters()]),
        "optimiser": optimizer.step,
    }


TASKS = {"capsjax": capsjax_tasks, "torch": torch_tasks}
