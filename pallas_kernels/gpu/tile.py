"""What the GPU attention kernels share: loads of query and KV tiles and one step of a softmax over
a tile of keys, in the subset of jax that Pallas lowers to Triton.

Layout and reasons:
- All arrays are flat; offsets are computed here, in int32 (contract.MAX_CACHE_SIZE). A row of a
  tile is a pair (token, query head of one KV head's group), so that a group shares its keys.
- A head is in parts, powers of two as Triton demands: 80 = 64 + 16, 96 = 64 + 32. No byte and no
  product is spent on padding.
- Tiles of keys start at multiples of block_n. Where a tile lies in one block its address is one
  scalar, and two are those of a tile in two blocks. Otherwise each cell looks up its block.
- Scores are in units of log2, so that weights are exp2, the GPU's own exponential.
- Edge tiles mask loads (unused cells may be NaN, and NaN * 0 is NaN), interior ones nothing.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Bool, Float, Int, Num

from pallas_kernels.gpu import plan, ptx
from pallas_kernels.gpu.layout import FACTORS, LOG2_E, LOWEST, Inputs, Layout


class Item(NamedTuple):
    """One line of the plan, scalars."""

    seq: Array
    token: Array
    n_tokens: Array
    position: Array
    kv_start: Array
    kv_end: Array
    slot: Array
    split: Array


class Softmax(NamedTuple):
    """A softmax in progress, in float32: sums of values weighted by exp2(score - top)."""

    acc: tuple[Float[Array, "M _"], ...]  # one for each operand, see Layout.is_halved
    top: Float[Array, "M"]
    total: Float[Array, "M"]


class Queries(NamedTuple):
    """A tile of queries as operands; scores are to be multiplied by `scale`."""

    parts: tuple[Float[Array, "M _"], ...]
    scale: Float[Array, "M"] | None
    position: Int[Array, "M"]
    slopes: Float[Array, "M"] | None


def read_item(items, i) -> Item:
    columns = plan.SEQ, plan.TOKEN, plan.N_TOKENS, plan.POSITION
    columns += plan.KV_START, plan.KV_END, plan.SLOT, plan.SPLIT
    return Item(*(items[i, column] for column in columns))


class Rows(NamedTuple):
    """Where the rows of a query tile are."""

    index: Int[Array, "M"]  # in "T * N", unique also for rows that are not there
    token: Int[Array, "M"]  # in the tile
    head: Int[Array, "M"]
    is_row: Bool[Array, "M"]


def tile_rows(
    layout: Layout, token, n_tokens, kv_head, first: Array | int = 0, n_rows: int | None = None
) -> Rows:
    """Rows `first` ... of the tile of `n_tokens` tokens from batch token `token` on."""
    row = first + jnp.arange(n_rows or layout.block_m, dtype=jnp.int32)
    tile_token, in_group = _divided(row, layout.group_size)
    head = kv_head * layout.group_size + in_group
    return Rows(
        (token + tile_token) * layout.n_heads + head, tile_token, head, tile_token < n_tokens
    )


def load_queries(layout: Layout, inputs: Inputs, item: Item, rows: Rows) -> Queries:
    parts, scale = load_parts(layout, inputs.q, rows.index, rows.is_row), None
    if inputs.q.dtype != layout.dtype:
        parts = tuple(part.astype(jnp.float32) for part in parts)
        if layout.dtype == jnp.float16:
            scale = _power_below(parts)
            parts = tuple(part / scale[:, None] for part in parts)
    parts = tuple(part.astype(layout.dtype) for part in halve(layout, parts))
    slopes = None
    if inputs.slopes is not None:
        slopes = LOG2_E * pltriton.load(inputs.slopes.at[rows.head], mask=rows.is_row, other=0.0)
    return Queries(parts, scale, item.position + rows.token, slopes)


def _power_below(parts: tuple[Float[Array, "M _"], ...]) -> Float[Array, "M"]:
    """The power of two below each row's largest element: to divide by it loses nothing."""
    top = functools.reduce(jnp.maximum, [jnp.abs(part).max(1) for part in parts])
    bits = lax.bitcast_convert_type(top, jnp.int32) & 0x7F800000
    power = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(power == 0.0, 1.0, power)


