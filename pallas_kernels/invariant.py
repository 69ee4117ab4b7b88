"""Paged attention whose rows are each a function of their own query and context alone, bit for bit.

Every token is a row of its own, whatever sequence, chunk or step it is in. All rows go through the
context side by side, a tile of KEYS cells after the other from position 0 on: a tile of which a row
sees nothing adds zeros to it, which leaves it as it is. So neither the other rows, nor how a prompt
is cut into chunks, change the order in which a row's sums are made. The number of rows does belong
to the program: callers give the same one always.

What it costs: tokens of one prompt read their common context one by one, and every row goes as far
as the longest one's context.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num

from pallas_kernels.contract import AttentionSpec, RaggedMeta
from pallas_kernels.xla import (
    RaggedBatch,
    Softmax,
    Tiles,
    finish,
    first_tile_of,
    flat_tables,
    masked_scores,
    merge,
    prepare,
    start_of,
)

KEYS = 64  # cells of a tile; more where a block has more, or does not divide it


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
) -> tuple[Array, ...]:
    """See contract.RaggedPagedAttention."""
    batch, cache = prepare(
        q, k, v, kv_cache, meta, spec, alibi_slopes, sinks, kv_scales, tiles=Tiles()
    )
    return _rows(batch).reshape(q.shape).astype(q.dtype), *cache


def _rows(batch: RaggedBatch) -> Float[Array, "T K G H"]:
    meta, window = batch.meta, batch.spec.window
    n_tokens, n_kv_heads, group_size, head_size = batch.q.shape
    n_blocks = -(-KEYS // batch.n_cells)
    n_keys = n_blocks * batch.n_cells
    table, table_width = flat_tables(meta.block_tables, n_blocks)

    token = jnp.arange(n_tokens, dtype=jnp.int32)
    sequence = (meta.cu_q_lens[None, 1:] <= token[:, None]).sum(1)
    is_real = token < meta.cu_q_lens[-1]
    sequence = jnp.where(is_real, sequence, 0)
    context = jnp.where(is_real, meta.positions + 1, 0)
    first = jnp.where(is_real, first_tile_of(meta.positions, window, n_keys), table_width)
    last = -(-context.max() // n_keys)

    def plan(j):
        block = (sequence * table_width + j * n_blocks)[:, None] + jnp.arange(n_blocks)[None]
        return batch.key_rows(table.at[block].get(mode="clip"))

    def body(j, carry):
        state, key_rows = carry
        keys, values = batch.load(j < last, key_rows, n_tokens)
        scales = batch.load_scales(key_rows, n_tokens)
        cell = j * n_keys + jnp.arange(n_keys)[None]
        distance = (cell - meta.positions[:, None])[:, None]  # T 1 M
        is_cached = cell < context[:, None]
        queries = batch.q[:, :, :, None]
        scores, visible = masked_scores(batch, queries, keys, scales, distance, is_cached)
        scores = scores[:, :, :, 0]  # T K G M
        top = scores.max(-1)
        weights = jnp.where(visible[:, None], jnp.exp(scores - top[..., None]), 0.0)
        factors = weights
        if scales is not None:
            factors = weights * jnp.where(visible, scales.values, 0.0)[:, :, None]
        values = jnp.where(visible[..., None], values, jnp.zeros((), values.dtype))
        acc = jnp.einsum(
            "tkgm,tkmh->tkgh",
            factors.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return merge(state, Softmax(acc, top, weights.sum(-1))), plan(j + 1)

    state = start_of(batch, (n_tokens, n_kv_heads, group_size, 1, head_size))
    state = Softmax(*(x[:, :, :, 0] for x in state))
    state, _ = lax.fori_loop(first.min(), last, body, (state, plan(first.min())))
    return finish(state)
