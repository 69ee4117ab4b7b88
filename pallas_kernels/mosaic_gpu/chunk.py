"""Attention of chunks on Hopper (sm_90), in Mosaic GPU: an item's queries and their whole context.

A program has one KV head, one item of the host's plan and three warpgroups:
- Two compute, 64 rows each: half of the group's heads, or of one head half of the tokens; a row is
  a pair (head, token), tokens first. They take turns, so that the matrix unit multiplies for one
  while the other one makes weights of its scores (FlashAttention-3, arXiv:2407.08608, 3.1).
- One copies: queries come and go, keys and values come by TMA, which takes a block of the cache, or
  a tile of one, as a box. Tiles wait in shared memory as wgmma reads them: boxes of 8 rows and 64
  columns, swizzled.

INVARIANT: no cell that nobody cached reaches a product with values: 0 * NaN is NaN. TMA copies
whole boxes, so the copying warpgroup clears the last tile behind the context's end, and takes the
nearest block that has cells of the item where a tile has blocks before or behind those.
Masked scores are -inf and tops start at the finite LOWEST, so that no difference is NaN.

Every phase of a barrier is waited for: it is a rule of Mosaic's, and its simulator checks it.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.contract import AttentionSpec
from pallas_kernels.gpu.layout import LOG2_E, LOWEST
from pallas_kernels.gpu.tile import Item, read_item, tile_spans
from pallas_kernels.mosaic_gpu.products import add_values, scores

ROWS = 64  # of a computing warpgroup: wgmma's
CELLS = 128  # of a tile of keys
BOX = 8, 64  # rows and 16-bit columns of wgmma's boxes; 128 bytes are swizzled
# Registers of a thread. INVARIANT: a kernel of 384 threads is given 168 for each; what the copying
# warpgroup gives back is all that the others can take, and they wait for more for ever.
COMPUTING, COPYING, GIVEN = 232, 40, 168
assert 2 * COMPUTING + COPYING <= 3 * GIVEN
WGMMA = plgpu.Layout.WGMMA
WGMMA_ROW = WGMMA.reduce(1)


@dataclass(frozen=True)
class Tiles:
    """Static sizes."""

    spec: AttentionSpec
    n_heads: int
    n_kv_heads: int
    head_size: int
    n_cells: int  # of a block
    dtype: Any
    n_stages: int  # tiles of keys, and of values, in shared memory
    is_interpreted: bool = False

    block_n = CELLS  # as gpu.tile.tile_spans names it

    @property
    def group_size(self) -> int:
        return self.n_heads // self.n_kv_heads

    @property
    def own_heads(self) -> int:
        """Of a computing warpgroup."""
        return max(self.group_size // 2, 1)

    @property
    def own_tokens(self) -> int:
        return ROWS // self.own_heads

    @property
    def shared_size(self) -> int:
        """Bytes of shared memory, but for barriers."""
        n_rows = 2 * ROWS * 2 + 2 * self.n_stages * CELLS
        return n_rows * self.head_size * self.dtype.itemsize

    @property
    def box_cells(self) -> int:
        """Cells that one copy brings."""
        return min(self.n_cells, CELLS)


class Arrays(NamedTuple):
    """What the kernel reads: arrays, and inside the kernel their refs."""

    q: Any  # "T N H"
    kv_cache: Any  # "B K 2 C H"
    items: Any  # "X 8", see gpu.plan.WorkPlan
    tables: Any  # "S P"
    slopes: Any  # "N" or None
    sinks: Any  # "N" or None


class Scratch(NamedTuple):
    """Shared memory, and barriers: `full` when copies have come, `free` when both have read."""

    q: Any  # "2 M H" of each computing warpgroup; at last their output
    k: Any  # "stages 128 H"
    v: Any
    rows: Any  # "2 M H", not swizzled: output of which single rows are copied
    q_full: Any  # "2"
    k_full: Any  # "stages"
    v_full: Any
    k_free: Any
    v_free: Any
    last_full: Any  # of the last tile's values,
    last_clean: Any  # and those without what nobody cached
    turn: Any  # of the computing warpgroups


class Job(NamedTuple):
    """One program's work."""

    tiles: Tiles
    arrays: Arrays
    out: Any  # "T N H"
    scratch: Scratch
    item: Item
    kv_head: Array

    @property
    def spans(self) -> list[tuple[Array, Array, bool]]:
        """As gpu.tile.tile_spans, but that the last tile is always an edge."""
        tiles: Any = self.tiles
        *before, (seen, diagonal, _), (_, last, _) = tile_spans(tiles, self.item)
        diagonal = jnp.maximum(seen, jnp.minimum(diagonal, last - 1))
        return [*before, (seen, diagonal, False), (diagonal, last, True)]