def start(layout: Layout, inputs: Inputs, item: Item, rows: Rows) -> Softmax:
    """A softmax over nothing, or over the sinks in the first part of a context."""
    acc = tuple(jnp.zeros((layout.block_m, width), jnp.float32) for width in layout.operand_widths)
    if inputs.sinks is None:
        zeros = jnp.zeros(layout.block_m, jnp.float32)
        return Softmax(acc, zeros + LOWEST, zeros)
    sinks = pltriton.load(inputs.sinks.at[rows.head], mask=rows.is_row, other=0.0)
    has_sink = item.split == 0
    top = jnp.where(has_sink, jnp.maximum(sinks * LOG2_E, LOWEST), LOWEST)
    return Softmax(acc, top, jnp.where(top > LOWEST, 1.0, 0.0))


def tile_spans(layout: Layout, item: Item) -> list[tuple[Array, Array, bool]]:
    """The tiles of keys of an item that its queries see something of, see `attend`.

    In interior ones the first query sees the last cell and the last query the first one.
    """
    window, block_n = layout.spec.window, jnp.int32(layout.block_n)
    first, last = lax.div(item.kv_start, block_n), pl.cdiv(item.kv_end, block_n)
    diagonal = lax.div(jnp.minimum(item.position + 1, item.kv_end), block_n)
    spans, seen = [], first
    if window is not None:
        first = jnp.maximum(first, lax.div(jnp.maximum(item.position - window + 1, 0), block_n))
        behind = jnp.maximum(item.position + item.n_tokens - window, 0)
        seen = jnp.minimum(jnp.maximum(first, pl.cdiv(behind, block_n)), last)
        spans = [(first, seen, True)]
    diagonal = jnp.maximum(seen, diagonal)
    return [*spans, (seen, diagonal, False), (diagonal, last, True)]


class Loop(NamedTuple):
    """What a loop over tiles of keys carries. The table is read one tile ahead: a load that waits
    for another one in its own iteration would cost the pipeline a stage.
    """

    state: Softmax
    blocks: tuple[Array, ...]  # of the next tile, see `_blocks`


class CellRows(NamedTuple):
    """Rows of a tile's keys in the cache as "B * K * 2 * C, H". In two addends they make offsets of
    which each iteration makes `first`'s alone.
    """

    first: Int[Array, "M"]
    own: Int[Array, "M"] | None = None  # the same in all tiles

    def values(self, layout: Layout) -> "CellRows":
        if self.own is None:
            return CellRows(self.first + layout.n_cells)
        return CellRows(self.first, self.own + layout.n_cells)

    def offsets(self, width: int, part: tuple[int, int]) -> Int[Array, "M _"]:
        """Of a part of these rows in a flat array of rows of that width."""
        if self.own is None:
            return _offsets(self.first * width, *part)
        return (self.first * width)[:, None] + _offsets(self.own * width, *part)


def attend(
    layout: Layout, inputs: Inputs, item: Item, kv_head, queries: Queries, state: Softmax, spans
) -> Softmax:
    """The softmax with tiles of keys added, all those of spans (first, last, is_edge).

    is_edge: some cells of the tiles are not there, or some query does not see all of them.
    """
    for first, last, is_edge in spans:
        step = functools.partial(
            _tile_step, layout, inputs, item, kv_head, queries, is_edge=is_edge
        )
        blocks = _blocks(layout, inputs.tables, item, kv_head, first)
        state = lax.fori_loop(first, last, step, Loop(state, blocks)).state
    return state


def _tile_step(
    layout: Layout, inputs: Inputs, item: Item, kv_head, queries: Queries, j, loop: Loop, *, is_edge
) -> Loop:
    spec, state = layout.spec, loop.state
    exp2 = functools.partial(ptx.exp2, interpret=layout.interpret)
    blocks = _blocks(layout, inputs.tables, item, kv_head, j + 1)
    cell = j * layout.block_n + jnp.arange(layout.block_n, dtype=jnp.int32)
    is_cached = None
    if is_edge:
        is_cached = (item.kv_start <= cell) & (cell < item.kv_end)
        if spec.window is not None:  # cells behind the first query's window may be freed
            is_cached &= cell > item.position - spec.window
    rows = _cell_rows(layout, loop.blocks, kv_head, j)
    keys, key_scales = _load_cells(layout, inputs, rows, is_cached)
    distance = cell[None, :] - queries.position[:, None]
    scores, scale = _scores(layout, queries, keys, key_scales, distance)
    if is_cached is not None:
        visible = is_cached[None, :] & (distance <= 0)
        if spec.window is not None:
            visible &= distance > -spec.window
        scores = jnp.where(visible, scores, -jnp.inf)  # tops are finite: weights become zeros
    top = jnp.maximum(state.top, scores.max(1) * scale)
    weights = exp2(scores, scale[:, None], -top[:, None])
    shrink = exp2(state.top, jnp.ones_like(top), -top)
    total = state.total * shrink + weights.sum(1)
    values, value_scales = _load_cells(layout, inputs, rows.values(layout), is_cached)
    if value_scales is not None:
        weights = weights * value_scales[None, :]
    weights = weights.astype(layout.dtype)
    pairs = zip(state.acc, values, strict=True)
    acc = tuple(a * shrink[:, None] + _dot(weights, part) for a, part in pairs)
    return Loop(Softmax(acc, top, total), blocks)


