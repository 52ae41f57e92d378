"""Devices: the mesh, and where arrays lie on it."""

import socket
import time

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from capsjax._memory import host_memory

AXIS = "data"

# Seconds without a sign of life after which a process counts as dead, and the others end.
_SILENCE = 30
# Seconds to wait for process 0, as long as JAX waits for the others.
_PATIENCE = 300


def connect(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of one run, each with its own devices; before anything else of JAX.

    Args:
      coordinator: HOST:PORT where process 0 listens, the same in every process. None, like the
        others: found out from SLURM, Open MPI, a TPU pod or whatever else JAX knows.
      num_processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      ValueError: in words, if no launcher tells who the others are, or process 0 cannot be reached
        within 5 minutes. One that waits in vain for others than process 0 is aborted by JAX.

    References:
      `jax.distributed.initialize`.
    """
    if coordinator is not None and process_id:
        _wait_for(coordinator)
    elif coordinator is not None and _listens(coordinator) is None:  # JAX would share the port
        raise ValueError(f"another process listens at {coordinator} already")
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, heartbeat_timeout_seconds=_SILENCE
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        if coordinator is not None:
            raise ValueError(f"process {process_id} cannot join {coordinator}: {reason}") from error
        raise ValueError(
            "the launcher (SLURM, Open MPI, a TPU pod) does not say who the other processes are: "
            f"give coordinator, num_processes and process_id ({reason})"
        ) from error


def _wait_for(coordinator: str) -> None:
    """Waits until somebody listens there; JAX alone would abort the process after a while."""
    end = time.monotonic() + _PATIENCE
    while (error := _listens(coordinator)) is not None:
        if time.monotonic() > end:
            raise ValueError(
                f"process 0 could not be reached at {coordinator} for {_PATIENCE} s: {error}"
            ) from error
        time.sleep(0.1)


def _listens(address: str) -> OSError | None:
    """None if somebody does at HOST:PORT, or else why a connection failed."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
    except OSError as error:
        return error
    return None


def agree(what: str, value: int) -> None:
    """Waits until all processes are here, and makes sure that they came with the same value.

    Args:
      what: the value's name in the message.
      value: from 0 to 2^32 - 1, as a CRC-32.

    Raises:
      ValueError: if the values differ.

    Example:
      >>> from capsjax.sharding import agree
      >>> agree("seeds", 7)
    """
    values = np.ravel(multihost_utils.process_allgather(np.uint32(value)))
    if len(set(values.tolist())) > 1:
        raise ValueError(
            f"the {len(values)} processes have different {what}: {values.tolist()}; give all the "
            "same command and the same files"
        )


def make_mesh(batch_size: int, devices: int | None = None) -> Mesh:
    """A mesh of one axis, `data`, over which the batch is split.

    Args:
      batch_size: examples in a batch, over all devices.
      devices: how many to use; None: the largest number of them that divides `batch_size`. Where
        several processes train together, all.

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
            f"{devices} devices asked for, but {len(found)} of all processes take part"
        )
    if batch_size % devices:
        raise ValueError(f"{devices} devices do not divide a batch of {batch_size} images evenly")
    # CapsNet's reshapes join axes, which Explicit axes, the default, refuse.
    return jax.make_mesh((devices,), (AXIS,), (AxisType.Auto,), devices=found[:devices])


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole: parameters and data set."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """The sharding of what is split over the devices along its first axis: a batch."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def replicate(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """Puts one whole copy of `array` on every device of the mesh.

    Args:
      mesh: from `make_mesh`.
      array: any array of the host.

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
    memory = _memory(device)
    if array.nbytes * copies > memory:
        raise ValueError(
            f"the images take {array.nbytes * copies / 2**30:.1f} GiB and {device.device_kind} has "
            f"{memory / 2**30:.1f} GiB: use fewer (--train-size) or smaller images"
        )
    # Not device_put, which sends the array of every process to all others to compare them.
    return jax.make_array_from_callback(array.shape, replicated(mesh), lambda part: array[part])


def place(mesh: Mesh, batch: np.ndarray) -> jax.Array:
    """Splits a batch over the devices along its first axis.

    Args:
      mesh: from `make_mesh`.
      batch: any array of the host, the same in every process; its first axis is a multiple of
        the number of devices.

    Returns:
      The array, of which every process holds the parts of its devices.

    Example:
      >>> import numpy as np
      >>> from capsjax.sharding import make_mesh, place
      >>> place(make_mesh(128, 1), np.arange(128)).shape
      (128,)
    """
    return jax.make_array_from_callback(batch.shape, split(mesh), lambda part: batch[part])


def _memory(device: jax.Device) -> int:
    """Bytes that the device may use; for the CPU, the host's memory."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return host_memory()
