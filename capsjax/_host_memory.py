"""The memory of the machine."""

import psutil


def host_memory() -> int:
    """Returns the physical memory of this machine, in bytes."""
    return psutil.virtual_memory().total
