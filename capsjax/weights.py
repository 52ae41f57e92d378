"""One network in one file: safetensors, weights of PyTorch code, an exported function."""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from jax import export as jax_export
from safetensors import SafetensorError, safe_open

from capsjax._files import write_atomically
from capsjax._torch import PICKLE_SUFFIXES, convert_from_torch, convert_to_torch, unpickle
from capsjax._trees import WeightsError, fill, named_leaves
from capsjax.networks import NETWORKS, CapsNet, Network, NetworkConfig, predict
from capsjax.networks._config_json import config_from_json, config_to_json, with_iterations

_VERSION = 2  # of what `save` writes


class Description(NamedTuple):
    """What a file of `save` tells of its network."""

    config: NetworkConfig
    image_shape: tuple[int, int, int]
    num_classes: int
    notes: dict[str, Any]  # what `save` was given


def save(
    model: Network,
    path: str | Path,
    notes: Mapping[str, Any] | None = None,
    *,
    dtype: str = "float32",
) -> None:
    """Writes a network to one safetensors file, whole or not at all.

    The file's metadata hold the network's name, config, image shape and class count, so that the
    file alone rebuilds the network; also the notes, and a CRC-32 of everything.

    Args:
      model: any `Network`.
      path: of the file, such as `mnist.safetensors`; one that is there is replaced.
      notes: anything JSON holds, such as the preset and the test error; `describe` returns them.
      dtype: of the floats in the file, "float32", or "float16" for half the size at 11 bits of
        precision; `load` returns float32.

    Raises:
      OSError: if the file cannot be written.
      TypeError: if JSON cannot hold the notes or the network's config.
      ValueError: if `dtype` is another one.
      WeightsError: if a number is beyond the range of `dtype`.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> import capsjax
      >>> net = capsjax.CapsNet(channels=16, types=2, rngs=nnx.Rngs(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     capsjax.weights.save(net, folder + "/net.safetensors")
      ...     loaded = capsjax.weights.load(folder + "/net.safetensors")
      >>> loaded.image_shape
      (28, 28, 1)

    References:
      https://github.com/huggingface/safetensors
    """
    if dtype not in ("float32", "float16"):
        raise ValueError(f"save: dtype is float32 or float16, got {dtype!r}")
    arrays = {name: _to(dtype, name, array) for name, array in arrays_of(model).items()}
    about = {
        "version": _VERSION,
        "network": config_to_json(model.config),
        "image_shape": list(model.image_shape),
        "num_classes": model.num_classes,
        "notes": dict(notes or {}),
    }
    # The checksum is that of what is read back: JSON turns keys into strings, tuples into lists.
    about = json.loads(json.dumps(about))
    # A single entry, because the order of several differs from file to file.
    metadata = {"capsjax": json.dumps({**about, "crc32": _digest(arrays, about)})}
    with write_atomically(Path(path)) as part:
        part.write_bytes(safetensors.numpy.save(arrays, metadata))


def load(
    path: str | Path,
    *,
    image_shape: tuple[int, int, int] | None = None,
    routings: int | None = None,
) -> Network:
    """Reads a network from a file: what `save` wrote, or weights of PyTorch as in `from_torch`.

    A file of PyTorch (.pt, .pth or .pkl) is a pickle, which could hold any code. It is read by
    `torch.load(…, weights_only=True)` only, which needs the extra `torch`.

    Args:
      path: of the file; any other suffix than those three means safetensors.
      image_shape: (H, W, C) for weights of PyTorch, which do not say it; None: H = W.
      routings: iterations of routing; None: the file's, or 3 for weights of PyTorch.

    Returns:
      The `Network` in evaluation mode; its method `train()` puts it into training mode.

    Raises:
      WeightsError: if the file is of another kind, truncated, altered, or holds more than weights;
        if `capsjax.NETWORKS` lacks its network; or if PyTorch is needed and not installed.
      ValueError: if `routings` is less than 1, or the network has no iterations of routing.
      OSError: if the file cannot be read.

    Example:
      See `save`.
    """
    path = Path(path)
    if path.is_dir():
        file = path / "weights.safetensors"  # as a run names it
        raise IsADirectoryError(f"{path} is a folder; give a file, such as {file}")
    entry = None
    if path.suffix in PICKLE_SUFFIXES:
        arrays = unpickle(path)
    else:
        entry, arrays = _read_safetensors(path)
    if entry is not None:
        config, image_shape, num_classes, _ = _check(path, entry, arrays)
        if routings is not None:
            config = with_iterations(config, routings)
        return _build(config, image_shape, num_classes, arrays)
    try:
        routings = 3 if routings is None else routings
        return from_torch(arrays, image_shape=image_shape, routings=routings)
    except WeightsError as error:
        reason = "is not of XifengGuo's PyTorch code"
        if path.suffix not in PICKLE_SUFFIXES:
            reason = f"was not written by capsjax.weights.save, and {reason}"
        raise WeightsError(f"{path} {reason}: {error}") from error


