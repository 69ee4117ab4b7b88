"""Paged attention in plain XLA, tuned for CPU; any platform with a "B K 2 C H" cache runs it.

Shapes are fixed, work is not: loops run over the batch's real sequences and their real contexts,
and no intermediate is larger than one tile, whatever the pool and the block tables could hold.

What XLA:CPU is good at decides the form (jax 0.10.2, measured):
- A gather of rows "n, C * H" from the flat pool copies at memory speed; fused with a reshape, with
  arithmetic on its indices or with a mask it is 3 to 6 times slower. So indices are computed one
  iteration ahead and carried by the loop, and each gather is a branch of a `cond`, which nothing
  fuses with.
- Scatters of bfloat16 and float8 convert the whole array to float32 and back. So caches of them are
  stored as uint16 and uint8 (contract.cache_dtype).
- Cells of a quantised cache are cast as they are loaded; their scales are applied to scores and
  weights, one per key instead of one per element.
- Gathers and large elementwise steps use all cores and run beside what does not need them: the
  values arrive during the product with the keys. Small batched products use one core, and loops
  that do not depend on each other still run one after the other.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from pallas_kernels.contract import (
    QUANTIZED,
    AttentionSpec,
    RaggedMeta,
    check_arguments,
    decode,
    encode,
    quantize,
)

LOWEST = -1e30  # a score that weighs nothing; finite, so that differences are never NaN
FEW_ROWS = 16  # per KV head; with fewer queries, reading a tile costs more than its products


@dataclass(frozen=True)
class Tiles:
    """How much work one loop iteration does; rounded up to whole blocks of the cache."""

    single_keys: int = 64  # KV cells of one sequence, single-token sequences
    single_items: int = 32  # such tiles, of any sequences
    chunk_keys: int = 256  # KV cells, chunks
    chunk_queries: int = 128  # tokens, chunks


TILES = Tiles()


class Softmax(NamedTuple):
    """A softmax over some keys: out = acc / total, where a key's weight is exp(score - top)."""

    acc: Float[Array, "*rows H"]
    top: Float[Array, "*rows"]
    total: Float[Array, "*rows"]


class Scales(NamedTuple):
    """What the keys and values of one tile of a quantised cache are to be multiplied by."""

    keys: Float[Array, "W K M"]
    values: Float[Array, "W K M"]


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
    tiles: Tiles = TILES,
) -> tuple[Array, ...]:
    """See contract.RaggedPagedAttention."""
    batch, cache = prepare(
        q, k, v, kv_cache, meta, spec, alibi_slopes, sinks, kv_scales, tiles=tiles
    )
    out = _chunks(batch, _singles(batch)).astype(q.dtype)
    return out.reshape(q.shape), *cache


def prepare(
    q, k, v, kv_cache, meta: RaggedMeta, spec, alibi_slopes, sinks, kv_scales, *, tiles: Tiles
) -> tuple["RaggedBatch", tuple[Array, ...]]:
    """The arguments of a call with the cache and its scales written, and these."""
    check_arguments(q, k, v, kv_cache, meta, kv_scales)
    n_tokens, _, head_size = q.shape
    n_kv_heads = k.shape[1]
    kv_cache, kv_scales = write(k, v, kv_cache, kv_scales, meta.slots)
    dtype = q.dtype if kv_cache.dtype in QUANTIZED else kv_cache.dtype
    q_grouped = q.astype(jnp.bfloat16 if dtype in (jnp.bfloat16, jnp.uint16) else jnp.float32)
    q_grouped = q_grouped.reshape(n_tokens, n_kv_heads, -1, head_size)  # T K G H
    slopes, sinks = (
        None if x is None else x.astype(jnp.float32).reshape(n_kv_heads, -1)  # K G
        for x in (alibi_slopes, sinks)
    )
    batch = RaggedBatch(
        q=q_grouped,
        rows=kv_cache.reshape(-1, *kv_cache.shape[3:]),
        scales=None if kv_scales is None else kv_scales.reshape(-1, kv_scales.shape[3]),
        meta=meta,
        spec=spec,
        slopes=slopes,
        sinks=sinks,
        tiles=tiles,
    )
    return batch, (kv_cache,) if kv_scales is None else (kv_cache, kv_scales)


