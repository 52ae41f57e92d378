"""How freed memory is kept, in a file of its own: a process without JAX asks for it, too."""

import ctypes
import sys


def keep_freed_memory() -> None:
    """Has glibc keep what is freed: else every step's large buffers are unmapped and faulted in
    again page by page, which takes as long as the arithmetic."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**28)
    mallopt(arena_max, 1)
