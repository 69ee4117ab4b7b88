"""Sequences with one new token: attention to their contexts, and the new token's cell written.

Each core runs `decode_streams` streams side by side: the same straight-line code serves one tile of
each, so that the matrix unit has independent work while one stream's softmax is under way. A stream
whose sequences have ended computes on, on whatever its buffers hold, and nobody reads it.
"""

import functools
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
    to_columns,
)
from pallas_kernels.tpu.tiles import Tiles


def paged_decode(
    q: Float[Array, "T N H"],
    new: tuple[Array, ...],
    cache: tuple[Array, ...],
    meta: RaggedMeta,
    *,
    spec: AttentionSpec,
    alibi_slopes: Float[Array, "N"] | None,
    sinks: Float[Array, "N"] | None,
    tiles: Tiles,
    interpret: Any,
) -> tuple[Float[Array, "T N H"], tuple[Array, ...]]:
    """Rows of the first n_single tokens (the others hold anything), and the cache."""
    n_kv_heads, n_cells = cache[0].shape[1], cache[0].shape[4]
    n_rows = min(len(meta.seq_lens), len(q))
    is_single = jnp.arange(n_rows) < jnp.minimum(meta.n_single, meta.n_seqs)
    seq_lens = jnp.where(is_single, meta.seq_lens[:n_rows], 0)
    first = jnp.zeros_like(seq_lens)
    if spec.window is not None:
        first = jnp.maximum(seq_lens - spec.window, 0) // n_cells
    costs = -(-seq_lens // n_cells) - first
    out, cache = launch(
        lambda refs: _run_core(refs, spec, tiles),
        name="paged_decode",
        scalars={
            "seq_lens": jnp.pad(seq_lens, (0, 1)),
            "first_blocks": jnp.pad(first, (0, 1)),
            "borders": shares(costs, tiles.n_cores * tiles.decode_streams),
        },
        hbm={"tables": meta.block_tables[:, None], "q": q, "new": _rows(new, n_cells)},
        vmem={"slopes": _lanes(alibi_slopes, n_kv_heads), "sinks": _lanes(sinks, n_kv_heads)},
        cache=cache,
        out={"out": jax.ShapeDtypeStruct(q.shape, q.dtype)},
        scratch=_scratch(q, cache, meta.block_tables.shape[1], tiles),
        tiles=tiles,
        interpret=interpret,
    )
    return out["out"], cache


def _rows(new: tuple[Array, ...], n_cells: int) -> tuple[Array, ...]:
    """New cells as "T K*2 H"; their scales "T K 2 C", every lane the same."""
    cells = new[0].reshape(len(new[0]), -1, new[0].shape[-1])
    return cells, *(jnp.broadcast_to(x[..., None], (*x.shape, n_cells)) for x in new[1:])


def _lanes(x: Float[Array, "N"] | None, n_kv_heads: int) -> Float[Array, "K G8 128"] | None:
    """A number per query head as a register of equal lanes, on the rows that its head has."""
    if x is None:
        return None
    x = x.astype(jnp.float32).reshape(n_kv_heads, -1)
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8)))
    return jnp.broadcast_to(x[..., None], (*x.shape, 128))


