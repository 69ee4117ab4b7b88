"""Paged attention over ragged batches: arrays in, arrays out. Backends are chosen once, by name.

Imports jax and numpy only, never fastgen_jax; one backend brings packages of its own, jax_triton.
"""

import functools
import importlib
from typing import Any

from pallas_kernels.contract import (
    MAX_CACHE_SIZE,
    QUANTIZED,
    AttentionSpec,
    RaggedMeta,
    RaggedPagedAttention,
    cache_dtype,
    cache_shape,
    check_heads,
    quantize,
)
from pallas_kernels.gpu.plan import PlanSizes

__all__ = [
    "BACKENDS",
    "COMPUTE_CAPABILITIES",
    "MAX_CACHE_SIZE",
    "PLATFORMS",
    "QUANTIZED",
    "AttentionSpec",
    "PlanSizes",
    "RaggedMeta",
    "RaggedPagedAttention",
    "cache_dtype",
    "cache_shape",
    "check_heads",
    "cpu_product",
    "has_cpu_gated_product",
    "has_cpu_library",
    "has_cpu_product",
    "plan_sizes",
    "quantize",
    "select",
    "tiles_product",
]

BACKENDS = {  # name -> module
    "reference": "reference",
    "xla": "xla",
    "invariant": "invariant",
    "cpu": "cpu.attention",
    "pallas_tpu": "tpu.attention",
    "pallas_gpu": "gpu.attention",
    "jax_triton": "triton.attention",
    "mosaic_gpu": "mosaic_gpu.attention",
}
# Where a backend runs, if not everywhere.
PLATFORMS = {
    "cpu": "cpu",
    "pallas_tpu": "tpu",
    "pallas_gpu": "gpu",
    "jax_triton": "gpu",
    "mosaic_gpu": "gpu",
}
COMPUTE_CAPABILITIES = {"mosaic_gpu": "9.0"}  # of GPUs, if not all from 8.0 on
PLANNED = ("pallas_gpu", "jax_triton", "mosaic_gpu")  # want the host's plan in their meta
TUNED = ("pallas_gpu",)  # know the kind of GPU
BUILT = ("cpu", "jax_triton")  # of packages or a library that may be missing


def plan_sizes(name: str, **sizes: int) -> PlanSizes | None:
    """What sizes the host's plan of each step, for a backend that wants one; None for the others.

    sizes: see PlanSizes.
    """
    return PlanSizes.of(**sizes) if name in PLANNED else None


def tiles_product(*arrays: Any, tile: int, interpret: bool = False) -> Any:
    """A GPU's products of tiles of rows with a matrix each; see gpu/grouped.py, imported now."""
    module = importlib.import_module("pallas_kernels.gpu.grouped")
    return module.tiles_product(*arrays, tile=tile, interpret=interpret)


@functools.cache
def has_cpu_library() -> bool:
    """Whether the CPU's library was built; XLA knows it from now on."""
    try:
        importlib.import_module("pallas_kernels.cpu.calls").check_installed()
    except ImportError:
        return False
    return True


def has_cpu_product(n_tokens: int, dtype: Any) -> bool:
    """Whether the library is there and its product, with such a weight, better than XLA's."""
    module = importlib.import_module("pallas_kernels.cpu.product")
    return has_cpu_library() and module.is_better(n_tokens, str(dtype))


def has_cpu_gated_product(n_tokens: int, dtype: Any) -> bool:
    """The same of one that is gated."""
    module = importlib.import_module("pallas_kernels.cpu.product")
    return has_cpu_library() and module.can_gate(n_tokens, str(dtype))


def cpu_product(x: Any, weight: Any, **options: Any) -> Any:
    """A CPU's x W^T; see cpu/product.py, imported now."""
    return importlib.import_module("pallas_kernels.cpu.product").product(x, weight, **options)


def select(name: str, device: Any = None) -> RaggedPagedAttention:
    """The attention backend of that name; its module is imported only now.

    device: whose kind it is compiled for, which may have a say in the sizes of tiles; jax's, or one
        that is only described. None: any of the backend's platform.

    Raises:
        ImportError: the packages that the backend needs are missing, or do not work together.
        ValueError: no such backend. Nothing falls back to another one.
    """
    if name in BACKENDS:
        module = importlib.import_module(f"pallas_kernels.{BACKENDS[name]}")
        if name in BUILT:
            module.check_installed()
        capability = getattr(device, "compute_capability", None)  # of GPUs, as "9.0"
        if name in TUNED and capability:
            chip = int(capability.replace(".", ""))
            return functools.partial(module.ragged_paged_attention, compute_capability=chip)
        return module.ragged_paged_attention
    known = ", ".join(BACKENDS)
    raise ValueError(f"unknown attention backend {name!r}; known: {known}")
