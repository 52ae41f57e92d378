"""One network in one file: safetensors, weights of PyTorch code, an exported function."""

import io
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from jax import export as jax_export
from safetensors import SafetensorError, safe_open

from capsjax._files import write_atomically
from capsjax._trees import WeightsError, fill, named_leaves
from capsjax.nn import CapsNet, predict
from capsjax.presets import PRESETS

_VERSION = 1  # of what `save` writes


def save(model: CapsNet, path: str | Path) -> None:
    """Writes a network to one safetensors file, whole or not at all.

    The file's metadata hold the architecture, so that the file alone rebuilds the network, the name
    of the preset with that architecture, if there is one, and a CRC-32 of everything.

    Args:
      model: a `CapsNet`.
      path: of the file, as `mnist.safetensors`; one that is there is replaced.

    Raises:
      OSError: if it cannot be written.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> import capsjax, capsjax.weights
      >>> net = capsjax.nn.CapsNet(channels=16, types=2, rngs=nnx.Rngs(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     capsjax.weights.save(net, folder + "/net.safetensors")
      ...     again = capsjax.weights.load(folder + "/net.safetensors")
      >>> again.image_shape
      (28, 28, 1)

    References:
      https://github.com/huggingface/safetensors
    """
    arrays = _arrays(model)
    architecture = _architecture(model)
    about = {
        "version": _VERSION,
        "preset": next((n for n, p in PRESETS.items() if _is_of(architecture, p.model)), None),
        "architecture": architecture,
    }
    # One entry, for several come in another order in every file.
    metadata = {"capsjax": json.dumps({**about, "crc32": _digest(arrays, about)})}
    with write_atomically(Path(path)) as part:
        part.write_bytes(safetensors.numpy.save(arrays, metadata))


def load(
    path: str | Path,
    *,
    image_shape: tuple[int, int, int] | None = None,
    routings: int | None = None,
) -> CapsNet:
    """Reads a network from a file: what `save` wrote, or weights of PyTorch as `from_torch` takes.

    A file of PyTorch, .pt, .pth or .pkl, is a pickle, which could hold any code: it is read by
    `torch.load(…, weights_only=True)` and nothing else, and so needs the extra `torch`.

    Args:
      path: of the file; any other ending than those three is taken for safetensors.
      image_shape: (H, W, C) for weights of PyTorch, which do not say; None: H = W.
      routings: iterations of routing; None: those of the file, 3 for weights of PyTorch.

    Returns:
      The `CapsNet`.

    Raises:
      WeightsError: if the file is of another kind, cut short, altered, or holds more than weights,
        or if PyTorch is needed and not installed.
      OSError: if it cannot be read.

    Example:
      See `save`.
    """
    path = Path(path)
    entry = None
    if path.suffix in _PICKLES:
        arrays = _unpickle(path)
    else:
        entry, arrays = _read_safetensors(path)
    if entry is not None:
        sizes = _checked(path, entry, arrays)
        return _build(sizes | ({"routings": routings} if routings else {}), arrays)
    try:
        return from_torch(arrays, image_shape=image_shape, routings=routings or 3)
    except WeightsError as error:
        other = "" if path.suffix in _PICKLES else "was not written by capsjax.weights.save, and "
        raise WeightsError(f"{path} {other}is not of XifengGuo's PyTorch code: {error}") from error


