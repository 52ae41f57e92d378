"""What XLA makes of the train step for a chip: arithmetic, bytes, kernels, read off its text."""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental.layout import Format
from jax.sharding import Mesh

import capsjax
from benchmarking.contender import LAM_RECON
from capsjax.sharding import IMAGE_LAYOUT, PlacedImages, replicated
from capsjax.tasks import Classification
from capsjax.train import Setup, create, jit_steps

_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "u8": 1, "s8": 1, "pred": 1}
_KERNELS = "fusion|custom-call|sort|copy|reduce|transpose"
_COLLECTIVES = "(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(-start)?$"
_DEFINITION = re.compile(r"^\s+(?:ROOT )?(%[\w.-]+) = (.*?) ([\w-]+)\((.*)", re.MULTILINE)
_CUDNN = re.compile(
    r"^\s*(?:ROOT )?(%[\w.-]+) = .* custom-call\(([^)]*)\), window={([^}]*)}, "
    r'dim_labels=\w+_(\w+)->(\w+), custom_call_target="__cudnn\$(\w+)"'
)


class Program(NamedTuple):
    """What a compiled train step costs each chip."""

    flop: float  # of convolutions, where they are the library's; of everything on a TPU
    bytes: float  # operands and results of all its operations, the whole data set of a gather too
    temporaries: int  # bytes
    kernels: int  # operations that are launched one after the other
    exchanged: int  # bytes that all chips add up or send to each other


def inspect_step(mesh: Mesh, dtype: str, batch: int) -> Program:
    """Compiles CapsNet's train step for a mesh, and counts."""
    program = compile_step(mesh, dtype, batch)
    text, memory = program.as_text(), program.memory_analysis().temp_size_in_bytes
    if mesh.devices.flat[0].platform == "tpu":
        costs = program.cost_analysis()
        flop, moved = costs["flops"], costs["bytes accessed"]
    else:
        flop, moved = count_convolutions(text), count_traffic(text)
    return Program(flop, moved, memory, count_kernels(text), count_exchanged(text))


def compile_step(mesh: Mesh, dtype: str, batch: int) -> Any:
    """Compiles CapsNet's train step on MNIST for a mesh of chips that need not be here."""
    optimizer, task = optax.adam(1e-3), Classification(LAM_RECON, shift_pixels=2)
    graph: dict[str, nnx.GraphDef] = {}

    def make_state() -> Any:
        graph["def"], state = create(capsjax.CapsNet(rngs=nnx.Rngs(0)), optimizer, task)
        return state

    state = jax.eval_shape(make_state)
    step: Any = jit_steps(Setup(graph["def"], optimizer, task, dtype), mesh)[0]
    shape = jax.ShapeDtypeStruct
    where = Format(IMAGE_LAYOUT, replicated(mesh))
    pixels: Any = shape((60000, 28, 28), jnp.uint8, sharding=where)
    images = PlacedImages(pixels, channels=1)
    labels = shape((60000,), jnp.int32)
    key, order = (
        jax.eval_shape(lambda: jax.random.key(0)),
        shape((60000 // batch, batch), jnp.int32),
    )
    return step.lower(state, key, images, labels, order).compile()


def count_convolutions(text: str) -> float:
    """Counts the floating-point operations of all cuDNN convolutions in a program's text."""
    sizes = re.finditer(r"(%[\w.-]+) = \(?\w+\[([\d,]+)\]", text)
    shapes = {match[1]: [int(n) for n in match[2].split(",")] for match in sizes}
    lines = [line for line in text.splitlines() if 'custom_call_target="__cudnn$conv' in line]
    calls = [match.groups() for line in lines if (match := _CUDNN.match(line))]
    if not calls or len(calls) < len(lines):
        raise ValueError("the compiler's text has another form than the one that is read here")
    return sum(_count_convolution(shapes, *call) for call in calls)


def _count_convolution(
    shapes: dict[str, list[int]],
    name: str,
    operands: str,
    window: str,
    kernel_dims: str,
    out_dims: str,
    kind: str,
) -> float:
    a, b = (shapes[operand.strip()] for operand in operands.split(",")[:2])
    if kind == "convBackwardFilter":  # image, gradient -> kernel
        inputs, positions = shapes[name], _spatial(b, out_dims)
    elif kind == "convBackwardInput":  # gradient, kernel -> image
        inputs, positions = b, _spatial(a, out_dims)
    else:
        inputs, positions = shapes[name], [*_window(window), b[kernel_dims.index("i")]]
    return 2.0 * math.prod(inputs) * math.prod(positions)


def _spatial(shape: list[int], dims: str) -> list[int]:
    return [n for n, letter in zip(shape, dims, strict=True) if letter != "f"]


def _window(window: str) -> list[int]:
    """Returns the taps along each axis."""
    match = re.search(r"size=([\dx]+)", window)
    return [int(n) for n in match[1].split("x")] if match else []


def count_traffic(text: str) -> int:
    """Counts the bytes of operands and results of all operations of the entry computation."""
    sizes: dict[str, int] = {}
    traffic = 0
    for name, kind, operation, rest in _DEFINITION.findall(text[text.index("ENTRY") :]):
        sizes[name] = _count_bytes(kind)
        if operation not in ("parameter", "get-tuple-element", "bitcast", "tuple", "constant"):
            operands = re.findall(r"%[\w.-]+", rest.split("), ")[0])
            traffic += sizes[name] + sum(sizes.get(operand, 0) for operand in operands)
    return traffic


def count_exchanged(text: str) -> int:
    """Counts the bytes that all collective operations return, some with their operands."""
    found = _DEFINITION.findall(text)
    return sum(_count_bytes(kind) for _, kind, name, _ in found if re.match(_COLLECTIVES, name))


def _count_bytes(kind: str) -> int:
    """Returns the bytes of an array, or of a tuple of arrays."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", kind)
    shapes = [[int(n) for n in shape.split(",") if n] for _, shape in arrays]
    widths = [_BYTES.get(dtype, 4) for dtype, _ in arrays]
    return sum(width * math.prod(shape) for width, shape in zip(widths, shapes, strict=True))


def count_kernels(text: str) -> int:
    """Returns the number of kernels that a step launches."""
    pattern = rf"^\s+(?:ROOT )?%[\w.-]+ = .* (?:{_KERNELS})\("
    return len(re.findall(pattern, text[text.index("ENTRY") :], re.MULTILINE))
