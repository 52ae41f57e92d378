"""Weights of XifengGuo/CapsNet-Pytorch: their names, their order of axes, their pickles."""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from capsjax._trees import WeightsError
from capsjax.networks import CapsNet, CapsNetConfig

PICKLE_SUFFIXES = (".pt", ".pth", ".pkl")

# The number of axes of each array.
_AXES = {
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
_CONVOLUTIONS = {"conv1": "conv1", "primary.conv": "primarycaps.conv2d"}


class Converted(NamedTuple):
    """A network of the PyTorch code, in the terms of this library."""

    config: CapsNetConfig
    image_shape: tuple[int, int, int]
    num_classes: int
    arrays: dict[str, np.ndarray]  # by their path in `CapsNet`


def convert_from_torch(
    state_dict: Mapping[str, Any], image_shape: tuple[int, int, int] | None, routings: int
) -> Converted:
    """Reads sizes and arrays of a state dict.

    Raises:
      WeightsError: if an array is missing, left over, or of a shape that does not fit.
    """
    theirs = {name.removeprefix("module."): as_float32(v) for name, v in state_dict.items()}
    _check_names(theirs)
    image_shape = _check_image_shape(theirs, image_shape)
    config = _read_config(theirs, routings)
    num_classes = theirs["digitcaps.weight"].shape[0]
    height, width, depth = image_shape
    order = np.arange(math.prod(image_shape)).reshape(depth, height, width).transpose(1, 2, 0)
    return Converted(config, image_shape, num_classes, _rename_from_torch(theirs, order.ravel()))


def convert_to_torch(model: CapsNet, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames the arrays of a network and orders their axes as PyTorch does.

    Raises:
      WeightsError: if the PyTorch code has no such network.
    """
    _check_torch_has(model)
    height, width, depth = model.image_shape
    order = np.arange(height * width * depth).reshape(height, width, depth).transpose(2, 0, 1)
    return _rename_to_torch(arrays, order.ravel())


def unpickle(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a state dict that PyTorch saved, and nothing else.

    Raises:
      WeightsError: if PyTorch is not installed, or refuses the file.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            f"{path} is a pickle, which only PyTorch reads safely: "
            "python -m pip install 'capsjax[torch]'"
        ) from error
    try:
        tensors = torch.load(content, map_location="cpu", weights_only=True)
        return {name: as_float32(tensor) for name, tensor in tensors.items()}
    except Exception as error:  # a damaged pickle makes it raise anything
        raise WeightsError(
            f"{path} is refused: it is damaged, or holds more than weights by their names "
            f"({type(error).__name__})"
        ) from error


def as_float32(value: Any) -> np.ndarray:
    """Returns a PyTorch tensor or an array as a float32 array."""
    tensor = value.detach().cpu().float() if hasattr(value, "detach") else value
    return np.asarray(tensor, np.float32)


def _check_names(theirs: Mapping[str, np.ndarray]) -> None:
    names = ", ".join(_AXES)
    if missing := sorted(set(_AXES) - set(theirs)):
        raise WeightsError(f"expected the arrays {names}; missing: {missing}")
    if left := sorted(set(theirs) - set(_AXES)):
        raise WeightsError(f"expected the arrays {names}; left over: {left}")
    for name, ndim in _AXES.items():
        if theirs[name].ndim != ndim or not theirs[name].size:
            raise WeightsError(
                f"expected {name} with {ndim} axes, none of size 0, got {list(theirs[name].shape)}"
            )


def _read_config(theirs: Mapping[str, np.ndarray], routings: int) -> CapsNetConfig:
    _, _, dim_class, dim_primary = theirs["digitcaps.weight"].shape
    try:
        return CapsNetConfig(
            channels=theirs["conv1.weight"].shape[0],
            kernel_size=theirs["conv1.weight"].shape[2],
            types=theirs["primarycaps.conv2d.weight"].shape[0] // dim_primary,
            dim_primary=dim_primary,
            dim_class=dim_class,
            hidden=(theirs["decoder.0.bias"].size, theirs["decoder.2.bias"].size),
            grouping="flat",
            routing=routings,
        )
    except ValueError as error:
        raise WeightsError(f"no network has these sizes: {error}") from error


def _check_image_shape(
    theirs: Mapping[str, np.ndarray], image_shape: tuple[int, int, int] | None
) -> tuple[int, int, int]:
    """Returns the image shape, of a square image if none is given."""
    depth, pixels = theirs["conv1.weight"].shape[1], theirs["decoder.4.bias"].size
    if image_shape is None:
        side = math.isqrt(pixels // depth)
        image_shape = side, side, depth
    if math.prod(image_shape) != pixels or image_shape[2:] != (depth,):
        raise WeightsError(
            f"the decoder draws {pixels} numbers of {depth} channels, which are no image of "
            f"{image_shape}; give image_shape=(H, W, C)"
        )
    return image_shape


def _check_torch_has(model: CapsNet) -> None:
    if not isinstance(model, CapsNet):
        raise WeightsError(f"the PyTorch code has only CapsNet, got {type(model).__name__}")
    config = model.config
    # Whatever the number of iterations: weights do not say it.
    plain = {"grouping": "flat", "primary_coupling": 1.0}
    routing = {"bias": False, "leak": False, "stop_gradient": True}
    for holder, expected in ((config, plain), (config.routing, routing)):
        for name, value in expected.items():
            if (got := getattr(holder, name, None)) != value:
                raise WeightsError(
                    f"the PyTorch code has only {name}={value!r}, this network has {got!r}"
                )
    if len(config.hidden) != 2:
        raise WeightsError(f"expected a decoder of 2 hidden layers, got {list(config.hidden)}")


def _rename_from_torch(
    theirs: Mapping[str, np.ndarray], order: np.ndarray
) -> dict[str, np.ndarray]:
    """Renames and transposes; `order` tells which of their pixels each of ours is."""
    ours = {"class_caps.weight": theirs["digitcaps.weight"]}
    for name, torch_name in _CONVOLUTIONS.items():
        ours[f"{name}.kernel"] = theirs[f"{torch_name}.weight"].transpose(2, 3, 1, 0)
        ours[f"{name}.bias"] = theirs[f"{torch_name}.bias"]
    for n in range(3):
        kernel, bias = theirs[f"decoder.{2 * n}.weight"].T, theirs[f"decoder.{2 * n}.bias"]
        ours[f"decoder.{n}.kernel"] = kernel[:, order] if n == 2 else kernel
        ours[f"decoder.{n}.bias"] = bias[order] if n == 2 else bias
    return ours


def _rename_to_torch(ours: Mapping[str, np.ndarray], order: np.ndarray) -> dict[str, np.ndarray]:
    """Renames and transposes; `order` tells which of our pixels each of theirs is."""
    theirs = {"digitcaps.weight": ours["class_caps.weight"]}
    for name, torch_name in _CONVOLUTIONS.items():
        theirs[f"{torch_name}.weight"] = ours[f"{name}.kernel"].transpose(3, 2, 0, 1)
        theirs[f"{torch_name}.bias"] = ours[f"{name}.bias"]
    for n in range(3):
        kernel, bias = ours[f"decoder.{n}.kernel"], ours[f"decoder.{n}.bias"]
        theirs[f"decoder.{2 * n}.weight"] = (kernel[:, order] if n == 2 else kernel).T
        theirs[f"decoder.{2 * n}.bias"] = bias[order] if n == 2 else bias
    return {name: np.ascontiguousarray(theirs[name]) for name in _AXES}