def describe(path: str | Path) -> tuple[str | None, int] | None:
    """What a file of `save` says of its network, read without its arrays.

    Args:
      path: of the file.

    Returns:
      The name of its preset, or None, and its iterations of routing, not yet checked as `load`
      checks them. None for any other file.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> import capsjax, capsjax.weights
      >>> net = capsjax.nn.CapsNet(channels=16, types=2, routings=5, rngs=nnx.Rngs(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     capsjax.weights.save(net, folder + "/net.safetensors")
      ...     capsjax.weights.describe(folder + "/net.safetensors")
      (None, 5)
    """
    try:
        with safe_open(path, "numpy") as file:
            about = json.loads((file.metadata() or {})["capsjax"])
        return about["preset"], about["architecture"]["routings"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None


def from_torch(
    state_dict: Mapping[str, Any],
    *,
    image_shape: tuple[int, int, int] | None = None,
    routings: int = 3,
) -> CapsNet:
    """Makes a network of weights that XifengGuo/CapsNet-Pytorch's code trained.

    Its capsules are 8 neighbouring values of the flattened [C, H, W], so the network has
    `grouping="flat"`; its decoder draws pixels as C, H, W, which are turned to H, W, C.

    Args:
      state_dict: tensors or arrays by name: `conv1.*`, `primarycaps.conv2d.*`,
        `digitcaps.weight`, `decoder.{0,2,4}.*`. `load` reads one from a file.
      image_shape: (H, W, C); None: H = W, as follows from the decoder.
      routings: iterations of routing; weights do not say.

    Returns:
      A `CapsNet` with the outputs of the PyTorch network.

    Raises:
      WeightsError: if an array is missing, left over, or of a shape that does not fit.

    Example:
      >>> from flax import nnx
      >>> import capsjax, capsjax.weights
      >>> net = capsjax.nn.CapsNet(channels=16, types=2, grouping="flat", rngs=nnx.Rngs(0))
      >>> state_dict = capsjax.weights.to_torch(net)
      >>> capsjax.weights.from_torch(state_dict).image_shape
      (28, 28, 1)

    References:
      XifengGuo/CapsNet-Pytorch, capsulenet.py.
    """
    theirs = {name.removeprefix("module."): _array(value) for name, value in state_dict.items()}
    if missing := sorted(set(_TORCH_NAMES) - set(theirs)):
        raise WeightsError(f"expected the arrays {', '.join(_TORCH_NAMES)}; missing: {missing}")
    if left := sorted(set(theirs) - set(_TORCH_NAMES)):
        raise WeightsError(f"expected the arrays {', '.join(_TORCH_NAMES)}; left over: {left}")
    for name, ndim in _TORCH_NAMES.items():
        if theirs[name].ndim != ndim:
            raise WeightsError(f"expected {name} with {ndim} axes, got {list(theirs[name].shape)}")
    depth, pixels = theirs["conv1.weight"].shape[1], theirs["decoder.4.bias"].size
    if image_shape is None:
        side = math.isqrt(pixels // depth)
        image_shape = side, side, depth
    if math.prod(image_shape) != pixels or image_shape[2:] != (depth,):
        raise WeightsError(
            f"the decoder draws {pixels} numbers of {depth} channels, which are no image of "
            f"{image_shape}; give image_shape=(H, W, C)"
        )
    classes, _, dim_class, dim_primary = theirs["digitcaps.weight"].shape
    architecture = {
        "image_shape": list(image_shape),
        "classes": classes,
        "routings": routings,
        "channels": theirs["conv1.weight"].shape[0],
        "kernel_size": theirs["conv1.weight"].shape[2],
        "types": theirs["primarycaps.conv2d.weight"].shape[0] // dim_primary,
        "dim_primary": dim_primary,
        "dim_class": dim_class,
        "hidden": [theirs["decoder.0.bias"].size, theirs["decoder.2.bias"].size],
        "grouping": "flat",
    }
    height, width, _ = image_shape
    order = np.arange(pixels).reshape(depth, height, width).transpose(1, 2, 0).ravel()
    return _build(architecture, _from_torch_order(theirs, order))


def to_torch(model: CapsNet) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: the weights under PyTorch's names and in its order of axes.

    Args:
      model: a `CapsNet` with `grouping="flat"`, two hidden layers in its decoder, and all else as
        in the preset `seed`, for the PyTorch code has nothing else.

    Returns:
      NumPy arrays; `{name: torch.from_numpy(array) for name, array in …}` is a state dict.

    Raises:
      WeightsError: if the network is another one.

    Example:
      See `from_torch`.
    """
    architecture = _architecture(model)
    expected = {
        "grouping": "flat",
        "routing_bias": False,
        "primary_coupling": 1.0,
        "stop_gradient": True,
    }
    for name, value in expected.items():
        if architecture[name] != value:
            raise WeightsError(
                f"the PyTorch code knows only {name}={value!r}, this network has "
                f"{architecture[name]!r}"
            )
    if len(architecture["hidden"]) != 2:
        raise WeightsError(f"the decoder must have 2 hidden layers, has {architecture['hidden']}")
    height, width, depth = model.image_shape
    order = np.arange(height * width * depth).reshape(height, width, depth).transpose(2, 0, 1)
    return _to_torch_order(_arrays(model), order.ravel())


def export(
    model: CapsNet, path: str | Path, platforms: Sequence[str] = ("cpu", "cuda", "tpu")
) -> None:
    """Writes `predict` with the network's weights to one file that runs without capsjax.

    `jax.export.deserialize(file.read()).call(images)` takes images [B, H, W, C], float32 from 0
    to 1, any number of them, and returns classes, lengths and reconstruction.

    Args:
      model: a `CapsNet`.
      path: of the file; one that is there is replaced.
      platforms: what it shall run on.

    Raises:
      OSError: if it cannot be written.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import capsjax, capsjax.weights
      >>> net = capsjax.nn.CapsNet(channels=16, types=2, rngs=nnx.Rngs(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     capsjax.weights.export(net, folder + "/net.jax")
      ...     function = jax.export.deserialize(bytearray(Path(folder, "net.jax").read_bytes()))
      >>> classes, lengths, reconstruction = function.call(jnp.ones((2, 28, 28, 1)))
      >>> lengths.shape
      (2, 10)

    References:
      https://docs.jax.dev/en/latest/export
    """

    def function(images: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(predict(model, images))  # a plain tuple: a file knows no class of ours

    (batch,) = jax_export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *model.image_shape), jnp.float32)
    content = jax_export.export(jax.jit(function), platforms=platforms)(images).serialize()
    with write_atomically(Path(path)) as part:
        part.write_bytes(content)


_PICKLES = (".pt", ".pth", ".pkl")


def _read_safetensors(path: Path) -> tuple[str | None, dict[str, np.ndarray]]:
    """What `save` wrote of the network, if it did, and the arrays."""
    try:
        with safe_open(path, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return (file.metadata() or {}).get("capsjax"), arrays
    except SafetensorError as error:
        raise WeightsError(f"{path} is no safetensors file, or damaged: {error}") from error


def _unpickle(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a state dict that PyTorch saved."""
    content = io.BytesIO(path.read_bytes())
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            f"{path} is a pickle, which PyTorch alone reads safely: "
            "python -m pip install 'capsjax[torch]'"
        ) from error
    try:
        tensors = torch.load(content, map_location="cpu", weights_only=True)
        return {name: _array(tensor) for name, tensor in tensors.items()}
    except Exception as error:  # a damaged pickle makes it raise anything
        raise WeightsError(
            f"{path} is refused: it is damaged, or holds more than weights by their names "
            f"({type(error).__name__})"
        ) from error


def _checked(path: Path, entry: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The architecture that `save` wrote beside the arrays."""
    try:
        about = json.loads(entry)
        digest, version, architecture = (about[n] for n in ("crc32", "version", "architecture"))
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} is damaged: its metadata cannot be read") from error
    if digest != _digest(arrays, {n: value for n, value in about.items() if n != "crc32"}):
        raise WeightsError(f"{path} was altered after it was written: its checksum differs")
    if version != _VERSION:
        raise WeightsError(
            f"{path} is of version {version}, this capsjax reads version {_VERSION}: update capsjax"
        )
    return architecture


# Axes of each array of the PyTorch code.
_TORCH_NAMES = {
    "conv1.weight": 4,
    "conv1.bias": 1,
    "primarycaps.conv2d.weight": 4,
    "primarycaps.conv2d.bias": 1,
    "digitcaps.weight": 4,
    **{
        f"decoder.{n}.{kind}": axes
        for n in (0, 2, 4)
        for kind, axes in (("weight", 2), ("bias", 1))
    },
}


def _from_torch_order(theirs: Mapping[str, np.ndarray], order: np.ndarray) -> dict[str, np.ndarray]:
    """Our names and axes; `order` says which of their pixels each of ours is."""
    ours = {"classes.weight": theirs["digitcaps.weight"]}
    for layer, name in (("conv1", "conv1"), ("primary.conv", "primarycaps.conv2d")):
        ours[f"{layer}.kernel"] = theirs[f"{name}.weight"].transpose(2, 3, 1, 0)
        ours[f"{layer}.bias"] = theirs[f"{name}.bias"]
    for n in range(3):
        kernel, bias = theirs[f"decoder.{2 * n}.weight"].T, theirs[f"decoder.{2 * n}.bias"]
        ours[f"decoder.{n}.kernel"] = kernel[:, order] if n == 2 else kernel
        ours[f"decoder.{n}.bias"] = bias[order] if n == 2 else bias
    return ours


def _to_torch_order(ours: Mapping[str, np.ndarray], order: np.ndarray) -> dict[str, np.ndarray]:
    """Their names and axes; `order` says which of our pixels each of theirs is."""
    theirs = {"digitcaps.weight": ours["classes.weight"]}
    for layer, name in (("conv1", "conv1"), ("primary.conv", "primarycaps.conv2d")):
        theirs[f"{name}.weight"] = ours[f"{layer}.kernel"].transpose(3, 2, 0, 1)
        theirs[f"{name}.bias"] = ours[f"{layer}.bias"]
    for n in range(3):
        kernel, bias = ours[f"decoder.{n}.kernel"], ours[f"decoder.{n}.bias"]
        theirs[f"decoder.{2 * n}.weight"] = (kernel[:, order] if n == 2 else kernel).T
        theirs[f"decoder.{2 * n}.bias"] = bias[order] if n == 2 else bias
    return {name: np.ascontiguousarray(theirs[name]) for name in _TORCH_NAMES}


def _architecture(model: CapsNet) -> dict[str, Any]:
    """The arguments of `CapsNet` that rebuild it, but for its first values."""
    weight, layers = model.classes.weight[...], list(model.decoder)
    kernel_size, _, _, channels = model.conv1.kernel[...].shape
    return {
        "image_shape": list(model.image_shape),
        "classes": weight.shape[0],
        "routings": model.classes.routings,
        "channels": channels,
        "kernel_size": kernel_size,
        "types": model.primary.conv.bias[...].size // model.primary.dim_caps,
        "dim_primary": model.primary.dim_caps,
        "dim_class": weight.shape[2],
        "hidden": [layer.bias[...].size for layer in layers[:-1]],
        "grouping": model.primary.grouping,
        "primary_coupling": model.primary.coupling,
        "routing_bias": model.classes.bias is not None,
        "stop_gradient": model.classes.stop_gradient,
    }


def _is_of(architecture: Mapping[str, Any], preset: Any) -> bool:
    return all(
        list(value) == architecture[name] if name == "hidden" else value == architecture[name]
        for name, value in vars(preset).items()
        if name != "init"
    )


def _build(architecture: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> CapsNet:
    sizes: dict[str, Any] = {
        n: tuple(v) if isinstance(v, list) else v for n, v in architecture.items()
    }
    try:
        abstract = nnx.eval_shape(lambda: CapsNet(**sizes, rngs=nnx.Rngs(0)))
    except (TypeError, ValueError) as error:
        raise WeightsError(f"no network has this architecture: {error}") from error
    graphdef, variables = nnx.split(abstract)
    template = nnx.to_pure_dict(variables)
    params = jax.tree.map(jnp.asarray, fill(template, dict(arrays)))
    return nnx.merge(graphdef, nnx.State(params))


def _arrays(model: CapsNet) -> dict[str, np.ndarray]:
    params = nnx.to_pure_dict(nnx.split(model)[1])
    # float32 whatever the model was cast to: what a network is rebuilt with.
    return {name: np.ascontiguousarray(leaf, np.float32) for name, leaf in named_leaves(params)}


def _array(value: Any) -> np.ndarray:
    """A PyTorch tensor or an array, as float32."""
    tensor = value.detach().cpu().float() if hasattr(value, "detach") else value
    return np.asarray(tensor, np.float32)


def _digest(arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> int:
    crc = zlib.crc32(json.dumps(about, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        crc = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), crc)
        crc = zlib.crc32(array.data, crc)
    return crc
