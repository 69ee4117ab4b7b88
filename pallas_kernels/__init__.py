"""Paged attention over ragged batches: arrays in, arrays out. Backends are chosen once, by name.

Imports jax and numpy only, never fastgen_jax.
"""

import importlib

from pallas_kernels.contract import (
    AttentionSpec,
    RaggedMeta,
    RaggedPagedAttention,
    cache_dtype,
    cache_shape,
    quantize,
)

__all__ = [
    "BACKENDS",
    "NEED_PLAN",
    "PLATFORMS",
    "AttentionSpec",
    "RaggedMeta",
    "RaggedPagedAttention",
    "cache_dtype",
    "cache_shape",
    "quantize",
    "select",
]

BACKENDS = {  # name -> module
    "reference": "reference",
    "xla": "xla",
    "pallas_tpu": "tpu",
    "pallas_gpu": "gpu",
}
PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}  # where a backend runs, if not everywhere
NEED_PLAN = ("pallas_gpu",)  # want the host's plan in their meta
PLANNED_BACKENDS = ("jax_triton", "mosaic_gpu")


def select(name: str) -> RaggedPagedAttention:
    """The attention backend of that name; its module is imported only now.

    Raises:
        NotImplementedError: a backend that does not exist yet. Nothing falls back to another one.
        ValueError: no such backend.
    """
    if name in BACKENDS:
        return importlib.import_module(f"pallas_kernels.{BACKENDS[name]}").ragged_paged_attention
    known = ", ".join(BACKENDS)
    if name in PLANNED_BACKENDS:
        raise NotImplementedError(f"attention backend {name!r} is not there yet; known: {known}")
    raise ValueError(f"unknown attention backend {name!r}; known: {known}")
