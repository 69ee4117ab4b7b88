"""The GPU kernels once more, in Triton itself: attention.py launches them.

Layout, plan and softmax are those of gpu/tile.py and gpu/attention.py; what differs:
- A head is one part, padded with zeros to a power of two: masked columns cost no bytes.
- Quantised cells come as their bits in int8, so that GPUs without float8 take them as well.
- `layout` is an attention.TritonLayout, constant like all that follows from it.

- `aliased` is `out` once more: jax-triton has outputs follow inputs, also those that are inputs.

Needs the `triton` package: only what runs these kernels may import this file.
"""

# Where triton is not installed pyright takes this folder for it.
# pyright: reportAttributeAccessIssue=false
import triton
import triton.language as tl  # pyright: ignore[reportMissingImports]

from pallas_kernels.gpu import layout as gpu_layout
from pallas_kernels.gpu import plan

LOG2_E = tl.constexpr(gpu_layout.LOG2_E)
LOWEST = tl.constexpr(gpu_layout.LOWEST)
MERGE_ROWS = tl.constexpr(gpu_layout.MERGE_ROWS)
SEQ, TOKEN, N_TOKENS = (tl.constexpr(i) for i in (plan.SEQ, plan.TOKEN, plan.N_TOKENS))
POSITION, SLOT, SPLIT = (tl.constexpr(i) for i in (plan.POSITION, plan.SLOT, plan.SPLIT))
KV_START, KV_END = tl.constexpr(plan.KV_START), tl.constexpr(plan.KV_END)
MERGE_TOKEN, MERGE_N_TOKENS = tl.constexpr(plan.MERGE_TOKEN), tl.constexpr(plan.MERGE_N_TOKENS)
MERGE_SLOT, MERGE_N_SLOTS = tl.constexpr(plan.MERGE_SLOT), tl.constexpr(plan.MERGE_N_SLOTS)


@triton.jit
def attention_decode(
    out,  # "T * N * H"
    items,
    tables,
    q,
    kv_cache,
    kv_scales,
    slopes,
    sinks,
    part_acc,  # "n_slots * K * M * H"
    part_top,  # "n_slots * K * M"
    part_total,
    aliased,
    layout: tl.constexpr,
):
    """One item: a tile of queries and a range of its context."""
    kv_head, item = tl.program_id(0), items + 8 * tl.program_id(1)
    n_tokens, slot = tl.load(item + N_TOKENS), tl.load(item + SLOT)
    if n_tokens > 0:
        rows = _rows(layout, tl.load(item + TOKEN), n_tokens, kv_head, 0, layout.block_m)
        queries = _queries(layout, item, q, slopes, rows)
        state = _start(layout, item, sinks, rows)
        first, last = _first_tile(layout, item), tl.cdiv(tl.load(item + KV_END), layout.block_n)
        cache = tables, kv_cache, kv_scales
        state = _attend(layout, item, cache, kv_head, queries, state, first, last, True)
        index, is_row = rows[0], rows[3]
        acc, top, total = state
        if slot < 0:
            _store_heads(layout, out, index, _finished(acc, total), is_row)
        else:
            row = (slot * layout.n_kv_heads + kv_head) * layout.block_m
            row += tl.arange(0, layout.block_m)
            _store_heads(layout, part_acc, row, acc, is_row)
            tl.store(part_top + row, top, mask=is_row)
            tl.store(part_total + row, total, mask=is_row)


@triton.jit
def attention_merge(out, merges, part_acc, part_top, part_total, aliased, layout: tl.constexpr):
    """One split query tile's parts, in their order, for a few of its rows."""
    merge, kv_head = merges + 4 * tl.program_id(0), tl.program_id(1)
    first_row = tl.program_id(2) * MERGE_ROWS
    first_slot, n_slots = tl.load(merge + MERGE_SLOT), tl.load(merge + MERGE_N_SLOTS)
    if n_slots > 0:
        token, n_tokens = tl.load(merge + MERGE_TOKEN), tl.load(merge + MERGE_N_TOKENS)
        rows = _rows(layout, token, n_tokens, kv_head, first_row, MERGE_ROWS)
        index, is_row = rows[0], rows[3]
        head_width: tl.constexpr = layout.head_width
        acc = tl.zeros([MERGE_ROWS, head_width], tl.float32)
        top = tl.full([MERGE_ROWS], LOWEST, tl.float32)
        total = tl.zeros([MERGE_ROWS], tl.float32)
        for slot in range(first_slot, first_slot + n_slots):
            row = (slot * layout.n_kv_heads + kv_head) * layout.block_m
            row += first_row + tl.arange(0, MERGE_ROWS)
            added_top = tl.load(part_top + row, mask=is_row, other=LOWEST)
            added_total = tl.load(part_total + row, mask=is_row, other=0.0)
            added = _load_heads(layout, part_acc, row, is_row)
            new_top = tl.maximum(top, added_top)
            shrink, grow = tl.exp2(top - new_top), tl.exp2(added_top - new_top)
            acc = acc * shrink[:, None] + added * grow[:, None]
            total = total * shrink + added_total * grow
            top = new_top
        _store_heads(layout, out, index, _finished(acc, total), is_row)