def write(
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    kv_cache: Num[Array, "B K 2 C H"],
    kv_scales: Float[Array, "B K 2 C"] | None,
    slots: Int[Array, "T"],
) -> tuple[Num[Array, "B K 2 C H"], Float[Array, "B K 2 C"] | None]:
    """The cache, changed in place, with each token's key and value in its cell; so the scales.

    The pool is written as cells "B*K*2*C H": TPU would transpose it, twice, to scatter into 5 axes.
    """
    _, n_kv_heads, _, n_cells, head_size = kv_cache.shape
    block, cell = slots[:, None] // n_cells, slots[:, None] % n_cells
    cells = kv_cache.reshape(-1, head_size)
    scales = None if kv_scales is None else kv_scales.reshape(-1)
    for i, x in enumerate((k, v)):
        head = jnp.arange(n_kv_heads)[None]
        index = ((block * n_kv_heads + head) * 2 + i) * n_cells + cell  # T K
        if scales is None:
            rows = encode(x, kv_cache.dtype)
        else:
            rows, new = quantize(x, kv_cache.dtype)
            new = new.reshape(-1).astype(scales.dtype)
            scales = scales.at[index.reshape(-1)].set(new, mode="promise_in_bounds")
        rows = rows.reshape(-1, head_size)
        cells = cells.at[index.reshape(-1)].set(rows, mode="promise_in_bounds")
    if scales is not None:
        scales = scales.reshape(-1, n_kv_heads, 2, n_cells)
    return cells.reshape(kv_cache.shape), scales


@dataclass(frozen=True)
class RaggedBatch:
    """The arguments of one call, prepared."""

    q: Float[Array, "T K G H"]  # in the dtype of the products
    rows: Num[Array, "B*K*2 C H"]  # the whole pool; row (block * K + head) * 2 + (0: K, 1: V)
    scales: Float[Array, "B*K*2 C"] | None  # of a quantised pool's cells
    meta: RaggedMeta
    spec: AttentionSpec
    slopes: Float[Array, "K G"] | None
    sinks: Float[Array, "K G"] | None
    tiles: Tiles

    @property
    def n_cells(self) -> int:
        return self.rows.shape[1]

    def key_rows(self, blocks: Int[Array, "W J"]) -> Int[Array, "W*K*J"]:
        """Where in `rows` the keys of these blocks are; their values are one row below."""
        n_kv_heads = self.q.shape[1]
        head = jnp.arange(n_kv_heads)[None, :, None]
        return ((blocks[:, None] * n_kv_heads + head) * 2).reshape(-1)

    def load(self, is_real: Bool[Array, ""], key_rows: Int[Array, "W*K*J"], n_tiles: int):
        """Keys and values "W K M H" of tiles of whole blocks. `is_real` is always true: see top."""
        n_kv_heads, _, head_size = self.q.shape[1:]

        def gather(index):
            rows = lax.platform_dependent(self.rows, index, cpu=_take_flat, default=_take)
            return decode(rows).astype(self.q.dtype)

        def tiles(index):
            empty = jnp.zeros((len(index), self.n_cells * head_size), self.q.dtype)
            rows = lax.cond(is_real, lambda: gather(index), lambda: empty)
            return rows.reshape(n_tiles, n_kv_heads, -1, head_size)

        return tiles(key_rows), tiles(key_rows + 1)

    def load_scales(self, key_rows: Int[Array, "W*K*J"], n_tiles: int) -> Scales | None:
        """The scales of what `load` gives; where no token is cached they may be NaN."""
        if self.scales is None:
            return None
        keys, values = (
            self.scales.at[index].get(mode="promise_in_bounds").astype(jnp.float32)
            for index in (key_rows, key_rows + 1)
        )
        shape = n_tiles, self.q.shape[1], -1
        return Scales(keys.reshape(shape), values.reshape(shape))


def _take(rows: Num[Array, "R C H"], index: Int[Array, "n"]) -> Num[Array, "n C*H"]:
    """Those rows of the pool, flat; the pool keeps its layout, which TPU would have to change."""
    return rows.at[index].get(mode="promise_in_bounds").reshape(len(index), -1)


