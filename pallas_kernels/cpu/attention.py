"""Paged attention on CPU, one XLA custom call per layer: C++ (attention.cc) on XLA's own threads.

Queries are float32 there, as are all products and sums; keys and values come encoded as the cache
stores them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from pallas_kernels.contract import (
    QUANTIZED,
    AttentionSpec,
    RaggedMeta,
    check_arguments,
    encode,
    quantize,
)
from pallas_kernels.cpu.build import KINDS
from pallas_kernels.cpu.calls import check_installed

TARGET = "fastgen_ragged_paged_attention"
__all__ = ["check_installed", "ragged_paged_attention"]
CELLS = ("float32", "uint16", "bfloat16", "float16", "int8", "uint8", "float8_e4m3fn")


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
    kind: str | None = None,
) -> tuple[Array, ...]:
    """See contract.RaggedPagedAttention. It has no gradient and no batching rule.

    A batch that would lead out of bounds is an error of the step.

    Args:
        kind: of CPU, one of build.KINDS; None: the best that this one is of.
    """
    check_arguments(q, k, v, kv_cache, meta, kv_scales)
    if str(kv_cache.dtype) not in CELLS:
        raise ValueError(f"a cache of {kv_cache.dtype}: the CPU's attention has {', '.join(CELLS)}")
    none = jnp.zeros(0, jnp.float32)
    k_scales = v_scales = none
    if kv_scales is None:
        k, v = encode(k, kv_cache.dtype), encode(v, kv_cache.dtype)
    else:
        k, k_scales = quantize(k, kv_cache.dtype)
        v, v_scales = quantize(v, kv_cache.dtype)
    scales = none if kv_scales is None else kv_scales.astype(jnp.float32)
    results = (
        jax.ShapeDtypeStruct(q.shape, jnp.float32),
        jax.ShapeDtypeStruct(kv_cache.shape, kv_cache.dtype),
        jax.ShapeDtypeStruct(scales.shape, jnp.float32),
    )
    call = jax.ffi.ffi_call(TARGET, results, input_output_aliases={5: 1, 6: 2})
    out, kv_cache, scales = call(
        q.astype(jnp.float32),
        k,
        v,
        k_scales,
        v_scales,
        kv_cache,
        scales,
        meta.slots,
        meta.block_tables,
        meta.seq_lens,
        meta.cu_q_lens,
        meta.n_seqs,
        none if alibi_slopes is None else alibi_slopes.astype(jnp.float32),
        none if sinks is None else sinks.astype(jnp.float32),
        scale=np.float32(spec.scale),
        soft_cap=np.float32(spec.soft_cap or 0),
        window=np.int64(spec.window or 0),
        kind=np.int64(-1 if kind is None else list(KINDS).index(kind)),
    )
    out = out.astype(q.dtype)
    if kv_scales is None:
        return out, kv_cache
    assert kv_cache.dtype in QUANTIZED
    return out, kv_cache, scales.astype(kv_scales.dtype)