@triton.jit
def attention_chunks(
    out, items, tables, q, kv_cache, kv_scales, slopes, sinks, aliased, layout: tl.constexpr
):
    """One item: a tile of queries and their whole context, unmasked except at its edges."""
    kv_head, item = tl.program_id(0), items + 8 * tl.program_id(1)
    n_tokens = tl.load(item + N_TOKENS)
    if n_tokens > 0:
        rows = _rows(layout, tl.load(item + TOKEN), n_tokens, kv_head, 0, layout.block_m)
        queries = _queries(layout, item, q, slopes, rows)
        state = _start(layout, item, sinks, rows)
        position = tl.load(item + POSITION)
        first, last = _first_tile(layout, item), tl.cdiv(tl.load(item + KV_END), layout.block_n)
        # Interior tiles: the first query sees their last cell, the last query their first one.
        diagonal = (position + 1) // layout.block_n
        cache = tables, kv_cache, kv_scales
        if layout.spec.window is not None:
            behind = tl.maximum(position + n_tokens - layout.spec.window, 0)
            seen = tl.minimum(tl.cdiv(behind, layout.block_n), last)
            state = _attend(layout, item, cache, kv_head, queries, state, first, seen, True)
            first = seen
            diagonal = tl.maximum(seen, diagonal)
        state = _attend(layout, item, cache, kv_head, queries, state, first, diagonal, False)
        state = _attend(layout, item, cache, kv_head, queries, state, diagonal, last, True)
        index, is_row = rows[0], rows[3]
        acc, total = state[0], state[2]
        _store_heads(layout, out, index, _finished(acc, total), is_row)


@triton.jit
def _rows(layout: tl.constexpr, token, n_tokens, kv_head, first, n_rows: tl.constexpr):
    """Rows `first` ... of the tile of n_tokens tokens from batch token `token` on, each "M": where
    in "T * N", which token of the tile, which query head, whether there.
    """
    row = first + tl.arange(0, n_rows)
    tile_token = row // layout.group_size
    head = kv_head * layout.group_size + row % layout.group_size
    return (token + tile_token) * layout.n_heads + head, tile_token, head, tile_token < n_tokens


@triton.jit
def _queries(layout: tl.constexpr, item, q, slopes, rows):
    """A tile "M H" in the operands' dtype; and for its rows "M" what scores are multiplied with,
    positions, ALiBi slopes.
    """
    index, tile_token, head, is_row = rows
    tile = _load_heads(layout, q, index, is_row)
    block_m: tl.constexpr = layout.block_m
    scale = tl.full([block_m], layout.score_scale, tl.float32)
    if layout.narrows_queries:
        # To divide by the power of two below each row's largest element loses nothing.
        tile = tile.to(tl.float32)
        bits = tl.max(tl.abs(tile), 1).to(tl.int32, bitcast=True) & 0x7F800000
        power = bits.to(tl.float32, bitcast=True)
        power = tl.where(power == 0.0, 1.0, power)
        tile = (tile / power[:, None]).to(tl.float16)
        scale = scale * power
    elif layout.widens_queries:
        tile = tile.to(tl.float32)
    slope = scale
    if layout.has_slopes:
        slope = tl.load(slopes + head, mask=is_row, other=0.0) * LOG2_E
    return tile, scale, tl.load(item + POSITION) + tile_token, slope


@triton.jit
def _start(layout: tl.constexpr, item, sinks, rows):
    """A softmax over nothing, or over the sinks in the first part of a context: the sum "M H" of
    weighted values, the top score "M", the sum "M" of weights.
    """
    head, is_row = rows[2], rows[3]
    block_m: tl.constexpr = layout.block_m
    head_width: tl.constexpr = layout.head_width
    acc = tl.zeros([block_m, head_width], tl.float32)
    top = tl.full([block_m], LOWEST, tl.float32)
    total = tl.zeros([block_m], tl.float32)
    if layout.has_sinks:
        has_sink = tl.load(item + SPLIT) == 0
        sink = tl.load(sinks + head, mask=is_row, other=0.0) * LOG2_E
        top = tl.where(has_sink, tl.maximum(sink, LOWEST), top)
        total = tl.where(top > LOWEST, 1.0, total)
    return acc, top, total


@triton.jit
def _first_tile(layout: tl.constexpr, item):
    """The first tile of keys of an item that the item's first query sees something of."""
    first = tl.load(item + KV_START)
    if layout.spec.window is not None:
        first = tl.maximum(first, tl.load(item + POSITION) - layout.spec.window + 1)
    return first // layout.block_n