def finish(state: Softmax) -> tuple[Float[Array, "M _"], ...]:
    total = jnp.where(state.total == 0.0, 1.0, state.total)
    return tuple(acc / total[:, None] for acc in state.acc)


def store_rows(layout: Layout, ref, index, values, is_row) -> None:
    """Stores the parts of heads into rows `index` of a flat array of heads."""
    for (offset, width), value in zip(layout.parts, values, strict=True):
        at = _offsets(index * layout.head_size, offset, width)
        pltriton.store(ref.at[at], value.astype(ref.dtype), mask=is_row[:, None])


def load_parts(layout: Layout, ref, index, is_row) -> tuple[Array, ...]:
    """Loads rows `index` of a flat array of heads."""
    base = index * layout.head_size
    return tuple(_load(ref, _offsets(base, *part), is_row) for part in layout.parts)


def _offsets(base: Int[Array, "*M"], offset: int, width: int) -> Int[Array, "*M _"]:
    column = lax.broadcasted_iota(jnp.int32, (*base.shape, width), base.ndim)
    return base[..., None] + (offset + column)


def _load(ref, at: Int[Array, "*M _"], is_row) -> Num[Array, "*M _"]:
    if is_row is None:
        return pltriton.load(ref.at[at])
    return pltriton.load(ref.at[at], mask=is_row[..., None], other=jnp.zeros((), ref.dtype))


