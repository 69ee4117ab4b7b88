"""Paged attention in plain XLA, tuned for CPU; any platform with the "B K 2 C H" layout runs it.

Shapes are fixed, work is not: loops run over the batch's real sequences and their real contexts. No intermediate is
larger than one tile of KV per sequence, whatever the pool and the block tables could hold.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from pallas_kernels.contract import AttentionSpec, RaggedMeta, check_arguments

SINGLE_TILE = 128  # KV cells of each sequence per iteration, single-token sequences
CHUNK_TILE = 256  # KV cells per iteration, chunks
QUERY_TILE = 128  # tokens of a chunk per iteration


class Softmax(NamedTuple):
    """The running state of an online softmax: out = acc / total, for weights exp(score - top)."""

    acc: Float[Array, "*rows H"]
    top: Float[Array, "*rows"]
    total: Float[Array, "*rows"]


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
) -> tuple[Float[Array, "T N H"], Num[Array, "B K 2 C H"]]:
    """See contract.RaggedPagedAttention."""
    check_arguments(q, k, v, kv_cache, meta, kv_scales)
    n_tokens, n_heads, head_size = q.shape
    n_kv_heads = k.shape[1]
    kv_cache = _write(k, v, kv_cache, meta.slots)
    q_grouped = q.astype(jnp.float32) * spec.scale
    q_grouped = q_grouped.reshape(n_tokens, n_kv_heads, -1, head_size)  # T K G H
    per_head = [
        None if x is None else x.astype(jnp.float32).reshape(n_kv_heads, -1)
        for x in (alibi_slopes, sinks)
    ]
    attend = functools.partial(_attend_tile, spec=spec, slopes=per_head[0])
    out = _singles(q_grouped, kv_cache, meta, spec.window, per_head[1], attend)
    out = _chunks(q_grouped, out, kv_cache, meta, spec.window, per_head[1], attend)
    is_token = jnp.arange(n_tokens) < meta.cu_q_lens[meta.n_seqs]
    out = jnp.where(is_token[:, None, None, None], out, 0.0)
    return out.reshape(q.shape).astype(q.dtype), kv_cache


def _write(k, v, kv_cache, slots):
    n_cells = kv_cache.shape[3]
    new = jnp.stack([k, v], axis=2).astype(kv_cache.dtype)  # T K 2 H
    return kv_cache.at[slots // n_cells, :, :, slots % n_cells].set(new, mode="drop")


def _start(shape: tuple[int, ...], sinks: Float[Array, "K G"] | None) -> Softmax:
    """Nothing attended yet, except the sinks. `shape` is "R K G L H"."""
    if sinks is None:
        top = jnp.full(shape[:-1], -1e30, jnp.float32)
        return Softmax(jnp.zeros(shape, jnp.float32), top, jnp.zeros_like(top))
    top = jnp.broadcast_to(sinks[None, :, :, None], shape[:-1])
    return Softmax(jnp.zeros(shape, jnp.float32), top, jnp.ones_like(top))


def _finish(state: Softmax) -> Float[Array, "R K G L H"]:
    return state.acc / jnp.where(state.total == 0.0, 1.0, state.total)[..., None]


def _attend_tile(
    state: Softmax,
    q: Float[Array, "R K G L H"],
    kv: Num[Array, "R J K 2 C H"],
    distance: Int[Array, "R L M"],
    is_cached: Bool[Array, "R M"],
    *,
    spec: AttentionSpec,
    slopes: Float[Array, "K G"] | None,
) -> Softmax:
    """One step of the online softmax. `distance` is key position - query position; M = J * C."""
    kv = kv.astype(jnp.float32).transpose(3, 0, 2, 1, 4, 5)  # 2 R K J C H
    keys, values = kv.reshape(*kv.shape[:3], -1, kv.shape[5])
    values = jnp.where(is_cached[:, None, :, None], values, 0.0)  # unused cells may be NaN
    visible = is_cached[:, None, :] & (distance <= 0)
    if spec.window is not None:
        visible &= distance > -spec.window
    scores = jnp.einsum("rkglh,rkmh->rkglm", q, keys)
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    if slopes is not None:
        bias = distance.astype(jnp.float32)[:, None, None]
        scores = scores + slopes[None, :, :, None, None] * bias
    visible = visible[:, None, None]
    scores = jnp.where(visible, scores, -jnp.inf)
    top = jnp.maximum(state.top, scores.max(-1))
    weights = jnp.exp(scores - top[..., None])
    shrink = jnp.exp(state.top - top)
    acc = state.acc * shrink[..., None] + jnp.einsum("rkglm,rkmh->rkglh", weights, values)
    return Softmax(acc, top, state.total * shrink + weights.sum(-1))


def _singles(q, kv_cache, meta, window, sinks, attend):
    """The tokens that are their sequence's only new one: all of them at once, tile by tile of context."""
    n_rows = min(len(q), len(meta.seq_lens))
    n_cells = kv_cache.shape[3]
    is_single = jnp.arange(n_rows) < jnp.minimum(meta.n_single, meta.n_seqs)
    seq_lens = jnp.where(is_single, meta.seq_lens[:n_rows], 0)
    blocks_per_tile = max(1, SINGLE_TILE // n_cells)
    tile = blocks_per_tile * n_cells
    tables = _pad_tables(meta.block_tables[:n_rows], blocks_per_tile)
    queries = q[:n_rows, :, :, None]  # R K G 1 H

    def add_tile(j, state):
        ids = lax.dynamic_slice_in_dim(tables, j * blocks_per_tile, blocks_per_tile, axis=1)
        position = j * tile + jnp.arange(tile)[None, :]
        distance = position - (seq_lens[:, None] - 1)
        is_cached = position < seq_lens[:, None]
        return attend(state, queries, kv_cache[ids], distance[:, None, :], is_cached)

    first = _first_tile(jnp.where(is_single, seq_lens, 2**30).min() - 1, window, tile)
    last = -(-seq_lens.max() // tile)
    state = lax.fori_loop(first, last, add_tile, _start(queries.shape, sinks))
    out = jnp.zeros(q.shape, jnp.float32)
    return lax.dynamic_update_slice(out, _finish(state)[:, :, :, 0], (0, 0, 0, 0))


def _chunks(q, out, kv_cache, meta, window, sinks, attend):
    """Sequences with several new tokens: one tile of queries of one sequence at a time."""
    n_tokens, n_kv_heads, group_size, head_size = q.shape
    n_cells = kv_cache.shape[3]
    n_queries = min(QUERY_TILE, n_tokens)
    blocks_per_tile = max(1, CHUNK_TILE // n_cells)
    tile = blocks_per_tile * n_cells
    tables = _pad_tables(meta.block_tables, blocks_per_tile)
    pad = ((0, n_queries), (0, 0), (0, 0), (0, 0))  # a slice at the last token must not be clamped
    q, out = jnp.pad(q, pad), jnp.pad(out, pad)

    def add_query_tile(i, carry):
        s, out = carry
        start = meta.cu_q_lens[s] + i * n_queries
        n_cached = meta.seq_lens[s] - (meta.cu_q_lens[s + 1] - meta.cu_q_lens[s])
        first_position = n_cached + i * n_queries
        query_position = (first_position + jnp.arange(n_queries))[:, None]  # L 1
        queries = lax.dynamic_slice_in_dim(q, start, n_queries)
        queries = queries.transpose(1, 2, 0, 3)[None]  # 1 K G L H

        def add_tile(j, state):
            ids = lax.dynamic_slice(tables, (s, j * blocks_per_tile), (1, blocks_per_tile))
            position = j * tile + jnp.arange(tile)[None, :]
            is_cached = position < meta.seq_lens[s]
            distance = (position - query_position)[None]
            return attend(state, queries, kv_cache[ids], distance, is_cached)

        first = _first_tile(first_position, window, tile)
        n_visible = jnp.minimum(first_position + n_queries, meta.seq_lens[s])
        state = lax.fori_loop(first, -(-n_visible // tile), add_tile, _start(queries.shape, sinks))
        rows = _finish(state)[0].transpose(2, 0, 1, 3)  # L K G H
        return s, lax.dynamic_update_slice_in_dim(out, rows, start, 0)

    def add_sequence(s, out):
        n_new = meta.cu_q_lens[s + 1] - meta.cu_q_lens[s]
        return lax.fori_loop(0, -(-n_new // n_queries), add_query_tile, (s, out))[1]

    out = lax.fori_loop(jnp.minimum(meta.n_single, meta.n_seqs), meta.n_seqs, add_sequence, out)
    return out[:n_tokens]


def _pad_tables(tables: Int[Array, "S P"], multiple: int) -> Int[Array, "S P"]:
    return jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % multiple)))


def _first_tile(position: Int[Array, ""], window: int | None, tile: int) -> Int[Array, ""]:
    """The first tile of keys that a query at `position` may see."""
    if window is None:
        return jnp.zeros_like(position)
    return jnp.maximum(position - window + 1, 0) // tile