def _scratch(q: Array, cache: tuple[Array, ...], table_width: int, tiles: Tiles) -> dict[str, Any]:
    """VMEM of one core: W streams, Q rows in flight; G8 is G in whole registers of 8 rows."""
    n_kv_heads, _, head_size, n_cells = cache[0].shape[1:]
    n_heads, n_streams, n_rows = q.shape[1], tiles.decode_streams, tiles.n_buffers
    heads = n_streams, n_kv_heads, -(-n_heads // n_kv_heads // 8) * 8
    new = [pltpu.VMEM((n_streams, n_rows, 2 * n_kv_heads, head_size), cache[0].dtype)]
    new += [pltpu.VMEM((n_streams, n_rows, n_kv_heads, 2, n_cells), x.dtype) for x in cache[1:]]
    return stream_room(cache, table_width, n_streams, tiles.decode_blocks, tiles.n_buffers) | {
        "q_ring": pltpu.VMEM((n_streams, n_rows, *q.shape[1:]), q.dtype),
        "new_rings": tuple(new),
        "row_sems": pltpu.SemaphoreType.DMA((n_streams, n_rows)),
        "queries": pltpu.VMEM((*heads, head_size), q.dtype),
        "top": pltpu.VMEM((*heads, n_cells), jnp.float32),  # every lane the same
        "total": pltpu.VMEM((*heads, n_cells), jnp.float32),  # to be summed over the lanes
        "acc": pltpu.VMEM((*heads, head_size), jnp.float32),
        "rows": pltpu.VMEM((n_streams, n_heads, head_size), jnp.float32),
        "out_rows": pltpu.VMEM((n_streams, n_heads, head_size), q.dtype),
        "out_sems": pltpu.SemaphoreType.DMA((n_streams,)),
        "write_sems": pltpu.SemaphoreType.DMA((n_streams,)),
    }


class Lane(NamedTuple):
    """Where one stream is: the tile at hand, the next one to fetch, and whether a block is on its
    way back to the cache.
    """

    at: Cursor
    ahead: Cursor
    is_writing: Any


def _run_core(refs: SimpleNamespace, spec: AttentionSpec, tiles: Tiles) -> None:
    """All iterations of this core's streams."""
    sides = [Side(refs, w, spec, tiles) for w in range(tiles.decode_streams)]
    lanes = tuple(side.begin() for side in sides)

    def is_busy(carry):
        _, lanes = carry
        pairs = zip(sides, lanes, strict=True)
        return functools.reduce(
            jnp.logical_or, (lane.at.owner < s.stream.stop for s, lane in pairs)
        )

    def iterate(carry):
        item, lanes = carry
        for side, lane in zip(sides, lanes, strict=True):
            side.prepare(lane, item)
        for side, lane in zip(sides, lanes, strict=True):
            side.attend(lane.at, item)
        return item + 1, tuple(s.end(lane, item) for s, lane in zip(sides, lanes, strict=True))

    _, lanes = lax.while_loop(is_busy, iterate, (jnp.int32(0), lanes))
    for side, lane in zip(sides, lanes, strict=True):
        side.drain(lane)


class Side:
    """One stream of sequences, and the refs that are its own."""

    def __init__(self, refs: SimpleNamespace, w: int, spec: AttentionSpec, tiles: Tiles):
        self.refs, self.w, self.spec = refs, w, spec
        index = pl.program_id(0) * tiles.decode_streams + w
        self.start = refs.borders[index]
        self.n_cells = refs.cache[0].shape[4]
        self.stream = Stream(
            owner_of=self._owner,
            stop=refs.borders[index + 1],
            tables=refs.tables,
            cache=refs.cache,
            table_ring=refs.table_ring.at[w],
            table_sems=refs.table_sems.at[w],
            rings=tuple(ring.at[w] for ring in refs.rings),
            sems=refs.sems.at[w],
        )

    def _owner(self, s) -> Owner:
        n_blocks = lax.div(self.refs.seq_lens[s] + self.n_cells - 1, self.n_cells)
        return Owner(s, self.refs.first_blocks[s], n_blocks)

    def begin(self) -> Lane:
        ahead = self.stream.begin(self.start, self._fetch_row)
        return Lane(Cursor(self.start, self.stream.first_tile(self.start)), ahead, jnp.int32(0))

    def _row_copies(self, s) -> list:
        refs, slot = self.refs, s % self.refs.q_ring.shape[1]
        pairs = zip((refs.q, *refs.new), (refs.q_ring, *refs.new_rings), strict=True)
        sem = refs.row_sems.at[self.w, slot]
        return [pltpu.make_async_copy(a.at[s], ring.at[self.w, slot], sem) for a, ring in pairs]

    def _fetch_row(self, s) -> None:
        for copy in self._row_copies(s):
            copy.start()

    def prepare(self, lane: Lane, item) -> None:
        """Before the products: copies started and awaited, first and last tiles seen to."""
        stream, at = self.stream, lane.at
        pl.when(lane.is_writing > 0)(lambda: self._wait_for_write())
        stream.fetch(lane.ahead, item + stream.n_buffers - 1, self._fetch_row)
        stream.wait(at, item)
        is_active = at.owner < stream.stop
        is_first = at.tile == stream.first_tile(at.owner)
        pl.when(is_active & is_first)(lambda: self._enter(at.owner))
        pl.when(is_active & stream.is_last(at))(lambda: self._write_new(at, item))

    def _enter(self, s) -> None:
        """The queries on rows of their own, and a softmax over the sinks alone."""
        refs, w = self.refs, self.w
        for copy in self._row_copies(s):
            copy.wait()
        slot = s % refs.q_ring.shape[1]
        n_kv_heads = refs.acc.shape[1]
        group_size = refs.q.shape[1] // n_kv_heads
        for k in range(n_kv_heads):
            heads = slice(k * group_size, (k + 1) * group_size)
            refs.queries[w, k, :group_size] = refs.q_ring[w, slot, heads]
        refs.acc[w] = jnp.zeros(refs.acc.shape[1:], jnp.float32)
        if refs.sinks is None:
            refs.top[w] = jnp.full(refs.top.shape[1:], LOWEST, jnp.float32)
            refs.total[w] = jnp.zeros(refs.total.shape[1:], jnp.float32)
        else:
            refs.top[w] = refs.sinks[...] * LOG2_E
            lane = lax.broadcasted_iota(jnp.int32, refs.total.shape[1:], 2)
            refs.total[w] = jnp.where(lane == 0, 1.0, 0.0)

    def _write_new(self, at: Cursor, item) -> None:
        """Puts the new token in its cell of the block at hand and sends that back to the cache.

        Cells after it become zeros, so that nothing that a probability of 0 meets is NaN.
        """
        refs, w, s = self.refs, self.w, at.owner
        slot, row = item % self.stream.n_buffers, s % refs.q_ring.shape[1]
        block = lax.div(refs.seq_lens[s] - 1, self.n_cells)
        b = block - at.tile * self.stream.n_blocks
        new_cell = lax.rem(refs.seq_lens[s] - 1, self.n_cells)
        _, _, n_kv_heads, _, head_size, _ = self.stream.rings[0].shape
        columns = to_columns(refs.new_rings[0][w, row])
        cell = lax.broadcasted_iota(jnp.int32, (head_size, self.n_cells), 1)
        for k in range(n_kv_heads):
            for i in range(2):
                tile = self.stream.rings[0].at[slot, b, k, i]
                column = columns[:, 2 * k + i : 2 * k + i + 1]
                old = jnp.where(cell < new_cell, tile[...].astype(jnp.float32), 0.0)
                tile[...] = jnp.where(cell == new_cell, column, old).astype(tile.dtype)
        for ring, new in zip(self.stream.rings[1:], refs.new_rings[1:], strict=True):
            cell = lax.broadcasted_iota(jnp.int32, ring.shape[2:], 2)
            old = jnp.where(cell < new_cell, ring[slot, b], 0.0)
            ring[slot, b] = jnp.where(cell == new_cell, new[w, row], old)
        for copy in self._write_copies(slot, b, self.stream.block_id(s, block)):
            copy.start()

    def _write_copies(self, slot, b, block_id) -> list:
        sem = self.refs.write_sems.at[self.w]
        pairs = zip(self.stream.rings, self.refs.cache, strict=True)
        return [pltpu.make_async_copy(r.at[slot, b], c.at[block_id], sem) for r, c in pairs]

    def _wait_for_write(self) -> None:
        for copy in self._write_copies(0, 0, 0):
            copy.wait()

    def attend(self, at: Cursor, item) -> None:
        """One tile of context for every head; no branches."""
        refs, w, n_blocks = self.refs, self.w, self.stream.n_blocks
        slot = item % self.stream.n_buffers
        first, end = self.stream.range_of(at)
        # A block that was not fetched is hidden by the mask; a fetched one stands in for it.
        fetched = [jnp.clip(b, first, jnp.maximum(end - 1, first)) for b in range(n_blocks)]
        fetched = [jnp.minimum(b, n_blocks - 1) for b in fetched]
        start = at.tile * n_blocks * self.n_cells - (refs.seq_lens[at.owner] - 1)
        heads = range(refs.acc.shape[1])
        tiles = [
            [[ring.at[slot, b, k] for ring in self.stream.rings] for b in fetched] for k in heads
        ]
        slopes = [None if refs.slopes is None else refs.slopes[k] for k in heads]
        queries = [refs.queries[w, k] for k in heads]
        # One phase for all heads after the other: within a head each waits for the one before.
        scores = [_scores(queries[k], tiles[k], start, slopes[k], self.spec) for k in heads]
        weights = [_softmax(scores[k], refs.top.at[w, k], refs.total.at[w, k]) for k in heads]
        dtype = product_dtype(refs.q.dtype, refs.cache[0].dtype)
        for k in heads:
            parts, shrink = weights[k]
            _add_values(parts, shrink, tiles[k], refs.acc.at[w, k], dtype)

    def end(self, lane: Lane, item) -> Lane:
        """Hands out a sequence's result with its last tile; moves on."""
        stream, at = self.stream, lane.at
        is_done = (at.owner < stream.stop) & stream.is_last(at)
        pl.when(is_done)(lambda: self._leave(at.owner))
        return Lane(stream.next(at), stream.next(lane.ahead), is_done.astype(jnp.int32))

    def _out_copy(self, s):
        refs, w = self.refs, self.w
        return pltpu.make_async_copy(refs.out_rows.at[w], refs.out.at[s], refs.out_sems.at[w])

    def _leave(self, s) -> None:
        refs, w = self.refs, self.w
        n_kv_heads = refs.acc.shape[1]
        group_size = refs.q.shape[1] // n_kv_heads
        for k in range(n_kv_heads):
            total = refs.total[w, k].sum(axis=1, keepdims=True)
            out = (refs.acc[w, k] / total)[:group_size]
            refs.rows[w, k * group_size : (k + 1) * group_size] = out
        pl.when(s > self.start)(lambda: self._out_copy(s).wait())
        refs.out_rows[w] = refs.rows[w].astype(refs.out_rows.dtype)
        self._out_copy(s).start()

    def drain(self, lane: Lane) -> None:
        pl.when(lane.is_writing > 0)(lambda: self._wait_for_write())
        pl.when(self.stream.stop > self.start)(lambda: self._out_copy(self.start).wait())


def _scores(queries, tiles: list, start, slopes, spec: AttentionSpec) -> list:
    """Scores "G8 C" of one KV head's queries "G8 H" with each block of a tile.

    `tiles` are the blocks' refs: [keys and values "2 H C", their scales "2 C" if quantised];
    `start` is the tile's first position - the query's.
    """
    dtype = product_dtype(queries.dtype, tiles[0][0].dtype)
    n_cells = tiles[0][0].shape[2]
    keys = jnp.concatenate([tile[0].astype(dtype) for tile, *_ in tiles], axis=1)
    products = dot(queries.astype(dtype), keys, ((1,), (0,)))
    scores = []
    for b, (_, *scales) in enumerate(tiles):
        part = products[:, b * n_cells : (b + 1) * n_cells]
        if scales:
            part = part * scales[0][0:1]
        cell = lax.broadcasted_iota(jnp.int32, part.shape, 1)
        distance = cell + (start + b * n_cells)
        scores.append(mask_scores(log2_scores(part, distance, spec, slopes), distance, spec))
    return scores


def _softmax(scores: list, top_ref, total_ref) -> tuple[list, Any]:
    """Adds the scores to the statistics; returns their weights and what earlier sums shrink by."""
    top = functools.reduce(jnp.maximum, scores).max(axis=1, keepdims=True)
    top = jnp.maximum(top_ref[...], top)
    shrink = jnp.exp2(top_ref[...] - top)
    weights = [jnp.exp2(part - top) for part in scores]
    top_ref[...], total_ref[...] = top, total_ref[...] * shrink + sum(weights)
    return weights, shrink


def _add_values(weights: list, shrink, tiles: list, acc_ref, dtype) -> None:
    """acc = acc * shrink + weights . values"""
    if len(tiles[0]) > 1:
        weights = [part * tile[1][1:2] for part, tile in zip(weights, tiles, strict=True)]
    values = jnp.concatenate([tile[1].astype(dtype) for tile, *_ in tiles], axis=1)
    joined = jnp.concatenate([part.astype(dtype) for part in weights], axis=1)
    added = dot(joined, values, ((1,), (1,)))
    acc_ref[...] = acc_ref[...] * _widen(shrink, acc_ref.shape[1]) + added


def _widen(x: Float[Array, "G8 128"], size: int) -> Float[Array, "G8 H"]:
    """Registers of equal lanes, cut or repeated to `size` lanes."""
    n_whole = -(-size // x.shape[1])
    return jnp.concatenate([x] * n_whole, axis=1)[:, :size] if n_whole > 1 else x[:, :size]
