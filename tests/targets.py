"""Ahead-of-time compilation for accelerators that this machine lacks, with the real compilers.

TPU programs need the `libtpu` wheel; CUDA programs `jax-cuda12-plugin` and `jax-cuda12-pjrt` of
jax's version and `nvidia-cuda-nvcc-cu12`. A missing wheel skips the test, or fails it under
FASTGEN_REQUIRE_COMPILERS=1. Knows nothing of fastgen_jax. Imports jax only when asked for a target:
ENVIRONMENT must be set before that.
"""

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

# libtpu then describes TPUs without asking a cloud host, and two test runs may load it at once.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}

TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")

# Operations of a compiled program's text that devices communicate by.
COLLECTIVE = r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("

# XLA's GpuTargetConfigProto in text form, filled with what differs between the GPUs.
GPU_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {shared_per_core}
  shared_memory_per_block_optin: {shared_per_block}
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: 0 }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{name}"
"""
GPUS = {
    "h100": {
        "name": "NVIDIA H100 80GB HBM3",
        "major": 9,
        "cores": 132,
        "fpus": 128,
        "clock": 1.98,
        "shared_per_core": 233472,
        "shared_per_block": 232448,
        "bandwidth": 3352320000000,
        "l2": 52428800,
        "memory": 84978434048,
    },
    "a100": {
        "name": "NVIDIA A100-SXM4-80GB",
        "major": 8,
        "cores": 108,
        "fpus": 64,
        "clock": 1.41,
        "shared_per_core": 167936,
        "shared_per_block": 166912,
        "bandwidth": 2039000000000,
        "l2": 41943040,
        "memory": 84978434048,
    },
}


@dataclass(frozen=True)
class Target:
    """One described accelerator: `compile` runs the real compiler for it and never the program."""

    platform: str  # "tpu" or "cuda"
    sharding: Any  # of arguments without their own: replicated over `mesh`
    mesh: Any

    def compile(self, fn: Callable, *args: Any, **jit_options: Any) -> Any:
        """Compiles jit(fn) for this accelerator.

        Args:
            fn: a function, or something already jitted (then without jit_options).
            args: arrays or anything else with shape and dtype, in pytrees; only their shapes count,
                and the sharding of a ShapeDtypeStruct that has one.
            jit_options: of jax.jit: donate_argnums, static_argnames ...

        Returns:
            jax's Compiled: .memory_analysis(), .cost_analysis(), .as_text().
        """
        import jax

        jitted = jax.jit(fn, **jit_options) if jit_options or not hasattr(fn, "trace") else fn

        def place(x):
            own = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else None
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own or self.sharding)

        shapes = jax.tree.map(place, args)
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh), warnings.catch_warnings():
            # Programs for a described device enter the cache, but only a real one can read them.
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
            traced = jitted.trace(*shapes)
            return traced.lower(lowering_platforms=(self.platform,)).compile()


def has_compilers() -> bool:
    """Whether any accelerator's compiler is installed here."""
    return any(importlib.util.find_spec(name) for name in ("libtpu", "jax_cuda12_plugin"))


def tpu_target(name: str = "v5e", n_devices: int = 1) -> Target:
    """A TPU: v4, v5e, v5p, v6e or tpu7x; up to four devices, of v5e and v6e eight."""
    _require("libtpu", "pip install libtpu")
    assert name in TPUS, name
    slice_of = "2x2x1" if n_devices <= 4 else "2x4x1"
    return _target("tpu", n_devices, topology_name=f"{name}:{slice_of}")


def gpu_target(name: str = "h100", n_devices: int = 1) -> Target:
    """A GPU: h100 or a100; several of one host."""
    _require(
        "jax_cuda12_plugin", "pip install jax-cuda12-plugin and jax-cuda12-pjrt of jax's version"
    )
    return _target(
        "cuda",
        n_devices,
        topology_name=name,
        topology=f"1x1x{n_devices}",
        target_config=GPU_CONFIG.format(**GPUS[name]),
    )


def _require(module: str, remedy: str) -> None:
    if importlib.util.find_spec(module):
        return
    reason = f"no {module} here to compile with; {remedy}"
    if os.environ.get("FASTGEN_REQUIRE_COMPILERS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@functools.cache
def _devices(platform: str, **description: str) -> list:
    import jax
    from jax.experimental import topologies

    jax.devices()  # registers the plugins
    return topologies.get_topology_desc(platform=platform, **description).devices


def _target(platform: str, n_devices: int, **description: str) -> Target:
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(_devices(platform, **description)[:n_devices]), ("tensor",))
    return Target(platform, NamedSharding(mesh, PartitionSpec()), mesh)
