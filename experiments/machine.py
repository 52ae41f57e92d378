"""What a run asks of the process and the machine before JAX starts."""

import logging
import os
import platform
from pathlib import Path

import jax

from allocator import keep_freed_memory


def prepare() -> None:
    """Keeps memory between steps, keeps compiled code between runs, and hushes the libraries."""
    keep_freed_memory()
    if not jax.config.values["jax_compilation_cache_dir"]:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        # Compiled code fits one kind of processor, and home folders are shared between machines.
        folder = cache / "capsjax" / f"jax-{jax.__version__}-{platform.node()}"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # errors are raised, too, and said once