class Own(NamedTuple):
    """A computing warpgroup's part of a job."""

    index: Array  # 0 or 1
    head: Array  # its first one
    token: Array  # in the item
    n_tokens: Array  # that are there
    slopes: Float[Array, "M"] | None = None  # of its rows, in units of log2


class Softmax(NamedTuple):
    """See gpu.tile.Softmax."""

    acc: Float[Array, "M H"]
    top: Float[Array, "M"]
    total: Float[Array, "M"]


def make_tiles(
    n_heads: int,
    n_kv_heads: int,
    head_size: int,
    n_cells: int,
    dtype,
    spec: AttentionSpec | None = None,
) -> Tiles:
    """With as many stages as shared memory holds.

    spec: nothing else depends on it.
    """
    n_stages, spec = 2 if head_size > 64 else 4, spec or AttentionSpec(1.0)
    return Tiles(spec, n_heads, n_kv_heads, head_size, n_cells, jnp.dtype(dtype), n_stages)


def chunks(
    out: Float[Array, "T N H"],
    q: Float[Array, "T N H"],
    kv_cache: Float[Array, "B K 2 C H"],
    items: Int[Array, "X 8"],
    block_tables: Int[Array, "S P"],
    *,
    spec: AttentionSpec,
    alibi_slopes: Float[Array, "N"] | None = None,
    sinks: Float[Array, "N"] | None = None,
    interpret: Any = False,
) -> Float[Array, "T N H"]:
    """`out`, in place, with the items' tokens.

    interpret: plgpu.InterpretGPUParams, or False to compile.
    """
    n_kv_heads, n_cells = kv_cache.shape[1], kv_cache.shape[3]
    tiles = make_tiles(q.shape[1], n_kv_heads, q.shape[2], n_cells, q.dtype, spec=spec)
    tiles = dataclasses.replace(tiles, is_interpreted=interpret is not False)
    extras = (x if x is None else jnp.asarray(x, jnp.float32) for x in (alibi_slopes, sinks))
    arrays = Arrays(q, kv_cache, items, block_tables, *extras)
    result = jax.new_ref(out)

    def attention_chunks(arrays: Arrays, out):
        body = functools.partial(_program, tiles, arrays, out)
        pl.run_scoped(body, _scratch(tiles), collective_axes="warpgroup")

    kernel: Any = pl.kernel(
        attention_chunks,
        out_type=(),
        mesh=plgpu.Mesh(
            grid=(len(items), tiles.n_kv_heads),
            grid_names=("item", "kv_head"),
            num_threads=3,
            thread_name="warpgroup",
        ),
        # Its semantics are given: jax 0.11 has changed the default.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
        name="attention_chunks",
    )
    kernel(arrays, result)
    return result[...]


def _scratch(tiles: Tiles) -> Scratch:
    def boxes(*shape: int):
        transforms = plgpu.TilingTransform(BOX), plgpu.SwizzleTransform(128)
        return plgpu.SMEM((*shape, tiles.head_size), tiles.dtype, transforms=transforms)

    def barriers(n: int, n_arrivals: int):
        return plgpu.Barrier(num_barriers=n, num_arrivals=n_arrivals)

    n, n_copies = tiles.n_stages, CELLS // tiles.box_cells
    return Scratch(
        q=boxes(2, ROWS),
        k=boxes(n, CELLS),
        v=boxes(n, CELLS),
        rows=plgpu.SMEM((2, ROWS, tiles.head_size), tiles.dtype),
        q_full=barriers(2, tiles.own_heads),
        k_full=barriers(n, n_copies),
        v_full=barriers(n, n_copies),
        k_free=barriers(n, 2),
        v_free=barriers(n, 2),
        last_full=barriers(1, n_copies),
        last_clean=barriers(1, 1),
        turn=barriers(1, 2),
    )


