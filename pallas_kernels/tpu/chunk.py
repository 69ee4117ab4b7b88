"""Sequences with several new tokens: attention of tiles of queries to their contexts.

Tokens are cut into tiles of `chunk_queries` wherever sequences begin and end; an owner is a tile
and one sequence that has tokens in it, and keeps only its own tokens' results. Queries are on
lanes: scores are "C Q" (a product of transposed keys and queries), so that the softmax's maximum
and sum go over sublanes, elementwise, its statistics are rows, and values "H C" times weights "C Q"
is a plain product. Keys are transposed once per head and tile, for all queries of the group.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.contract import AttentionSpec, RaggedMeta
from pallas_kernels.tpu.program import launch, stream_room
from pallas_kernels.tpu.stream import (
    LOG2_E,
    LOWEST,
    Cursor,
    Owner,
    Stream,
    dot,
    log2_scores,
    mask_scores,
    product_dtype,
    shares,
)
from pallas_kernels.tpu.tiles import Tiles


def paged_chunk(
    q: Float[Array, "T N H"],
    cache: tuple[Array, ...],
    meta: RaggedMeta,
    *,
    spec: AttentionSpec,
    alibi_slopes: Float[Array, "N"] | None,
    sinks: Float[Array, "N"] | None,
    tiles: Tiles,
    interpret: Any,
) -> tuple[Float[Array, "T N H"], tuple[Array, ...]]:
    """Rows of tokens whose sequence has more than one (the others hold anything); the cache as it
    is.
    """
    n_tokens, n_heads, head_size = q.shape
    n_kv_heads, n_cells = cache[0].shape[1], cache[0].shape[4]
    size = tiles.chunk_queries
    n_tiles = -(-n_tokens // size)
    tiled = jnp.pad(q, ((0, n_tiles * size - n_tokens), (0, 0), (0, 0)))
    tiled = tiled.reshape(n_tiles, size, n_kv_heads, -1, head_size).transpose(0, 2, 3, 4, 1)
    pairs = _pairs(meta, n_tiles, size, n_cells, spec.window)
    costs = pairs["ends"] - pairs["firsts"]
    borders = shares(costs, tiles.n_cores)
    # A tile of queries stays with one core: a border moves to the first pair of the next tile.
    before = pairs["tiles"][jnp.maximum(borders - 1, 0)]
    is_before = (costs > 0)[None] & (pairs["tiles"][None] <= before[:, None])
    borders = jnp.where(borders > 0, is_before.sum(1, dtype=jnp.int32), 0)
    per_head = {"slopes": alibi_slopes, "sinks": sinks}
    per_head = {k: x.astype(jnp.float32) for k, x in per_head.items() if x is not None}
    out, cache = launch(
        lambda refs: Core(refs, spec, tiles).run(),
        name="paged_chunk",
        scalars={**pairs, **per_head, "borders": borders},
        hbm={"tables": meta.block_tables[:, None], "q": tiled},
        vmem={},
        cache=cache,
        out={"out": jax.ShapeDtypeStruct(tiled.shape, q.dtype)},
        scratch=_scratch(tiled, cache, meta.block_tables.shape[1], tiles),
        tiles=tiles,
        interpret=interpret,
    )
    rows = out["out"].transpose(0, 4, 1, 2, 3).reshape(-1, n_heads, head_size)
    return rows[:n_tokens], cache


def _pairs(meta: RaggedMeta, n_tiles: int, size: int, n_cells: int, window: int | None):
    """Each tile of queries with each sequence that has tokens in it, in order, as arrays.

    `shifts`: position - token; `lows`, `highs`: the sequence's tokens in the tile, counted there;
    `firsts`, `ends`: the blocks that they see, none for entries behind the last pair.
    """
    n_seqs = len(meta.seq_lens)
    row = jnp.arange(n_seqs)
    start, stop = meta.cu_q_lens[:-1], meta.cu_q_lens[1:]
    is_chunk = (jnp.minimum(meta.n_single, meta.n_seqs) <= row) & (row < meta.n_seqs)
    n_own = jnp.where(is_chunk & (stop > start), (stop - 1) // size - start // size + 1, 0)
    end = jnp.cumsum(n_own)
    pair = jnp.arange(n_tiles + n_seqs, dtype=jnp.int32)
    seq = jnp.minimum((end[None] <= pair[:, None]).sum(1, dtype=jnp.int32), n_seqs - 1)
    tile = jnp.where(pair < end[-1], pair - (end - n_own)[seq] + start[seq] // size, n_tiles)
    low = jnp.maximum(start[seq] - tile * size, 0)
    high = jnp.minimum(stop[seq] - tile * size, size)
    shift = meta.seq_lens[seq] - stop[seq]
    first_position = tile * size + low + shift
    first = jnp.zeros_like(seq)
    if window is not None:
        first = jnp.maximum(first_position - window + 1, 0) // n_cells
    blocks = -(-(tile * size + high + shift) // n_cells)
    return {
        "seqs": seq,
        "tiles": tile,
        "shifts": shift,
        "lows": low,
        "highs": high,
        "firsts": jnp.where(pair < end[-1], first, 0),
        "ends": jnp.where(pair < end[-1], blocks, 0),
    }


def _scratch(tiled: Array, cache: tuple[Array, ...], table_width: int, tiles: Tiles):
    _, n_kv_heads, group_size, head_size, size = tiled.shape
    heads = n_kv_heads, group_size
    dtype = product_dtype(tiled.dtype, cache[0].dtype)
    n_keys = tiles.chunk_blocks * cache[0].shape[4]
    return stream_room(cache, table_width, 1, tiles.chunk_blocks, tiles.n_buffers) | {
        "q_ring": pltpu.VMEM((tiles.n_buffers, *heads, head_size, size), tiled.dtype),
        "q_sems": pltpu.SemaphoreType.DMA((tiles.n_buffers,)),
        "keys": pltpu.VMEM((n_keys, head_size), dtype),
        "values": pltpu.VMEM((head_size, n_keys), dtype),
        "top": pltpu.VMEM((*heads, 1, size), jnp.float32),
        "total": pltpu.VMEM((*heads, 1, size), jnp.float32),
        "acc": pltpu.VMEM((*heads, head_size, size), jnp.float32),
        "out_tile": pltpu.VMEM((*heads, head_size, size), tiled.dtype),
        "out_sem": pltpu.SemaphoreType.DMA,
    }


class Place(NamedTuple):
    """Where the core is: the tile at hand, the next one to fetch, and the tile of results that is
    on its way out, or -1.
    """

    at: Cursor
    ahead: Cursor
    leaving: Any


class Core:
    """One core's pairs, in order."""

    def __init__(self, refs: SimpleNamespace, spec: AttentionSpec, tiles: Tiles):
        self.refs, self.spec = refs, spec
        core = pl.program_id(0)
        self.start = refs.borders[core]
        self.stream = Stream(
            owner_of=lambda p: Owner(refs.seqs[p], refs.firsts[p], refs.ends[p]),
            stop=refs.borders[core + 1],
            tables=refs.tables,
            cache=refs.cache,
            table_ring=refs.table_ring.at[0],
            table_sems=refs.table_sems.at[0],
            rings=tuple(ring.at[0] for ring in refs.rings),
            sems=refs.sems.at[0],
        )
        self.heads = refs.acc.shape[:2]
        self.n_keys = tiles.chunk_blocks * refs.cache[0].shape[4]

    def run(self) -> None:
        stream = self.stream
        ahead = stream.begin(self.start, self._fetch_queries)
        place = Place(Cursor(self.start, stream.first_tile(self.start)), ahead, jnp.int32(-1))
        _, place = lax.while_loop(
            lambda carry: carry[1].at.owner < stream.stop, self._iterate, (jnp.int32(0), place)
        )
        pl.when(place.leaving >= 0)(lambda: self._out_copy(0).wait())

    def _iterate(self, carry):
        item, (at, ahead, leaving) = carry
        stream, p = self.stream, at.owner
        stream.fetch(ahead, item + stream.n_buffers - 1, self._fetch_queries)
        stream.wait(at, item)
        pl.when(at.tile == stream.first_tile(p))(lambda: self._enter(p))
        is_edge = self._is_edge(at)
        pl.when(is_edge)(lambda: self._attend(at, item, is_masked=True))
        pl.when(~is_edge)(lambda: self._attend(at, item, is_masked=False))
        is_last, tile = stream.is_last(at), self.refs.tiles[p]
        pl.when(is_last & (leaving >= 0))(lambda: self._out_copy(0).wait())
        pl.when(is_last)(lambda: self._leave(p))
        is_complete = is_last & ((p + 1 == stream.stop) | (self.refs.tiles[p + 1] != tile))
        pl.when(is_complete)(lambda: self._out_copy(tile).start())
        leaving = jnp.where(is_complete, tile, jnp.where(is_last, -1, leaving))
        return item + 1, Place(stream.next(at), stream.next(ahead), leaving)

    def _query_copy(self, p):
        slot = p % self.refs.q_ring.shape[0]
        source, ring, sems = self.refs.q, self.refs.q_ring, self.refs.q_sems
        return pltpu.make_async_copy(source.at[self.refs.tiles[p]], ring.at[slot], sems.at[slot])

    def _fetch_queries(self, p) -> None:
        self._query_copy(p).start()

    def _out_copy(self, tile):
        refs = self.refs
        return pltpu.make_async_copy(refs.out_tile, refs.out.at[tile], refs.out_sem)

    def _enter(self, p) -> None:
        """The queries have come; a softmax over the sinks alone."""
        refs = self.refs
        self._query_copy(p).wait()
        refs.acc[...] = jnp.zeros(refs.acc.shape, jnp.float32)
        if not hasattr(refs, "sinks"):
            refs.top[...] = jnp.full(refs.top.shape, LOWEST, jnp.float32)
            refs.total[...] = jnp.zeros(refs.total.shape, jnp.float32)
            return
        refs.total[...] = jnp.ones(refs.total.shape, jnp.float32)
        for k in range(self.heads[0]):
            for g in range(self.heads[1]):
                sink = refs.sinks[k * self.heads[1] + g] * LOG2_E
                refs.top[k, g] = jnp.full(refs.top.shape[2:], sink, jnp.float32)

    def _is_edge(self, at: Cursor):
        """Whether any of the owner's queries may not see some key of the tile."""
        refs, p = self.refs, at.owner
        position = refs.tiles[p] * refs.acc.shape[3] + refs.shifts[p]
        start, end = at.tile * self.n_keys, (at.tile + 1) * self.n_keys
        is_edge = end - 1 > position + refs.lows[p]
        if self.spec.window is not None:
            is_edge |= start <= position + refs.highs[p] - 1 - self.spec.window
        return is_edge

    def _attend(self, at: Cursor, item, *, is_masked: bool) -> None:
        """One tile of context for every head."""
        refs, stream, p = self.refs, self.stream, at.owner
        slot, n_queries = item % stream.n_buffers, refs.acc.shape[3]
        first, end = stream.range_of(at)
        # A block that was not fetched is hidden by the mask; a fetched one stands in for it.
        fetched = [jnp.clip(b, first, end - 1) for b in range(stream.n_blocks)]
        start = at.tile * self.n_keys - refs.tiles[p] * n_queries - refs.shifts[p]
        shape = self.n_keys, n_queries
        key, query = (lax.broadcasted_iota(jnp.int32, shape, i) for i in range(2))
        distance = key - query + start

        n_together = max(n for n in range(1, 9) if self.heads[1] % n == 0)

        def group(i, _):
            k = lax.div(i, self.heads[1] // n_together)
            g = lax.rem(i, self.heads[1] // n_together) * n_together
            blocks = [[ring.at[slot, b, k] for ring in stream.rings] for b in fetched]
            pl.when(g == 0)(lambda: self._load(blocks))
            self._attend_heads(k, [g + i for i in range(n_together)], p, distance, is_masked)
            return 0

        lax.fori_loop(0, self.heads[0] * (self.heads[1] // n_together), group, 0)

    def _load(self, blocks: list) -> None:
        """Keys, transposed, and values of one head, in the dtype of the products."""
        refs = self.refs
        for b, (tile, *scales) in enumerate(blocks):
            keys, values = tile[0], tile[1]  # H C
            if scales:
                keys = keys.astype(jnp.float32) * scales[0][0:1]
                values = values.astype(jnp.float32) * scales[0][1:2]
            cells = slice(b * keys.shape[1], (b + 1) * keys.shape[1])
            refs.keys[cells] = keys.astype(refs.keys.dtype).T
            refs.values[:, cells] = values.astype(refs.values.dtype)

    def _attend_heads(self, k, heads: list, p, distance, is_masked: bool) -> None:
        """Query heads of one KV head, each to all blocks at hand, one block at a time.

        The next scores are under way while a softmax waits for its own.
        """
        n_cells = self.refs.cache[0].shape[4]
        blocks = [slice(i, i + n_cells) for i in range(0, self.n_keys, n_cells)]
        work = [(g, cells) for cells in blocks for g in heads]
        scores = self._scores(k, *work[0], p, distance, is_masked)
        for unit, following in zip(work, [*work[1:], None], strict=True):
            now = scores
            if following is not None:
                scores = self._scores(k, *following, p, distance, is_masked)
            self._add(k, *unit, now)

    def _scores(self, k, g, cells: slice, p, distance, is_masked: bool) -> Float[Array, "C Q"]:
        refs = self.refs
        queries = refs.q_ring[p % refs.q_ring.shape[0], k, g].astype(refs.keys.dtype)
        products = dot(refs.keys[cells], queries, ((1,), (0,)))
        slope = refs.slopes[k * self.heads[1] + g] if hasattr(refs, "slopes") else None
        scores = log2_scores(products, distance[cells], self.spec, slope)
        return mask_scores(scores, distance[cells], self.spec) if is_masked else scores

    def _add(self, k, g, cells: slice, scores: Float[Array, "C Q"]) -> None:
        """Adds a block of keys to one query head's softmax."""
        refs = self.refs
        top = jnp.maximum(refs.top[k, g], scores.max(axis=0, keepdims=True))
        shrink = jnp.exp2(refs.top[k, g] - top)
        weights = jnp.exp2(scores - top)
        refs.top[k, g] = top
        refs.total[k, g] = refs.total[k, g] * shrink + weights.sum(axis=0, keepdims=True)
        added = dot(refs.values[:, cells], weights.astype(refs.values.dtype), ((1,), (0,)))
        refs.acc[k, g] = refs.acc[k, g] * shrink + added

    def _leave(self, p) -> None:
        """Puts the owner's tokens into the tile of results."""
        refs = self.refs
        token = lax.broadcasted_iota(jnp.int32, refs.acc.shape[2:], 1)
        is_own = (refs.lows[p] <= token) & (token < refs.highs[p])

        def head(i, _):
            k, g = lax.div(i, self.heads[1]), lax.rem(i, self.heads[1])
            out = refs.acc[k, g] / refs.total[k, g]
            before = refs.out_tile[k, g].astype(jnp.float32)
            refs.out_tile[k, g] = jnp.where(is_own, out, before).astype(refs.out_tile.dtype)
            return 0

        lax.fori_loop(0, self.heads[0] * self.heads[1], head, 0)
