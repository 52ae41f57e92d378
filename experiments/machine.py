"""What a run asks of the process and the machine before JAX starts."""

import ctypes
import logging
import os
import platform
import sys
from pathlib import Path

import jax


def prepare() -> None:
    """Keeps memory between steps, keeps compiled code between runs, and hushes the libraries."""
    keep_freed_memory()
    if not jax.config.values["jax_compilation_cache_dir"]:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        # Compiled code fits one kind of processor, and home folders are shared between machines.
        folder = cache / "capsjax" / f"jax-{jax.__version__}-{platform.node()}"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    logging.getLogger("absl").setLevel(logging.ERROR)


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
