"""Devices: the mesh, and the placement of arrays on it."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from capsjax._host_memory import host_memory

AXIS = "data"
IMAGE_LAYOUT = Layout((0, 1, 2))  # one image after the other


def make_mesh(batch_size: int, devices: int | None = None) -> Mesh:
    """Makes a mesh of one axis, `data`, over which the batch is split.

    Args:
      batch_size: examples in a batch, over all devices.
      devices: how many to use; None: the largest number that divides `batch_size`, or all where
        several processes train together.

    Returns:
      The mesh.

    Raises:
      ValueError: if there are fewer devices, their number does not divide `batch_size`, or a
        process would be left without one.

    Example:
      >>> from capsjax.sharding import make_mesh
      >>> make_mesh(128, 1).shape["data"]
      1
    """
    found = jax.devices()
    together = jax.process_count() > 1
    if len(found) != jax.process_count() * jax.local_device_count():
        raise ValueError("the processes have different numbers of devices; JAX needs the same")
    if devices is None and together:
        devices = len(found)
    elif devices is None:
        devices = max(n for n in range(1, len(found) + 1) if batch_size % n == 0)
    if not 1 <= devices <= len(found):
        platform = found[0].platform
        remedy = f"; set JAX_NUM_CPU_DEVICES={devices} to split it" if platform == "cpu" else ""
        raise ValueError(f"{devices} devices asked for, {len(found)} found ({platform}){remedy}")
    if together and devices < len(found):
        raise ValueError(
            f"{devices} devices asked for, but several processes use all {len(found)} of theirs"
        )
    if batch_size % devices:
        raise ValueError(f"{devices} devices do not divide a batch of {batch_size} images evenly")
    # CapsNet's reshapes join axes, which Explicit axes, the default, refuse.
    return jax.make_mesh((devices,), (AXIS,), (AxisType.Auto,), devices=found[:devices])


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole: parameters and data set."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Returns the sharding of what is split along one axis: a batch."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def replicate(mesh: Mesh, array: np.ndarray, layout: Layout | None = None) -> jax.Array:
    """Puts one whole copy of `array` on every device of the mesh.

    Args:
      mesh: from `make_mesh`.
      array: any array of the host.
      layout: how it lies in the devices' memory; None: as they choose.

    Returns:
      The array on the devices.

    Raises:
      ValueError: if it takes more memory than a device has, with both sizes.

    Example:
      >>> import numpy as np
      >>> from capsjax.sharding import make_mesh, replicate
      >>> replicate(make_mesh(128, 1), np.zeros((60000, 28, 28, 1), np.uint8)).nbytes
      47040000
    """
    device, *others = mesh.local_devices
    copies = 1 + len(others) if device.platform == "cpu" else 1  # these share the host's memory
    memory, needed = _find_memory(device), copies * _count_bytes(device, array)
    if needed > memory:
        raise ValueError(
            f"the images take {needed / 2**30:.1f} GiB and {device.device_kind} has "
            f"{memory / 2**30:.1f} GiB: use fewer (--train-size) or smaller images"
        )
    # Not device_put, which sends the array of every process to all others to compare them.
    where = Format(layout, replicated(mesh))
    return jax.make_array_from_callback(array.shape, where, lambda part: array[part])


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["pixels"], meta_fields=["channels"]
)
@dataclasses.dataclass(frozen=True)
class PlacedImages:
    """Images on the devices, from which a step gathers its batch by `images[indices]`.

    A TPU keeps an array [N, H, W, C] with N as its innermost axis, and would transpose the whole
    data set in every step. Of this one it reads only the images that it needs. For all but
    `images[indices]`, `len`, `shape` and `dtype` it becomes an array first.
    """

    pixels: jax.Array  # [N, H, W·C], one image after the other in memory
    channels: int

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[N, H, W, C]."""
        count, height, width = self.pixels.shape
        return count, height, width // self.channels, self.channels

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the pixels."""
        return self.pixels.dtype

    def __jax_array__(self) -> jax.Array:
        return self.pixels.reshape(self.shape)

    def __getitem__(self, indices: Any) -> jax.Array:
        """Gathers images [..., H, W, C] by their numbers [...]."""
        if isinstance(indices, slice | tuple):
            return self.__jax_array__()[indices]
        return self.pixels[indices].reshape(*jnp.shape(indices), *self.shape[1:])


def replicate_images(mesh: Mesh, images: np.ndarray) -> PlacedImages:
    """Puts one whole copy of a data set's images on every device of the mesh.

    On a TPU each image takes multiples of 32 rows and of 128 numbers a row: MNIST takes 245 MB.

    Args:
      mesh: from `make_mesh`.
      images: [N, H, W, C].

    Returns:
      The images, to be gathered from.

    Raises:
      ValueError: as `replicate` does.

    Example:
      >>> import numpy as np
      >>> from capsjax.sharding import make_mesh, replicate_images
      >>> images = replicate_images(make_mesh(128, 1), np.zeros((60000, 28, 28, 1), np.uint8))
      >>> images[np.arange(128)].shape
      (128, 28, 28, 1)
    """
    count, height, width, channels = images.shape
    pixels = images.reshape(count, height, width * channels)
    return PlacedImages(replicate(mesh, pixels, IMAGE_LAYOUT), channels)


def place(mesh: Mesh, batch: np.ndarray, axis: int = 0) -> jax.Array:
    """Splits a batch, or many at once, over the devices.

    Args:
      mesh: from `make_mesh`.
      batch: any array of the host, the same in every process.
      axis: the one to split; its length is a multiple of the number of devices.

    Returns:
      The array, of which every process holds the parts of its devices.

    Example:
      >>> import numpy as np
      >>> from capsjax.sharding import make_mesh, place
      >>> place(make_mesh(128, 1), np.arange(128)).shape
      (128,)
    """
    return jax.make_array_from_callback(batch.shape, split(mesh, axis), lambda part: batch[part])


def _count_bytes(device: jax.Device, array: np.ndarray) -> int:
    """Returns the bytes that an array takes on a device; a TPU fills up tiles of bytes, 32×128."""
    if device.platform != "tpu" or array.ndim < 2:
        return array.nbytes
    *count, rows, columns = array.shape
    return math.prod(count) * -(-rows // 32) * 32 * -(-columns // 128) * 128 * array.itemsize


def _find_memory(device: jax.Device) -> int:
    """Returns the bytes that the device may use; of a CPU, the host's memory."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return host_memory()