def _load_cells(layout: Layout, inputs: Inputs, rows: CellRows, is_cached):
    """Keys or values of a tile in parts, and their scales, None if the cache has none."""
    per_word = 1 if inputs.kv_scales is None else 2
    parts = [(offset // per_word, width // per_word) for offset, width in layout.parts]
    offsets = [rows.offsets(layout.head_size // per_word, part) for part in parts]
    loaded = [_load(inputs.kv_cache, at, is_cached) for at in offsets]
    if inputs.kv_scales is None:
        return tuple(decode(part, layout.dtype) for part in loaded), None
    operands = tuple(operand for words in loaded for operand in _unpack(layout, words))
    mask = {} if is_cached is None else {"mask": is_cached, "other": 0}
    row = rows.first if rows.own is None else rows.first + rows.own
    scales = pltriton.load(inputs.kv_scales.at[row], **mask).astype(jnp.float32)
    return operands, scales * FACTORS[layout.cache_dtype]


def _unpack(layout: Layout, words: Int[Array, "M _"]) -> list[Float[Array, "M _"]]:
    """The operands of one part."""
    pair = ptx.unpack(words, layout.cache_dtype, interpret=layout.interpret)
    halves = [half.astype(layout.dtype) for half in pair]
    return halves if layout.is_halved(2 * words.shape[1]) else [_interleave(*halves)]


def _interleave(even: Float[Array, "M _"], odd: Float[Array, "M _"]) -> Float[Array, "M _"]:
    return jnp.stack([even, odd], axis=-1).reshape(len(even), -1)


def halve(layout: Layout, parts: tuple[Array, ...]) -> tuple[Array, ...]:
    """Parts of heads as operands."""
    operands = []
    for part in parts:
        n_rows, width = part.shape
        if not layout.is_halved(width):
            operands.append(part)
            continue
        pairs = part.reshape(n_rows, width // 2, 2)
        is_odd = lax.broadcasted_iota(jnp.int32, pairs.shape, 2)
        operands += [jnp.where(is_odd == i, pairs, 0).sum(2) for i in range(2)]
    return tuple(operands)


def join(layout: Layout, operands: tuple[Array, ...]) -> tuple[Array, ...]:
    """The inverse of `halve`."""
    left = iter(operands)
    return tuple(
        _interleave(next(left), next(left)) if layout.is_halved(width) else next(left)
        for _, width in layout.parts
    )


def _blocks(layout: Layout, tables, item: Item, kv_head, j) -> tuple[Array, ...]:
    """The block of tile j's cells, or one for each of them, in one array. Of a tile in two blocks
    the rows where these begin: so there is least to do in the loop.

    Past the item they are other entries of the table, which nothing is loaded from.
    """
    table, last = item.seq * layout.table_width, layout.table_width - 1
    if layout.n_tile_blocks == 0:
        cell = j * layout.block_n + jnp.arange(layout.block_n, dtype=jnp.int32)
        column, _ = _divided(cell, layout.n_cells)
        return (pltriton.load(tables.at[table + jnp.minimum(column, last)]),)
    column, _ = _divided(j * layout.block_n, layout.n_cells)
    if layout.n_tile_blocks == 1:
        return (tables[table + jnp.minimum(column, last)],)
    column = jnp.minimum(column, last - last % 2)  # even, as that of each tile
    blocks = tables[table + column], tables[table + jnp.minimum(column + 1, last)]
    return tuple(_first_row(layout, block, kv_head) for block in blocks)


def _first_row(layout: Layout, block, kv_head):
    return (block * layout.n_kv_heads + kv_head) * (2 * layout.n_cells)


def _cell_rows(layout: Layout, blocks: tuple[Array, ...], kv_head, j) -> CellRows:
    cell = jnp.arange(layout.block_n, dtype=jnp.int32)
    if layout.n_tile_blocks == 2:
        first = jnp.where(cell < layout.n_cells, *blocks)
        return CellRows(first, _divided(cell, layout.n_cells)[1])
    first = _first_row(layout, blocks[0], kv_head)
    if layout.n_tile_blocks == 1:
        _, in_block = _divided(j * layout.block_n, layout.n_cells)
        return CellRows(first + in_block + cell)
    return CellRows(first + _divided(j * layout.block_n + cell, layout.n_cells)[1])


def _divided(x: Int[Array, "*dims"], n: int) -> tuple[Int[Array, "*dims"], Int[Array, "*dims"]]:
    """Quotient and remainder of numbers >= 0."""
    if n & (n - 1) == 0:
        return x >> (n.bit_length() - 1), x & (n - 1)
    quotient = lax.div(x, jnp.full_like(x, n))
    return quotient, x - quotient * n


def decode(cells: Num[Array, "M _"], dtype) -> Float[Array, "M _"]:
    """Cells of a cache that is not quantised, as operands of a product."""
    if cells.dtype == jnp.uint16:
        cells = lax.bitcast_convert_type(cells, jnp.bfloat16)
    return cells if cells.dtype == dtype else cells.astype(jnp.float32).astype(dtype)


def _scores(
    layout: Layout, queries: Queries, keys, key_scales, distance: Int[Array, "M _"]
) -> tuple[Float[Array, "M _"], Float[Array, "M"]]:
    """Scores and what times them is in units of log2, > 0: left to the exponential, where nothing
    comes between.
    """
    spec = layout.spec
    pairs = zip(queries.parts, keys, strict=True)
    scores = sum((_dot(q, k.T) for q, k in pairs), start=jnp.float32(0))
    if key_scales is not None:
        scores = scores * key_scales[None, :]
    ones = jnp.ones(layout.block_m, jnp.float32)
    scale = ones if queries.scale is None else queries.scale
    scale = scale * (spec.scale * LOG2_E * (1 if spec.soft_cap is None else 2 / spec.soft_cap))
    if spec.soft_cap is None and queries.slopes is None and spec.scale > 0:
        return scores, scale
    scores = scores * scale[:, None]
    if spec.soft_cap is not None:  # c * tanh(x / c) = c - 2 c / (exp(2 x / c) + 1)
        growth = jnp.exp2(scores)
        scores = spec.soft_cap * LOG2_E * (1.0 - 2.0 / (growth + 1.0))
    if queries.slopes is not None:
        scores = scores + queries.slopes[:, None] * distance.astype(jnp.float32)
    return scores, ones


def _dot(a: Float[Array, "M _"], b: Float[Array, "_ N"]) -> Float[Array, "M N"]:
    """Products of float32 are exact ones: without a precision they would be TF32."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