def describe(path: str | Path) -> Description | None:
    """Reads what a file of `save` tells of its network, without its arrays or its checksum.

    Args:
      path: of the file.

    Returns:
      The `Description`; None for any other file, or if `capsjax.NETWORKS` lacks the network.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> import capsjax
      >>> net = capsjax.CapsNet(channels=16, types=2, routings=5, rngs=nnx.Rngs(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     capsjax.weights.save(net, folder + "/net.safetensors", {"preset": "seed"})
      ...     about = capsjax.weights.describe(folder + "/net.safetensors")
      >>> about.config.routing.iterations, about.notes
      (5, {'preset': 'seed'})
    """
    try:
        with safe_open(path, "numpy") as file:
            return _parse(json.loads((file.metadata() or {})["capsjax"]))
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
    `grouping="flat"`; its decoder draws pixels as C, H, W, which are reordered to H, W, C.

    Args:
      state_dict: tensors or arrays by name: `conv1.*`, `primarycaps.conv2d.*`,
        `digitcaps.weight`, `decoder.{0,2,4}.*`. `load` reads one from a file.
      image_shape: (H, W, C); None: H = W, as follows from the decoder.
      routings: iterations of routing, which the weights do not tell.

    Returns:
      A `CapsNet` with the outputs of the PyTorch network.

    Raises:
      WeightsError: if an array is missing, left over, or of a shape that does not fit.

    Example:
      >>> from flax import nnx
      >>> import capsjax
      >>> net = capsjax.CapsNet(channels=16, types=2, grouping="flat", rngs=nnx.Rngs(0))
      >>> state_dict = capsjax.weights.to_torch(net)
      >>> capsjax.weights.from_torch(state_dict).image_shape
      (28, 28, 1)

    References:
      XifengGuo/CapsNet-Pytorch, capsulenet.py.
    """
    return _build(*convert_from_torch(state_dict, image_shape, routings))


def to_torch(model: CapsNet) -> dict[str, np.ndarray]:
    """Inverts `from_torch`: returns the weights under PyTorch's names, in its order of axes.

    Args:
      model: a `CapsNet` with `grouping="flat"`, two hidden layers in its decoder, and all else as
        in the preset `seed`, because the PyTorch code has nothing else.

    Returns:
      NumPy arrays; `{name: torch.from_numpy(array) for name, array in …}` is a state dict.

    Raises:
      WeightsError: if the network is another one.

    Example:
      See `from_torch`.
    """
    return convert_to_torch(model, arrays_of(model))


def export(
    model: Network, path: str | Path, platforms: Sequence[str] = ("cpu", "cuda", "tpu")
) -> None:
    """Writes `predict` with the network's weights to one file that runs without capsjax.

    `jax.export.deserialize(file.read()).call(images)` takes images [B, H, W, C], float32 from 0
    to 1, any number of them, and returns predicted classes, scores and reconstruction.

    Args:
      model: any `Network`.
      path: of the file; one that is there is replaced.
      platforms: what it shall run on.

    Raises:
      OSError: if the file cannot be written.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import capsjax
      >>> net = capsjax.CapsNet(channels=16, types=2, rngs=nnx.Rngs(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     capsjax.weights.export(net, folder + "/net.jax")
      ...     function = jax.export.deserialize(bytearray(Path(folder, "net.jax").read_bytes()))
      >>> predicted, scores, reconstruction = function.call(jnp.ones((2, 28, 28, 1)))
      >>> scores.shape
      (2, 10)

    References:
      https://docs.jax.dev/en/latest/export
    """

    def function(images: jax.Array) -> tuple[jax.Array | None, ...]:
        return tuple(predict(model, images))  # a plain tuple, because a file knows no class of ours

    (batch,) = jax_export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *model.image_shape), jnp.float32)
    content = jax_export.export(jax.jit(function), platforms=platforms)(images).serialize()
    with write_atomically(Path(path)) as part:
        part.write_bytes(content)


def arrays_of(model: Network) -> dict[str, np.ndarray]:
    """Returns the arrays of a network by their path, such as `class_caps.weight`."""
    variables = nnx.to_pure_dict(nnx.split(model)[1])
    return {name: _widen(leaf) for name, leaf in named_leaves(variables)}


def _widen(leaf: jax.Array) -> np.ndarray:
    """Returns floats in float32, whatever the model was cast to, and integers as they are."""
    floats = jnp.issubdtype(leaf.dtype, jnp.floating)
    return np.asarray(leaf, np.float32 if floats else leaf.dtype, order="C")


def _to(dtype: str, name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype != np.float32:  # an integer, such as the seed of a dropout
        return array
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if np.any(np.isfinite(array) & ~np.isfinite(converted)):
        raise WeightsError(f"{name} holds numbers beyond the range of {dtype}")
    return converted


def _read_safetensors(path: Path) -> tuple[str | None, dict[str, np.ndarray]]:
    """Reads the entry that `save` wrote, None in a file of another origin, and the arrays."""
    try:
        with safe_open(path, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return (file.metadata() or {}).get("capsjax"), arrays
    except SafetensorError as error:
        raise WeightsError(f"{path} is no safetensors file, or damaged: {error}") from error


def _check(path: Path, entry: str, arrays: Mapping[str, np.ndarray]) -> Description:
    """Reads the entry that `save` wrote; refuses an altered file."""
    try:
        about = json.loads(entry)
        digest, version = about["crc32"], about["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} is damaged: its metadata cannot be read") from error
    if digest != _digest(arrays, {n: value for n, value in about.items() if n != "crc32"}):
        raise WeightsError(f"{path} was altered after it was written: its checksum differs")
    if version != _VERSION:
        raise WeightsError(
            f"{path} is of version {version}, this capsjax reads version {_VERSION}: "
            + ("update capsjax" if version > _VERSION else "write it again")
        )
    try:
        return _parse(about)
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} holds a network that is not known here: {error}") from error


def _parse(about: Mapping[str, Any]) -> Description:
    height, width, channels = about["image_shape"]
    config = config_from_json(about["network"], NETWORKS)
    return Description(
        config, (height, width, channels), about["num_classes"], dict(about["notes"])
    )


def _build(
    config: Any,
    image_shape: tuple[int, int, int],
    num_classes: int,
    arrays: Mapping[str, np.ndarray],
) -> Any:
    try:
        build = lambda: config.build(image_shape, num_classes, rngs=nnx.Rngs(0))  # noqa: E731
        graphdef, variables = nnx.split(nnx.eval_shape(build))
    except (TypeError, ValueError) as error:
        raise WeightsError(f"no network has these sizes: {error}") from error
    filled = jax.tree.map(jnp.asarray, fill(nnx.to_pure_dict(variables), dict(arrays)))
    model = nnx.merge(graphdef, nnx.State(filled))
    model.eval()
    return model


def _digest(arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> int:
    crc = zlib.crc32(json.dumps(about, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        crc = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), crc)
        crc = zlib.crc32(array.data, crc)
    return crc
