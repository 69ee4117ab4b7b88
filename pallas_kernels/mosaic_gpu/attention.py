"""Paged attention on NVIDIA Hopper (compute capability 9.0), chunks in Pallas' Mosaic GPU.

As pallas_gpu, with the same plan, but for its fourth step: the chunk kernel is chunk.py's. New
tokens are written by XLA, decode items and merges are pallas_gpu's kernels, in Pallas-Triton.
What the chunk kernel does not take is refused by contract.check_heads, cache_shape and here, not
given to another kernel: head sizes but 64 and 128, query heads per KV head but 1, 2, 4, 8 and 16,
float32, caches of another dtype than the queries' (int8 and fp8 ones too), blocks that neither
divide a tile of 128 cells nor are whole tiles.

Lowers with jax 0.10.2, 0.11.2 and 0.12.0.1; the simulator, plgpu.InterpretGPUParams, is public from
jax 0.11 on.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from pallas_kernels.contract import (
    AttentionSpec,
    RaggedMeta,
    check_arguments,
    check_block_size,
    check_heads,
)
from pallas_kernels.gpu.attention import decode
from pallas_kernels.gpu.layout import check_plan, make_inputs, make_layout, write
from pallas_kernels.mosaic_gpu.chunk import chunks


def ragged_paged_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    kv_cache: Num[Array, "B K 2 C H"],
    meta: RaggedMeta,
    *,
    spec: AttentionSpec,
    alibi_slopes: Float[Array, "N"] | None = None,
    sinks: Float[Array, "N"] | None = None,
    kv_scales: Float[Array, "B K 2 C"] | None = None,
    interpret: Any = False,
) -> tuple[Array, ...]:
    """See contract.RaggedPagedAttention.

    interpret: plgpu.InterpretGPUParams to simulate the chunk kernel and interpret the others on any
        platform, slowly; or False.

    Raises:
        ValueError: also for a meta without a plan, and what the kernel does not take.
    """
    check_arguments(q, k, v, kv_cache, meta, kv_scales)
    check_plan("mosaic_gpu", q, kv_cache, meta)
    heads = {"head_size": q.shape[2], "group_size": q.shape[1] // k.shape[1], "dtype": q.dtype}
    check_heads("mosaic_gpu", **heads, cache_dtype=kv_cache.dtype)
    check_block_size("mosaic_gpu", kv_cache.shape[3])
    kv_cache, _ = write(k, v, kv_cache, None, meta)
    inputs = make_inputs(q, kv_cache, None, meta, alibi_slopes, sinks)
    layout = make_layout(q, kv_cache, meta, spec, interpret=interpret is not False)
    out = decode(jnp.zeros(q.size, q.dtype), inputs, meta.plan, layout).reshape(q.shape)
    if len(meta.plan.chunks):
        out = chunks(
            out,
            q,
            kv_cache,
            meta.plan.chunks,
            meta.block_tables,
            spec=spec,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            interpret=interpret,
        )
    return out, kv_cache
