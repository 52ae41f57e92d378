"""Chips that XLA compiles for without having one."""

import importlib.util
import os
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from capsjax.sharding import AXIS

# The description of the device that XLA would get from the driver.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Chip(NamedTuple):
    """Where a chip's compiler comes from, and the rates that its maker publishes."""

    modules: tuple[str, ...]  # any of these brings the compiler
    extra: str  # of capsjax, which installs one of them
    flops: dict[str, float]  # operations a second on numbers of each dtype
    bandwidth: float  # bytes a second from and to its memory
    link: float  # bytes a second to other chips


CHIPS = {
    # NVIDIA's data sheet of the H100 SXM: dense; float32 as XLA multiplies it there, in TF32.
    "h100": Chip(
        ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"),
        "cuda12",
        {"float32": 494.5e12, "bfloat16": 989e12},
        3.35e12,
        450e9,
    ),
    # Google's page of the v5e; XLA multiplies float32 there in one pass of bfloat16.
    "v5e": Chip(("libtpu",), "tpu", {"float32": 197e12, "bfloat16": 197e12}, 819e9, 200e9),
}


def make_mesh_of(name: str, topology: str = "1x1") -> Mesh:
    """Makes a mesh of chips that need not be here. Call it before JAX starts its devices.

    Args:
      name: of `CHIPS`.
      topology: how many TPU chips along each axis of their network.

    Raises:
      SystemExit: if the wheels with its compiler are missing.
    """
    chip = CHIPS[name]
    if not any(_is_installed(module) for module in chip.modules):
        raise SystemExit(
            f"the compiler for the {name} is missing: python -m pip install -e '.[{chip.extra}]'"
        )
    if name == "h100":
        flags = "--xla_gpu_autotune_level=0"  # tuning needs the card
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
        os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "CUDA_VISIBLE_DEVICES": "-1"}
        jax.config.update("jax_platforms", "cuda,cpu")
        options = {"platform": "cuda", "topology": "1x1x1", "target_config": _H100}
        chips = topologies.get_topology_desc(**options)
    else:
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # nobody to ask where there is no TPU
        jax.config.update("jax_platforms", "cpu")  # and no driver for a GPU either
        # JAX 0.10 takes a host of four chips for granted.
        hosts = {"chips_per_host_bounds": (1, 1, 1)} if topology == "1x1" else {}
        chips = topologies.get_topology_desc(f"{name}:{topology}", "tpu", **hosts)
    return Mesh(np.array(chips.devices), (AXIS,))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even its package
        return False