def _take_flat(rows: Num[Array, "R C H"], index: Int[Array, "n"]) -> Num[Array, "n C*H"]:
    """The same on CPU, where a flat pool is the same bytes and its rows are copied faster."""
    return rows.reshape(len(rows), -1).at[index].get(mode="promise_in_bounds")


def _attend(
    batch: RaggedBatch,
    q: Float[Array, "W K G Q H"],
    keys: Float[Array, "W K M H"],
    values: Float[Array, "W K M H"],
    scales: Scales | None,
    distance: Int[Array, "W Q M"],
    is_cached: Bool[Array, "W M"],
) -> Softmax:
    """Attention of W tiles of queries, each to its own tile of keys; softmax in float32.

    `distance` is key position - query position. A query that sees no key of its tile comes out with
    top = LOWEST and must be given weight 0 by whoever merges it.
    """
    scores, _ = masked_scores(batch, q, keys, scales, distance, is_cached)
    top = scores.max(-1)
    weights = jnp.exp(scores - top[..., None])
    factors = weights
    if scales is not None:
        factors = weights * jnp.where(is_cached[:, None], scales.values, 0.0)[:, :, None, None]
    return Softmax(_weighted_sum(factors, values, is_cached), top, weights.sum(-1))


def masked_scores(
    batch: RaggedBatch,
    q: Float[Array, "W K G Q H"],
    keys: Float[Array, "W K M H"],
    scales: Scales | None,
    distance: Int[Array, "W Q M"],
    is_cached: Bool[Array, "W M"],
) -> tuple[Float[Array, "W K G Q M"], Bool[Array, "W Q M"]]:
    """LOWEST where a query does not see a key, and which it sees."""
    spec = batch.spec
    visible = is_cached[:, None] & (distance <= 0)
    if spec.window is not None:
        visible &= distance > -spec.window
    scores = _dot(q, keys, spec.scale)
    if scales is not None:
        scores = scores * scales.keys[:, :, None, None]
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    if batch.slopes is not None:
        bias = distance.astype(jnp.float32)[:, None, None]
        scores = scores + batch.slopes[None, :, :, None, None] * bias
    return jnp.where(visible[:, None, None], scores, LOWEST), visible


def _dot(
    q: Float[Array, "W K G Q H"], keys: Float[Array, "W K M H"], scale: float
) -> Float[Array, "W K G Q M"]:
    n_rows = q.shape[2] * q.shape[3]
    shape = (*q.shape[:4], keys.shape[2])
    q = q.reshape(*q.shape[:2], n_rows, q.shape[4])
    if q.dtype == jnp.float32 and n_rows < FEW_ROWS:
        # Few queries: 1.6 times faster this way round; the factor keeps XLA from turning it back.
        scores = jnp.einsum("wkmh,wklh->wkml", keys, q, preferred_element_type=jnp.float32)
        return (scores * scale).transpose(0, 1, 3, 2).reshape(shape)
    scores = jnp.einsum("wklh,wkmh->wklm", q, keys, preferred_element_type=jnp.float32)
    return (scores * scale).reshape(shape)


def _weighted_sum(
    weights: Float[Array, "W K G Q M"],
    values: Float[Array, "W K M H"],
    is_cached: Bool[Array, "W M"],
) -> Float[Array, "W K G Q H"]:
    """Sums of the values. Cells without a token weigh 0, but what they hold may be NaN."""
    rows = weights.astype(values.dtype).reshape(*weights.shape[:2], -1, weights.shape[4])

    def dot(values):
        return jnp.einsum("wklm,wkmh->wklh", rows, values, preferred_element_type=jnp.float32)

    def clean_dot():
        return dot(jnp.where(is_cached[:, None, :, None], values, jnp.zeros((), values.dtype)))

    if rows.shape[2] < FEW_ROWS:
        out = dot(values)
        is_clean = jnp.isfinite(out.sum(-1)).all()
        out = lax.cond(is_clean, lambda: out, clean_dot)
    else:
        out = clean_dot()
    return out.reshape(*weights.shape[:4], -1)


