"""Paged attention on TPU: three Pallas programs over a cache with its cells on the lanes.

`paged_decode` serves sequences with one new token and writes that token's cell in the block that it
has just read; `paged_write` and `paged_chunk` serve the others. The cache is "B K 2 H C" with C =
128: a tile of 128 cells is a legal operand of the matrix unit for every head size, so no head size
is padded. Everything stays in HBM, block tables too; the programs fetch what they need, several
tiles ahead, and no limit on sequences or contexts comes from the size of a core's memories.

Design: kernels 2.1 and 3.3 of the literature that RPA v3 (tpu-inference) and FlashAttention-2
(Dao, 2023) stand for; nothing is copied from them.
"""

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Num

from pallas_kernels.contract import (
    AttentionSpec,
    RaggedMeta,
    check_arguments,
    check_heads,
    quantize,
)
from pallas_kernels.tpu.chunk import paged_chunk
from pallas_kernels.tpu.decode import paged_decode
from pallas_kernels.tpu.tiles import Tiles, tiles_for
from pallas_kernels.tpu.write import paged_write

N_CELLS = 128  # of a block: the lanes of a vector register


def ragged_paged_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    kv_cache: Num[Array, "B K 2 H C"],
    meta: RaggedMeta,
    *,
    spec: AttentionSpec,
    alibi_slopes: Float[Array, "N"] | None = None,
    sinks: Float[Array, "N"] | None = None,
    kv_scales: Float[Array, "B K 2 C"] | None = None,
    tiles: Tiles | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Array, ...]:
    """See contract.RaggedPagedAttention; float16 caches are refused, TPUs have no such type.

    Args:
        tiles: how the work is cut; default: the table of tiles.py for this chip.
        interpret: run on CPU, as pl.pallas_call takes it.
    """
    check_arguments(q, k, v, kv_cache, meta, kv_scales, cells_last=True)
    if kv_cache.shape[-1] != N_CELLS:
        raise ValueError(f"pallas_tpu has blocks of {N_CELLS} cells, not {kv_cache.shape[-1]}")
    for dtype in (q.dtype, kv_cache.dtype):
        group_size = q.shape[1] // k.shape[1]
        check_heads("pallas_tpu", head_size=q.shape[2], group_size=group_size, dtype=dtype)
    if tiles is None:
        tiles = tiles_for(len(q), q.shape[1], kv_cache, interpret=bool(interpret))
    features = {"alibi_slopes": alibi_slopes, "sinks": sinks, "spec": spec}
    options = {"tiles": tiles, "interpret": interpret, **features}
    new = new_cells(k, v, kv_cache.dtype)
    cache = (kv_cache,) if kv_scales is None else (kv_cache, kv_scales)
    singles, cache = paged_decode(q, new, cache, meta, **options)
    cache = paged_write(new, cache, meta, tiles=tiles, interpret=interpret)
    out, cache = paged_chunk(q, cache, meta, **options)
    token = jnp.arange(len(q))[:, None, None]
    is_real = token < meta.cu_q_lens[meta.n_seqs]
    out = jnp.where(token < meta.n_single, singles, jnp.where(is_real, out, 0))
    return out, *cache


def new_cells(k: Float[Array, "T K H"], v: Float[Array, "T K H"], dtype) -> tuple[Array, ...]:
    """This step's keys and values "T K 2 H" as the cache stores them, and their scales "T K 2"."""
    new = jnp.stack([k, v], axis=2)
    if jnp.dtype(dtype).itemsize > 1:
        return (new.astype(dtype),)
    return quantize(new, dtype)