def _program(tiles: Tiles, arrays: Arrays, out, scratch: Scratch) -> None:
    item = read_item(arrays.items, lax.axis_index("item"))
    job = Job(tiles, arrays, out, scratch, item, lax.axis_index("kv_head"))
    warpgroup = lax.axis_index("warpgroup")
    is_item = item.n_tokens > 0
    pl.when(is_item & (warpgroup < 2))(lambda: _compute(job, warpgroup))
    pl.when(is_item & (warpgroup == 2))(lambda: _copy(job))


def _compute(job: Job, index: Array) -> None:
    plgpu.set_max_registers(COMPUTING, action="increase")
    own = _own(job, index)
    if job.arrays.slopes is not None:
        own = own._replace(slopes=LOG2_E * _row_values(job, own, job.arrays.slopes))
    _load_queries(job, own)
    state = _start(job, own)
    pl.when(index == 1)(lambda: _turn(job))
    for first, last, is_edge in job.spans:
        step = functools.partial(_step, job, own, is_edge=is_edge)
        state = lax.fori_loop(first, last, step, state)
    pl.when(index == 0)(lambda: _turn(job))
    _store(job, own, (state.acc / _of_columns(state.total, state.acc)).astype(job.tiles.dtype))


def _own(job: Job, index: Array) -> Own:
    tiles = job.tiles
    head = job.kv_head * tiles.group_size
    if tiles.group_size > 1:
        head, token = head + index * tiles.own_heads, jnp.int32(0)
    else:
        token = index * tiles.own_tokens
    return Own(index, head, token, jnp.clip(job.item.n_tokens - token, 0, tiles.own_tokens))


def _turn(job: Job) -> None:
    """Waits for the other computing warpgroup to be here as well."""
    plgpu.barrier_arrive(job.scratch.turn)
    plgpu.barrier_wait(job.scratch.turn)


def _load_queries(job: Job, own: Own) -> None:
    full = job.scratch.q_full.at[own.index]
    for head, rows, tokens in _boxes(job, own):
        plgpu.copy_gmem_to_smem(job.arrays.q.at[tokens, head], rows, full)
    plgpu.barrier_wait(full)


def _boxes(job: Job, own: Own):
    """(head, rows in shared memory, tokens of the batch) of each of the warpgroup's heads."""
    n = job.tiles.own_tokens
    for i in range(job.tiles.own_heads):
        rows = job.scratch.q.at[own.index, pl.ds(i * n, n)]
        yield own.head + i, rows, pl.ds(job.item.token + own.token, n)


def _start(job: Job, own: Own) -> Softmax:
    """A softmax over nothing, or over the sinks."""
    head_size = job.tiles.head_size
    acc = plgpu.layout_cast(jnp.zeros((ROWS, head_size), jnp.float32), WGMMA)
    zeros = plgpu.layout_cast(jnp.zeros(ROWS, jnp.float32), WGMMA_ROW)
    if job.arrays.sinks is None:
        return Softmax(acc, zeros + LOWEST, zeros)
    top = jnp.maximum(_row_values(job, own, job.arrays.sinks) * LOG2_E, LOWEST)
    return Softmax(acc, top, jnp.where(top > LOWEST, zeros + 1.0, zeros))


def _row_values(job: Job, own: Own, ref) -> Float[Array, "M"]:
    """What the rows' query heads have in a ref "N"."""
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=WGMMA_ROW)
    values = plgpu.layout_cast(jnp.zeros(ROWS, jnp.float32), WGMMA_ROW)
    for i in range(job.tiles.own_heads):
        values = jnp.where(row >= i * job.tiles.own_tokens, ref[own.head + i], values)
    return values