@triton.jit
def _attend(
    layout: tl.constexpr,
    item,
    cache,
    kv_head,
    queries,
    state,
    first,
    last,
    is_edge: tl.constexpr,
):
    """The softmax with tiles first <= j < last of keys added.

    is_edge: some cells of the tiles are not there, or some query does not see all of them.
    """
    tables, kv_cache, kv_scales = cache
    tile, scale, query_position, slope = queries
    acc, top, total = state
    position, kv_start = tl.load(item + POSITION), tl.load(item + KV_START)
    table, kv_end = tables + tl.load(item + SEQ) * layout.table_width, tl.load(item + KV_END)
    blocks = _blocks(layout, table, first)
    for j in range(first, last):
        cell = j * layout.block_n + tl.arange(0, layout.block_n)
        row = (blocks * layout.n_kv_heads + kv_head) * (2 * layout.n_cells) + cell % layout.n_cells
        blocks = _blocks(layout, table, j + 1)  # ahead: a load that waits for one costs a stage
        is_cached = None
        if is_edge:
            is_cached = (cell >= kv_start) & (cell < kv_end)
            if layout.spec.window is not None:  # cells behind the first query's may be freed
                is_cached = is_cached & (cell > position - layout.spec.window)
        keys = _cells(layout, kv_cache, row, is_cached, tile.dtype)
        scores = tl.dot(tile, tl.trans(keys), input_precision="ieee") * scale[:, None]
        if layout.is_quantized:
            scores = scores * _scales(layout, kv_scales, row, is_cached)[None, :]
        if layout.log2_cap is not None:  # c * tanh(x / c) = c - 2 c / (exp(2 x / c) + 1)
            scores = (1.0 - 2.0 / (tl.exp2(scores) + 1.0)) * layout.log2_cap
        distance = cell[None, :] - query_position[:, None]
        if layout.has_slopes:
            scores = scores + slope[:, None] * distance.to(tl.float32)
        visible = None
        if is_cached is not None:
            visible = is_cached[None, :] & (distance <= 0)
            if layout.spec.window is not None:
                visible = visible & (distance > -layout.spec.window)
            scores = tl.where(visible, scores, LOWEST)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        if visible is not None:  # a row that has seen nothing yet has top = LOWEST
            weights = tl.where(visible, weights, 0.0)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        row += layout.n_cells
        values = _cells(layout, kv_cache, row, is_cached, tile.dtype)
        if layout.is_quantized:
            weights = weights * _scales(layout, kv_scales, row, is_cached)[None, :]
        added = tl.dot(weights.to(tile.dtype), values, input_precision="ieee")
        acc = acc * shrink[:, None] + added
        top = new_top
    return acc, top, total


@triton.jit
def _blocks(layout: tl.constexpr, table, j):
    """The block of tile j's cells, or of each of them where a tile may lie in several.

    Past the item they are other entries of the table, which nothing is loaded from.
    """
    cell = j * layout.block_n
    if layout.n_cells % layout.block_n != 0:
        cell = cell + tl.arange(0, layout.block_n)
    return tl.load(table + tl.minimum(cell // layout.n_cells, layout.table_width - 1))


@triton.jit
def _cells(layout: tl.constexpr, kv_cache, row, is_cached, dtype: tl.constexpr):
    """Rows of the cache as operands "M H" of a product; quantised ones divided by their FACTORS, as
    gpu/tile.decode does it.
    """
    cells = _load_heads(layout, kv_cache, row, is_cached)
    if layout.is_float8:
        cells = ((cells.to(tl.int16) << 7) & -0x4080).to(tl.float16, bitcast=True)
    elif layout.is_quantized:
        cells = ((cells.to(tl.int16) & 0xFF) ^ 0x4880).to(tl.float16, bitcast=True) - 9.0
    return cells.to(dtype)


@triton.jit
def _scales(layout: tl.constexpr, kv_scales, row, is_cached):
    """What the rows' cells are to be multiplied with."""
    if is_cached is None:
        scales = tl.load(kv_scales + row)
    else:
        scales = tl.load(kv_scales + row, mask=is_cached, other=0.0)
    return scales.to(tl.float32) * layout.factor


@triton.jit
def _load_heads(layout: tl.constexpr, heads, row, is_row):
    """Rows "M" of a flat array of heads, as "M H"; zeros where is_row says no, all if None."""
    column = tl.arange(0, layout.head_width)
    at = heads + row[:, None] * layout.head_size + column[None, :]
    if layout.head_width != layout.head_size:
        is_there = (column < layout.head_size)[None, :]
        if is_row is not None:
            is_there = is_there & is_row[:, None]
        tile = tl.load(at, mask=is_there, other=0)
    elif is_row is not None:
        tile = tl.load(at, mask=is_row[:, None], other=0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _store_heads(layout: tl.constexpr, heads, row, tile, is_row):
    """Stores "M H" into rows "M" of a flat array of heads, where is_row says so."""
    column = tl.arange(0, layout.head_width)
    at = heads + row[:, None] * layout.head_size + column[None, :]
    is_there = is_row[:, None] & (column < layout.head_size)[None, :]
    tl.store(at, tile.to(heads.dtype.element_ty), mask=is_there)


@triton.jit
def _finished(acc, total):
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]
