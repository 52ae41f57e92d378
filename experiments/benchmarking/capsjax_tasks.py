"""The tasks that are timed in capsjax: train step, forward pass, and the stages of a step."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import capsjax
from benchmarking.contender import LAM_RECON, Contender, Inputs, Tasks, parameters_of
from benchmarking.stages import COPY, LENGTH, PRODUCT, SIDE, draw_arrays
from capsjax import data, sharding, weights
from capsjax._conv import conv
from capsjax._losses import Loss
from capsjax.networks import (
    CapsNetConfig,
    CNNConfig,
    EfficientCapsNetConfig,
    MatrixCapsNetConfig,
)
from capsjax.networks._config_json import with_iterations
from capsjax.tasks import Classification
from capsjax.train import Setup, create, jit_steps

# The networks that are timed. A dropout would draw other masks in each library.
CONFIGS: dict[str, Any] = {
    "capsnet": CapsNetConfig(),
    "efficient": EfficientCapsNetConfig(),
    "matrix": MatrixCapsNetConfig(),
    "cnn": CNNConfig(dropout=0),
}
LOSSES: dict[str, Loss] = {
    "capsnet": "margin",
    "efficient": "margin",
    "matrix": "spread",
    "cnn": "cross_entropy",
}
Stages = dict[str, tuple[Any, ...]]  # a function and its arguments


def write_inputs(path: Path, images: int) -> None:
    """Writes the images and initial parameters that all contenders share."""
    mnist = data.load()
    arrays: dict[str, Any] = {"x": mnist.x_train[:images], "y": mnist.y_train[:images]}
    arrays |= {"x_test": mnist.x_test, "y_test": mnist.y_test}
    for network in CONFIGS:
        for name, array in weights.arrays_of(_build_network(network)).items():
            arrays[f"{network}/{name}"] = array
    np.savez(path, **arrays)


def _build_network(network: str, routings: int = 3) -> capsjax.Network:
    config = CONFIGS[network]
    if network == "capsnet":
        config = with_iterations(config, routings)
    return config.build(data.load().image_shape, 10, rngs=nnx.Rngs(0))


def make_step_tasks(contender: Contender, inputs: Inputs) -> tuple[Tasks, Tasks]:
    """Returns tasks to time, and figures known without timing."""
    optimizer, task = optax.adam(1e-3), _choose_task(contender.network)
    model = _build_network(contender.network, contender.routings)
    graphdef, state = create(model, optimizer, task)
    mesh = sharding.make_mesh(contender.batch_size, 1)
    step, evaluate = jit_steps(Setup(graphdef, optimizer, task, contender.dtype), mesh)
    images, labels = (inputs[name][: contender.batch_size] for name in ("x", "y"))
    x, y = sharding.replicate_images(mesh, images), sharding.replicate(mesh, labels)
    indices, key = np.arange(contender.batch_size, dtype=np.int32), jax.random.key(0)
    compiled, seconds = _compile(step, state, key, x, y, indices[None])

    def train() -> float:
        nonlocal state
        state, diagnostics = compiled(state, key, x, y, indices[None])
        jax.block_until_ready(state)
        return float(diagnostics.sums.losses["loss"]) / len(indices)

    def forward() -> None:
        jax.block_until_ready(evaluate(state, x, y, indices, indices >= 0))

    return {"train": train, "forward": forward}, {"compile": lambda: seconds}


def _choose_task(network: str) -> Classification:
    # The margin of the spread loss stays where it begins, as in PyTorch.
    return Classification(LAM_RECON, loss=LOSSES[network], margin_steps=10**9)


def _compile(step: Any, *arguments: Any) -> tuple[Callable, float]:
    """Compiles a step; returns it and the seconds that XLA took."""
    lowered = step.lower(*arguments)
    begin = time.perf_counter()
    compiled = lowered.compile()
    return compiled, time.perf_counter() - begin


def make_stage_tasks(inputs: Inputs, batch: int) -> Tasks:
    """Returns each stage of a step as a task to time, then the machine's peaks."""
    params = {name: jnp.asarray(a) for name, a in parameters_of("capsnet", inputs).items()}
    arrays = {name: jnp.asarray(array) for name, array in draw_arrays(batch).items()}
    stages = {
        **_list_conv_stages(params, arrays),
        **_list_capsule_stages(params, arrays),
        **_list_decoder_stages(params, arrays),
        **_list_optimizer_stages(params),
        PRODUCT: (jnp.matmul, *jnp.ones((2, SIDE, SIDE))),
        COPY: (jnp.negative, jnp.ones(LENGTH)),
    }
    return {name: _make_task(*stage) for name, stage in stages.items()}


def _list_conv_stages(params: Any, arrays: Any) -> Stages:
    x, h, dy, conv2 = arrays["x"], arrays["h"], arrays["dy"], partial(conv, strides=2)
    first = params["conv1.kernel"], params["conv1.bias"]
    second = params["primary.conv.kernel"], params["primary.conv.bias"]
    return {
        "conv1 forward": (conv, x, *first),
        "conv1 kernel gradient": (_differentiate(conv, 1, 2), x, *first, h),
        "conv2 forward": (conv2, h, *second),
        "conv2 image gradient": (_differentiate(conv2, 0), h, *second, dy),
        "conv2 kernel gradient": (_differentiate(conv2, 1, 2), h, *second, dy),
    }


def _list_capsule_stages(params: Any, arrays: Any) -> Stages:
    layer, inputs = capsjax.dense_capsules, (arrays["u"], params["class_caps.weight"])
    gradients = _differentiate(layer, 0, 1)
    return {
        "predictions and routing forward": (layer, *inputs),
        "predictions and routing with gradients": (gradients, *inputs, arrays["v"]),
    }


def _list_decoder_stages(params: Any, arrays: Any) -> Stages:
    layers = [(params[f"decoder.{n}.kernel"], params[f"decoder.{n}.bias"]) for n in range(3)]
    x, v = arrays["x"], arrays["v"]

    def compute_loss(layers: Any, v: Any) -> Any:
        pixels = capsjax.decode(layers, capsjax.mask(v, jnp.zeros(len(v), int)))
        return jnp.mean(capsjax.reconstruction_loss(pixels.reshape(x.shape), x))

    return {"decoder with gradients": (jax.grad(compute_loss, (0, 1)), layers, v)}


def _list_optimizer_stages(params: Any) -> Stages:
    optimizer = optax.adam(1e-3)

    def update(gradient: Any, state: Any, params: Any) -> Any:
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return {"optimiser": (update, params, optimizer.init(params), params)}


def _differentiate(function: Callable, *numbers: int) -> Callable:
    """Returns the gradient by some arguments; its last argument is the output's cotangent."""
    return lambda *a: [jax.vjp(function, *a[:-1])[1](a[-1])[n] for n in numbers]


def _make_task(function: Callable, *arguments: Any) -> Callable[[], Any]:
    compiled = jax.jit(function)
    return lambda: jax.block_until_ready(compiled(*arguments))