def start_of(batch: RaggedBatch, shape: tuple[int, ...]) -> Softmax:
    """A softmax over the sinks alone. `shape` is "... K G Q H"."""
    acc = jnp.zeros(shape, jnp.float32)
    if batch.sinks is None:
        return Softmax(acc, jnp.full(shape[:-1], LOWEST), jnp.zeros(shape[:-1]))
    top = jnp.broadcast_to(batch.sinks[..., None], shape[:-1])
    return Softmax(acc, top, jnp.ones(shape[:-1]))


def finish(state: Softmax) -> Float[Array, "*rows H"]:
    return state.acc / jnp.where(state.total == 0, 1.0, state.total)[..., None]


def _singles(batch: RaggedBatch) -> Float[Array, "T K G H"]:
    """Attention of the sequences with one new token; zeros for all other tokens.

    The work is a list of items, one per sequence and tile of its context; each iteration takes the
    next `n_items`, so that its cost follows the sum of the contexts, not the longest one.
    """
    meta, window = batch.meta, batch.spec.window
    n_tokens, n_kv_heads, group_size, head_size = batch.q.shape
    n_rows = min(n_tokens, len(meta.seq_lens))
    n_items = min(batch.tiles.single_items, max(4, n_rows))
    n_blocks = -(-batch.tiles.single_keys // batch.n_cells)
    n_keys = n_blocks * batch.n_cells
    q = batch.q[:n_rows]
    table, table_width = flat_tables(meta.block_tables, n_blocks)

    is_single = jnp.arange(n_rows) < jnp.minimum(meta.n_single, meta.n_seqs)
    seq_lens = jnp.where(is_single, meta.seq_lens[:n_rows], 0)
    first_tile = first_tile_of(seq_lens - 1, window, n_keys)
    end = jnp.cumsum(-(-seq_lens // n_keys) - first_tile)  # of each sequence's items
    n_total = end[-1]

    def plan(i):
        """The items of iteration i: row, tile, number of cached cells and where the keys are."""
        item = i * n_items + jnp.arange(n_items)
        row = jnp.minimum((end[None, :] <= item[:, None]).sum(1), n_rows - 1)
        last_tile = -(-seq_lens[row] // n_keys) - 1
        is_item = item < n_total
        tile = jnp.where(is_item, last_tile - (end[row] - 1 - item), 0)
        block = (row * table_width + tile * n_blocks)[:, None] + jnp.arange(n_blocks)[None]
        n_cached = jnp.where(is_item, jnp.minimum(seq_lens[row] - tile * n_keys, n_keys), 0)
        return row, tile, n_cached, batch.key_rows(table[block])

    def body(i, carry):
        state, (row, tile, n_cached, key_rows) = carry
        keys, values = batch.load(i * n_items < n_total, key_rows, n_items)
        cell = jnp.arange(n_keys)[None]
        distance = tile[:, None] * n_keys + cell - (seq_lens[row] - 1)[:, None]
        is_cached = cell < n_cached[:, None]
        scales = batch.load_scales(key_rows, n_items)
        query = q[row][:, :, :, None]
        part = _attend(batch, query, keys, values, scales, distance[:, None], is_cached)
        part = Softmax(*(x[:, :, :, 0] for x in part))
        return _merge_rows(state, part, jnp.where(n_cached > 0, row, n_rows)), plan(i + 1)

    state = start_of(batch, (n_rows, n_kv_heads, group_size, 1, head_size))
    state = Softmax(*(x[:, :, :, 0] for x in state))
    state, _ = lax.fori_loop(0, -(-n_total // n_items), body, (state, plan(0)))
    out = jnp.zeros(batch.q.shape, jnp.float32)
    return lax.dynamic_update_slice_in_dim(out, finish(state), 0, axis=0)


def _merge_rows(state: Softmax, part: Softmax, row: Int[Array, "W"]) -> Softmax:
    """Adds each part to its row of the state; several may have the same row, row R is dropped."""
    top = state.top.at[row].max(part.top, mode="drop")
    shrink = jnp.exp(state.top - top)
    grow = jnp.exp(part.top - top.at[row].get(mode="fill", fill_value=0.0))
    acc = (state.acc * shrink[..., None]).at[row].add(part.acc * grow[..., None], mode="drop")
    return Softmax(acc, top, (state.total * shrink).at[row].add(part.total * grow, mode="drop"))


def _chunks(batch: RaggedBatch, out: Float[Array, "T K G H"]) -> Float[Array, "T K G H"]:
    """`out` with the sequences that have several new tokens added, a tile of queries at a time."""
    meta, window = batch.meta, batch.spec.window
    n_tokens, n_kv_heads, group_size, head_size = batch.q.shape
    n_queries = min(batch.tiles.chunk_queries, n_tokens)
    n_blocks = -(-batch.tiles.chunk_keys // batch.n_cells)
    n_keys = n_blocks * batch.n_cells
    table, table_width = flat_tables(meta.block_tables, n_blocks)

    n_new = jnp.diff(meta.cu_q_lens)
    row = jnp.arange(len(n_new))
    is_chunk = (jnp.minimum(meta.n_single, meta.n_seqs) <= row) & (row < meta.n_seqs)
    end = jnp.cumsum(jnp.where(is_chunk, -(-n_new // n_queries), 0))  # of each sequence's tiles

    def query_tile(i, out):
        row = (end <= i).sum()
        seq_len, stop = meta.seq_lens[row], meta.cu_q_lens[row + 1]
        start = stop - n_new[row] + (i - end[row] + -(-n_new[row] // n_queries)) * n_queries
        first_token = jnp.minimum(start, n_tokens - n_queries)  # slices are clamped to the array
        token = first_token + jnp.arange(n_queries)
        position = token - stop + seq_len
        q = lax.dynamic_slice_in_dim(batch.q, first_token, n_queries)
        q = q.transpose(1, 2, 0, 3)[None]  # 1 K G Q H

        def plan(j):
            blocks = lax.dynamic_slice(table, (row * table_width + j * n_blocks,), (n_blocks,))
            return batch.key_rows(blocks[None])

        def body(j, carry):
            state, key_rows = carry
            keys, values = batch.load(j < last, key_rows, 1)
            key_position = j * n_keys + jnp.arange(n_keys)[None]
            distance = key_position - position[:, None]
            scales = batch.load_scales(key_rows, 1)
            part = _attend(batch, q, keys, values, scales, distance[None], key_position < seq_len)
            return merge(state, Softmax(*(x[0] for x in part))), plan(j + 1)

        first = first_tile_of(start - stop + seq_len, window, n_keys)
        last = -(-jnp.minimum(start + n_queries - stop + seq_len, seq_len) // n_keys)
        state = start_of(batch, (n_kv_heads, group_size, n_queries, head_size))
        state, _ = lax.fori_loop(first, last, body, (state, plan(first)))
        is_own = (start <= token) & (token < stop)
        before = lax.dynamic_slice_in_dim(out, first_token, n_queries)
        rows = jnp.where(is_own[:, None, None, None], finish(state).transpose(2, 0, 1, 3), before)
        return lax.dynamic_update_slice_in_dim(out, rows, first_token, axis=0)

    return lax.fori_loop(0, end[-1], query_tile, out)


def merge(a: Softmax, b: Softmax) -> Softmax:
    top = jnp.maximum(a.top, b.top)
    shrink, grow = jnp.exp(a.top - top), jnp.exp(b.top - top)
    acc = a.acc * shrink[..., None] + b.acc * grow[..., None]
    return Softmax(acc, top, a.total * shrink + b.total * grow)


def flat_tables(tables: Int[Array, "S P"], multiple: int) -> tuple[Int[Array, "S*P"], int]:
    """All block tables in one line, each padded with the scratch block to whole tiles."""
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % multiple)))
    return tables.reshape(-1), tables.shape[1]


def first_tile_of(
    position: Int[Array, "..."], window: int | None, n_keys: int
) -> Int[Array, "..."]:
    """The first tile of keys that a query at `position` may see."""
    if window is None:
        return jnp.zeros_like(position)
    return jnp.maximum(position - window + 1, 0) // n_keys