def _step(job: Job, own: Own, j: Array, state: Softmax, *, is_edge: bool) -> Softmax:
    scratch, spec = job.scratch, job.tiles.spec
    slot, interpret = lax.rem(j, jnp.int32(job.tiles.n_stages)), job.tiles.is_interpreted
    plgpu.barrier_wait(scratch.k_full.at[slot])
    q, k = scratch.q.at[own.index], scratch.k.at[slot]
    found = scores(q, k, lambda: _turn(job), interpret=interpret)
    plgpu.barrier_arrive(scratch.k_free.at[slot])
    found, scale = _scaled(job, own, j, found)
    if is_edge:
        cell, query = _positions(job, own, j)
        is_visible = cell <= query
        if spec.window is not None:
            is_visible &= cell > query - spec.window
        found = jnp.where(is_visible, found, -jnp.inf)
    top = jnp.maximum(state.top, found.max(axis=1) * scale)
    weights = jnp.exp2(found * scale - _of_columns(top, found))
    shrink = jnp.exp2(state.top - top)
    acc = state.acc * _of_columns(shrink, state.acc)
    total = state.total * shrink + weights.sum(axis=1)
    # All of it is done before the turn ends, that the other one may multiply.
    acc, top, total, weights = lax.optimization_barrier(
        (acc, top, total, weights.astype(job.tiles.dtype))
    )
    plgpu.barrier_arrive(scratch.turn)
    _wait_for_values(job, j, slot, is_edge)
    plgpu.barrier_wait(scratch.turn)
    acc = add_values(acc, weights, scratch.v.at[slot], interpret=interpret)
    plgpu.barrier_arrive(scratch.v_free.at[slot])
    return Softmax(acc, top, total)


def _wait_for_values(job: Job, j: Array, slot: Array, is_edge: bool) -> None:
    v_full, last = job.scratch.v_full.at[slot], job.spans[-1][1] - 1
    if not is_edge:
        plgpu.barrier_wait(v_full)
        return
    pl.when(j < last)(lambda: plgpu.barrier_wait(v_full))
    pl.when(j == last)(lambda: plgpu.barrier_wait(job.scratch.last_clean))


def _positions(job: Job, own: Own, j: Array) -> tuple[Int[Array, "M N"], Int[Array, "M N"]]:
    """Of the cells of tile j and of the rows' queries, from the tile's first cell on."""
    shape = ROWS, CELLS
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA)
    cell = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)
    first = job.item.position + own.token - j * CELLS
    return cell, (row & (job.tiles.own_tokens - 1)) + first


def _scaled(job: Job, own: Own, j: Array, found) -> tuple[Float[Array, "M N"], float]:
    """Scores and what times them is in units of log2, > 0."""
    spec = job.tiles.spec
    scale = spec.scale * LOG2_E * (1 if spec.soft_cap is None else 2 / spec.soft_cap)
    if spec.soft_cap is None and own.slopes is None and spec.scale > 0:
        return found, scale
    found = found * scale
    if spec.soft_cap is not None:  # c * tanh(x / c) = c - 2 c / (exp(2 x / c) + 1)
        found = spec.soft_cap * LOG2_E * (1.0 - 2.0 / (jnp.exp2(found) + 1.0))
    if own.slopes is not None:
        cell, query = _positions(job, own, j)
        found = found + _of_columns(own.slopes, found) * (cell - query).astype(jnp.float32)
    return found, 1.0


def _of_columns(values: Float[Array, "M"], like: Array) -> Float[Array, "M N"]:
    return lax.broadcast_in_dim(values, like.shape, [0])


