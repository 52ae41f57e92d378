"""What a run asks of its process before JAX starts, and of the C library while it runs."""

import contextlib
import ctypes
import logging
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax


def configure() -> None:
    """Configures allocator, dispatch, compilation cache and logging."""
    keep_freed_memory()
    # On a CPU the loop waits for the diagnostics of every step. If a step runs in a thread of its
    # own, they are there before it has freed its buffers, and with those of the next step the
    # process takes twice the memory. Steps of several devices have their threads in any case.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # A process without a home keeps nothing.
    with contextlib.suppress(RuntimeError):
        _choose_compilation_cache()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # errors are raised as well


def _choose_compilation_cache() -> None:
    if not jax.config.values["jax_compilation_cache_dir"]:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        # Compiled code fits one kind of processor, and home folders are shared between machines.
        folder = cache / "capsjax" / f"jax-{jax.__version__}-{platform.node()}"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory.

    By default the large buffers of every step are unmapped and faulted in again page by page,
    which takes as long as the arithmetic.
    """
    mallopt = _find_in_glibc("mallopt")
    if mallopt is None:
        return
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**28)
    mallopt(arena_max, 1)


def return_freed_memory() -> None:
    """Returns to the system what is free now.

    Compiling leaves 150 MB in pieces that no later step fills, and the buffers of training do not
    fit evaluation, nor those of evaluation the pictures.
    """
    malloc_trim = _find_in_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def measure_resident_memory() -> int:
    """Measures the memory of this process that is resident, in bytes; 0 if no /proc tells."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _find_in_glibc(function: str) -> Any:
    """Returns a function of glibc; None where the C library is another one."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), function, None)
