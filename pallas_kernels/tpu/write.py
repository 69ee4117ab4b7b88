"""The cells of sequences with several new tokens, written block by block.

A block's new cells are put together by the matrix unit (a product with a matrix of zeros and ones
is exact), since tokens arrive along sublanes, at any offset, and belong on lanes. The next block is
read while this one is put together. The last block's cells after the last token become zeros.
"""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.contract import RaggedMeta
from pallas_kernels.tpu.program import launch
from pallas_kernels.tpu.stream import dot
from pallas_kernels.tpu.tiles import Tiles

ROWS = 32  # tokens are fetched in whole tiles of the cache's memory: 32 rows of 8 bits at most


def paged_write(
    new: tuple[Array, ...],
    cache: tuple[Array, ...],
    meta: RaggedMeta,
    *,
    tiles: Tiles,
    interpret: Any,
) -> tuple[Array, ...]:
    """The cache with the new tokens of every sequence that has more than one."""
    n_cells = cache[0].shape[4]
    n_seqs = len(meta.seq_lens)
    row = jnp.arange(n_seqs)
    n_new = jnp.diff(meta.cu_q_lens)
    is_chunk = (jnp.minimum(meta.n_single, meta.n_seqs) <= row) & (row < meta.n_seqs) & (n_new > 0)
    first = jnp.where(is_chunk, (meta.seq_lens - n_new) // n_cells, 0)
    n_touched = jnp.where(is_chunk, -(-meta.seq_lens // n_cells) - first, 0)
    end = jnp.cumsum(n_touched)
    n_items = -(-len(meta.positions) // n_cells) + 2 * n_seqs  # a sequence begins and ends within
    items = jnp.arange(n_items, dtype=jnp.int32)
    seq = jnp.minimum((end[None] <= items[:, None]).sum(1, dtype=jnp.int32), n_seqs - 1)
    block = items - (end - n_touched)[seq] + first[seq]
    table_width = meta.block_tables.shape[1]
    block_id = meta.block_tables[seq, jnp.clip(block, 0, table_width - 1)]
    # The token at cell 0 of the block would be this one; tokens [first, stop) are the sequence's.
    origin = meta.cu_q_lens[seq + 1] - meta.seq_lens[seq] + block * n_cells
    _, cache = launch(
        lambda refs: _run_core(refs, tiles.n_cores),
        name="paged_write",
        scalars={
            "block_ids": block_id,
            "origins": origin,
            "firsts": meta.cu_q_lens[seq],
            "stops": meta.cu_q_lens[seq + 1],
            "n_items": end[-1:],
        },
        hbm={"new": _windows(new, n_cells)},
        vmem={},
        cache=cache,
        out={},
        scratch=_scratch(cache),
        tiles=tiles,
        interpret=interpret,
    )
    return cache


def _windows(new: tuple[Array, ...], n_cells: int) -> tuple[Array, ...]:
    """New cells "K 2 T' H" and scales "T' K*2": the tokens with a block before and more behind."""
    padding = n_cells, n_cells + ROWS
    cells = jnp.pad(new[0].transpose(1, 2, 0, 3), ((0, 0), (0, 0), padding, (0, 0)))
    return cells, *(jnp.pad(x.reshape(len(x), -1), (padding, (0, 0))) for x in new[1:])


def _scratch(cache: tuple[Array, ...]) -> dict[str, Any]:
    n_kv_heads, _, head_size, n_cells = cache[0].shape[1:]
    n_rows = n_cells + ROWS
    windows = [pltpu.VMEM((2, n_kv_heads, 2, n_rows, head_size), cache[0].dtype)]
    windows += [pltpu.VMEM((2, n_rows, 2 * n_kv_heads), x.dtype) for x in cache[1:]]
    blocks = tuple(pltpu.VMEM((2, *x.shape[1:]), x.dtype) for x in cache)
    return {
        "windows": tuple(windows),
        "old": blocks,
        "made": blocks,
        "read_sems": pltpu.SemaphoreType.DMA((2,)),
        "old_sems": pltpu.SemaphoreType.DMA((2,)),
        "write_sems": pltpu.SemaphoreType.DMA((2,)),
    }


def _run_core(refs: SimpleNamespace, n_cores: int) -> None:
    """Every n_cores-th block."""
    core = pl.program_id(0)
    n_cells = refs.cache[0].shape[4]
    n_mine = lax.div(refs.n_items[0] - core + n_cores - 1, n_cores)

    def window(i):
        """The first fetched row, in the padded array, and which row belongs to cell 0."""
        start = refs.origins[core + i * n_cores] + n_cells
        aligned = lax.div(start, ROWS) * ROWS
        return pl.multiple_of(aligned, ROWS), start - aligned

    def new_copies(i):
        rows = pl.ds(window(i)[0], n_cells + ROWS)
        sources = [refs.new[0].at[:, :, rows], *(x.at[rows] for x in refs.new[1:])]
        return _copies(sources, [x.at[i % 2] for x in refs.windows], refs.read_sems.at[i % 2])

    def blocks(i):
        return [x.at[refs.block_ids[core + i * n_cores]] for x in refs.cache]

    def old_copies(i):
        return _copies(blocks(i), [x.at[i % 2] for x in refs.old], refs.old_sems.at[i % 2])

    def write_copies(i):
        return _copies([x.at[i % 2] for x in refs.made], blocks(i), refs.write_sems.at[i % 2])

    def n_old(i):
        """Cells of the block that hold earlier tokens."""
        item = core + i * n_cores
        return refs.firsts[item] - refs.origins[item]

    def each(copies, i, method: str):
        for copy in copies(i):
            getattr(copy, method)()

    def read(i, method: str):
        each(new_copies, i, method)
        pl.when(n_old(i) > 0)(lambda: each(old_copies, i, method))

    def iterate(i, _):
        pl.when(i + 1 < n_mine)(lambda: read(i + 1, "start"))
        read(i, "wait")
        pl.when(i >= 2)(lambda: each(write_copies, i - 2, "wait"))
        item = core + i * n_cores
        shift = window(i)[1]
        bounds = refs.firsts[item] - refs.origins[item], refs.stops[item] - refs.origins[item]
        windows, old, made = (
            [x.at[i % 2] for x in group] for group in (refs.windows, refs.old, refs.made)
        )
        _make_block(windows, old, made, shift, bounds)
        each(write_copies, i, "start")
        return 0

    pl.when(n_mine > 0)(lambda: read(0, "start"))
    lax.fori_loop(0, n_mine, iterate, 0)
    pl.when(n_mine > 1)(lambda: each(write_copies, n_mine - 2, "wait"))
    pl.when(n_mine > 0)(lambda: each(write_copies, n_mine - 1, "wait"))


def _copies(sources: list, targets: list, sem) -> list:
    pairs = zip(sources, targets, strict=True)
    return [pltpu.make_async_copy(source, target, sem) for source, target in pairs]


def _make_block(windows: list, old: list, made: list, shift, bounds) -> None:
    """made = old before the first new cell, then the new ones, then zeros.

    Row r of a window belongs to cell r - shift; bounds: the first new cell and the end of them.
    """
    first, stop = bounds
    n_kv_heads, n_cells = made[0].shape[0], made[0].shape[3]
    n_rows = windows[0].shape[2]
    row, cell = (lax.broadcasted_iota(jnp.int32, (n_rows, n_cells), i) for i in range(2))
    places = jnp.where((row - shift == cell) & (first <= cell) & (cell < stop), 1.0, 0.0)

    def put(rows):  # "W M" -> "M C"; what lies outside the sequence may be NaN
        at = lax.broadcasted_iota(jnp.int32, rows.shape, 0) - shift
        rows = jnp.where((first <= at) & (at < stop), rows, jnp.zeros((), rows.dtype))
        dtype = jnp.float32 if rows.dtype == jnp.float32 else jnp.bfloat16
        return dot(rows.astype(dtype), places.astype(dtype), ((0,), (0,)))

    def keep_old(block, placed):
        is_old = lax.broadcasted_iota(jnp.int32, placed.shape, len(placed.shape) - 1) < first
        return jnp.where(is_old, block.astype(jnp.float32), placed).astype(block.dtype)

    for k in range(n_kv_heads):
        for i in range(2):
            made[0][k, i] = keep_old(old[0][k, i], put(windows[0][k, i]))
    for window, block, result in zip(windows[1:], old[1:], made[1:], strict=True):
        scales = put(window[...])  # K*2 C
        for k in range(n_kv_heads):
            result[k] = keep_old(block[k], scales[2 * k : 2 * k + 2])
