"""What becomes of freed memory, in a file of its own: a process without JAX asks for it, too."""

import ctypes
import sys
from typing import Any


def keep_freed_memory() -> None:
    """Has glibc keep what is freed: else every step's large buffers are unmapped and faulted in
    again page by page, which takes as long as the arithmetic."""
    mallopt = _glibc("mallopt")
    if mallopt is None:
        return
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**28)
    mallopt(arena_max, 1)


def give_back_freed_memory() -> None:
    """Gives the system what is free now. Once in a while: compiling a step leaves 150 MB in pieces
    that no later step fills."""
    malloc_trim = _glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _glibc(function: str) -> Any:
    """A function of glibc; None where the C library is another one."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), function, None)