def _store(job: Job, own: Own, values: Float[Array, "M H"]) -> None:
    """Boxes of all tokens, or single rows of those that are there: what follows in the output is
    another item's.
    """
    tiles, scratch = job.tiles, job.scratch

    @pl.when(own.n_tokens == tiles.own_tokens)
    def store_boxes():
        scratch.q[own.index] = values
        plgpu.commit_smem()
        for head, rows, tokens in _boxes(job, own):
            plgpu.copy_smem_to_gmem(rows, job.out.at[tokens, head])

    @pl.when(own.n_tokens < tiles.own_tokens)
    def store_rows():
        _put(scratch.rows.at[own.index], values)
        plgpu.commit_smem()

        def store(token, _):
            for i in range(tiles.own_heads):
                row = scratch.rows.at[own.index, pl.ds(i * tiles.own_tokens + token, 1)]
                at = pl.ds(job.item.token + own.token + token, 1), own.head + i
                plgpu.copy_smem_to_gmem(row, job.out.at[at])

        lax.fori_loop(0, own.n_tokens, store, None)

    plgpu.wait_smem_to_gmem(0)


def _put(ref, values: Float[Array, "M H"]) -> None:
    """Where several threads want one bank of shared memory, which plain stores refuse from jax 0.12
    on.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(ref, values, optimized=False)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        ref[...] = values


def _copy(job: Job) -> None:
    plgpu.set_max_registers(COPYING, action="decrease")
    scratch, n_stages = job.scratch, jnp.int32(job.tiles.n_stages)
    first, end = job.spans[0][0], job.spans[-1][1]

    def fetch(j, _):
        slot, is_reused = lax.rem(j, n_stages), j - first >= n_stages
        pl.when(is_reused)(lambda: plgpu.barrier_wait(scratch.k_free.at[slot]))
        _fetch(job, j, 0, scratch.k.at[slot], scratch.k_full.at[slot])
        pl.when(is_reused)(lambda: plgpu.barrier_wait(scratch.v_free.at[slot]))
        values = functools.partial(_fetch, job, j, 1, scratch.v.at[slot])
        pl.when(j < end - 1)(lambda: values(scratch.v_full.at[slot]))
        pl.when(j == end - 1)(lambda: values(scratch.last_full))

    def wait(j, _):
        slot = lax.rem(j, n_stages)
        plgpu.barrier_wait(scratch.k_free.at[slot])
        plgpu.barrier_wait(scratch.v_free.at[slot])

    lax.fori_loop(first, end, fetch, None)
    plgpu.barrier_wait(scratch.last_full)
    _clear(job, end - 1, scratch.v.at[lax.rem(end - 1, n_stages)])
    plgpu.barrier_arrive(scratch.last_clean)
    lax.fori_loop(jnp.maximum(end - n_stages, first), end, wait, None)


def _fetch(job: Job, j: Array, which: int, tile, full) -> None:
    """Starts the copies of keys (0) or values (1) of tile j."""
    item, n_cells, n = job.item, job.tiles.n_cells, job.tiles.box_cells
    window = job.tiles.spec.window
    seen = 0 if window is None else jnp.maximum(item.position - window + 1, 0)
    nearest, last = seen // n_cells, (item.kv_end - 1) // n_cells
    for i in range(CELLS // n):
        cell = j * CELLS + i * n
        column = jnp.clip(cell // n_cells, nearest, last)
        block = job.arrays.tables[item.seq, column]
        cells = job.arrays.kv_cache.at[block, job.kv_head, which, pl.ds(cell % n_cells, n)]
        plgpu.copy_gmem_to_smem(cells, tile.at[pl.ds(i * n, n)], full)


def _clear(job: Job, j: Array, tile) -> None:
    """Zeros the rows of the last tile, which is j, that are behind the context's end."""
    end, n = job.item.kv_end - j * CELLS, ROWS
    for i in range(0, CELLS, n):

        @pl.when(end < i + n)
        def clear(i=i):
            for column in range(0, job.tiles.head_size, BOX[1]):
                part = tile.at[pl.ds(i, n), pl.ds(column, BOX[1])]
                row = plgpu.broadcasted_iota(jnp.int32, part.shape, 0, layout=WGMMA)
                values = plgpu.layout_cast(part[...], WGMMA)
                part[...] = jnp.where(row < end - i, values, jnp.zeros_like(values))

    plgpu.commit_smem()
