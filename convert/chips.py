"""Chips that need not be here: what their compilers must know of them.

TPU programs need the `libtpu` wheel; CUDA programs `jax-cuda12-plugin` and `jax-cuda12-pjrt` of
jax's version (or those of cuda13) and a `ptxas`, as of `nvidia-cuda-nvcc-cu12`. Imports jax only
when asked for devices: ENVIRONMENT must be set before that.
"""

import functools
import importlib.util
import re
from typing import Any, NamedTuple

from fastgen_jax.errors import ConfigError

# libtpu then describes TPUs without asking a cloud host, and two processes may load it at once.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
GIB = 2**30
TPUS = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB, "tpu7x": 96 * GIB}

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
  driver_version: "12.9.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{name}"
"""
GPUS: dict[str, dict[str, Any]] = {
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
    "h200": {
        "name": "NVIDIA H200",
        "major": 9,
        "cores": 132,
        "fpus": 128,
        "clock": 1.98,
        "shared_per_core": 233472,
        "shared_per_block": 232448,
        "bandwidth": 4800000000000,
        "l2": 52428800,
        "memory": 150754820096,
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
KNOWN = f"cpu, {', '.join(GPUS)}, {', '.join('tpu-' + name.removeprefix('tpu') for name in TPUS)}"
NAME = re.compile(r"(cpu|[ah][12]00|tpu-[a-z0-9]+?)(?:-([1-8]))?")


class Chips(NamedTuple):
    """Some chips of one kind, in one host."""

    kind: str  # cpu, or a name of GPUS or TPUS
    n: int

    @classmethod
    def of(cls, name: str) -> "Chips":
        """By their name, as tpu-v6e-8; ConfigError if there are none of that name."""
        found = NAME.fullmatch(name)
        kind = found[1].removeprefix("tpu-") if found else ""
        kind = "tpu7x" if kind == "7x" else kind
        if not found or kind not in {"cpu", *GPUS, *TPUS}:
            raise ConfigError(
                f"unknown chip {name!r}; known are {KNOWN}, with -N for N of them (up to 8)"
            )
        return cls(kind, int(found[2] or 1))

    @property
    def memory(self) -> int | None:
        """Bytes of each; None: as the system says."""
        if self.kind in GPUS:
            return GPUS[self.kind]["memory"]
        return TPUS.get(self.kind)

    def devices(self) -> list[Any]:
        """Those of jax that programs are compiled for.

        Raises:
            ConfigError: their compiler is not here.
        """
        import jax

        if self.kind == "cpu":
            return jax.devices("cpu")[: self.n]
        if self.kind in TPUS:
            _require("libtpu", "pip install libtpu")
            slice_of = "2x2x1" if self.n <= 4 else "2x4x1"
            return _described("tpu", topology_name=f"{self.kind}:{slice_of}")[: self.n]
        _require("jax_plugins", "pip install 'fastgen-jax[cuda12]'")
        return _described(
            "cuda",
            topology_name=self.kind,
            topology=f"1x1x{self.n}",
            target_config=GPU_CONFIG.format(**GPUS[self.kind]),
        )


def _require(module: str, remedy: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"there is no {module} here to compile with; {remedy}")


@functools.cache
def _described(platform: str, **description: str) -> list[Any]:
    import jax
    from jax.experimental import topologies

    jax.devices()  # registers the plugins
    return topologies.get_topology_desc(platform=platform, **description).devices
