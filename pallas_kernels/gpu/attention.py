"""Paged attention on NVIDIA GPUs (compute capability 8.0 and later), in Pallas-Triton.

The host's plan (plan.py) names the work; grids are the KV heads times the plan's capacity, and a
program without an item ends at once. In order:
1. New keys and values are scattered into the cache by XLA, in place.
2. Decode kernel: an item is one tile of up to 16 rows and a range of its context. Tiles of
   keys are unmasked except at its edges, or with a window all masked.
3. Merge kernel: parts of split contexts, in their order, so that results do not change from run to
   run; it reads only parts that exist.
4. Chunk kernel: 128 rows and their whole context, unmasked except at its edges.
All three kernels write their own tokens' rows of one output that starts as zeros.

Pallas-Triton is chosen explicitly, by `compiler_params`: jax's default has changed twice. It is
deprecated from jax 0.11 on, still complete in 0.12, and needs no `triton` package.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Num

from pallas_kernels.contract import AttentionSpec, RaggedMeta, check_arguments
from pallas_kernels.gpu import plan
from pallas_kernels.gpu.layout import (
    LOWEST,
    MERGE_ROWS,
    Inputs,
    Layout,
    check_plan,
    make_inputs,
    make_layout,
    tiled,
    warps_and_stages,
    write,
)
from pallas_kernels.gpu.ptx import as_words
from pallas_kernels.gpu.tile import (
    Softmax,
    attend,
    finish,
    join,
    load_parts,
    load_queries,
    read_item,
    start,
    store_rows,
    tile_rows,
    tile_spans,
)

MERGE_PARTS = 32  # of a split context, merged at once; half as many of large heads: registers

# Given when a program is lowered, so it cannot be caught around a call.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)


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
    interpret: bool = False,
    compute_capability: int = 80,
) -> tuple[Array, ...]:
    """See contract.RaggedPagedAttention.

    interpret: runs the kernels on any platform, slowly.
    compute_capability: of the GPU that tiles are chosen for, 90 for an H100; others run them too.

    Raises:
        ValueError: also for a meta without a plan, or one for other sizes.
    """
    check_arguments(q, k, v, kv_cache, meta, kv_scales)
    check_plan("pallas_gpu", q, kv_cache, meta)
    kv_cache, kv_scales = write(k, v, kv_cache, kv_scales, meta)
    inputs = make_inputs(q, as_words(kv_cache), kv_scales, meta, alibi_slopes, sinks)
    chip = {"interpret": interpret, "compute_capability": compute_capability}
    layout = make_layout(q, kv_cache, meta, spec, **chip)
    out = jnp.zeros(q.size, q.dtype)
    out = decode(out, inputs, meta.plan, layout)
    out = _chunks(out, inputs, meta.plan, layout)
    out = out.reshape(q.shape)
    return (out, kv_cache) if kv_scales is None else (out, kv_cache, kv_scales)


def decode(out: Float[Array, "T*N*H"], inputs: Inputs, work: plan.WorkPlan, layout: Layout):
    """`out` with the decode items' tokens."""
    if not len(work.decode):
        return out
    layout = tiled(layout, plan.decode_rows(layout.group_size))
    n_slots = 2 * len(work.merges) + 1  # an odd capacity's half is rounded down
    n_rows = n_slots * layout.n_kv_heads * layout.block_m
    float32 = jnp.float32
    out, acc, top, total = pl.pallas_call(
        functools.partial(_decode_kernel, layout=layout),
        out_shape=(
            jax.ShapeDtypeStruct(out.shape, out.dtype),
            jax.ShapeDtypeStruct((n_rows * layout.head_size,), float32),
            jax.ShapeDtypeStruct((n_rows,), float32),
            jax.ShapeDtypeStruct((n_rows,), float32),
        ),
        grid=(layout.n_kv_heads, len(work.decode)),
        input_output_aliases={0: 0},
        compiler_params=_params(layout),
        interpret=layout.interpret,
        name="attention_decode",
    )(out, inputs)
    if not len(work.merges):
        return out
    return pl.pallas_call(
        functools.partial(_merge_kernel, layout=layout),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        grid=(len(work.merges), layout.n_kv_heads, layout.block_m // MERGE_ROWS),
        input_output_aliases={0: 0},
        compiler_params=pltriton.CompilerParams(num_warps=8, num_stages=1),
        interpret=layout.interpret,
        name="attention_merge",
    )(out, work.merges, acc, top, total)


def _chunks(out: Float[Array, "T*N*H"], inputs: Inputs, work: plan.WorkPlan, layout: Layout):
    """`out` with the chunk items' tokens."""
    if not len(work.chunks):
        return out
    layout = tiled(layout, plan.chunk_rows(layout.group_size, layout.head_size))
    return pl.pallas_call(
        functools.partial(_chunk_kernel, layout=layout),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        grid=(layout.n_kv_heads, len(work.chunks)),
        input_output_aliases={0: 0},
        compiler_params=_params(layout),
        interpret=layout.interpret,
        name="attention_chunks",
    )(out, inputs._replace(items=work.chunks))


def _params(layout: Layout) -> pltriton.CompilerParams:
    return pltriton.CompilerParams(**warps_and_stages(layout))


def _decode_kernel(
    _,
    inputs: Inputs,  # refs, as all that follows
    out,  # "T * N * H", aliased
    acc,  # "n_slots * K * M * H"
    top,  # "n_slots * K * M"
    total,
    *,
    layout: Layout,
):
    kv_head, item = pl.program_id(0), read_item(inputs.items, pl.program_id(1))

    @pl.when(item.n_tokens > 0)
    def run():
        rows = tile_rows(layout, item.token, item.n_tokens, kv_head)
        queries = load_queries(layout, inputs, item, rows)
        state = start(layout, inputs, item, rows)
        spans = tile_spans(layout, item)
        if layout.spec.window is not None:  # few tiles: each loop waits for memory when it starts
            spans = [(spans[0][0], spans[-1][1], True)]
        state = attend(layout, inputs, item, kv_head, queries, state, spans)

        @pl.when(item.slot < 0)
        def store_whole():
            store_rows(layout, out, rows.index, join(layout, finish(state)), rows.is_row)

        @pl.when(item.slot >= 0)
        def store_part():
            row = jnp.arange(layout.block_m, dtype=jnp.int32)
            row = row + (item.slot * layout.n_kv_heads + kv_head) * layout.block_m
            store_rows(layout, acc, row, join(layout, state.acc), rows.is_row)
            pltriton.store(top.at[row], state.top, mask=rows.is_row)
            pltriton.store(total.at[row], state.total, mask=rows.is_row)


def _merge_kernel(_, merges, acc, top, total, out, *, layout: Layout):
    """One split query tile's parts, for a few of its rows: in one tile, to wait for memory once."""
    i, kv_head, row_tile = (pl.program_id(axis) for axis in range(3))
    columns = plan.MERGE_TOKEN, plan.MERGE_N_TOKENS, plan.MERGE_SLOT, plan.MERGE_N_SLOTS
    token, n_tokens, first_slot, n_slots = (merges[i, column] for column in columns)
    rows = tile_rows(layout, token, n_tokens, kv_head, row_tile * MERGE_ROWS, MERGE_ROWS)

    n_parts = MERGE_PARTS if layout.head_size <= 128 else MERGE_PARTS // 2

    def add(j, state: Softmax) -> Softmax:
        part = j * n_parts + jnp.arange(n_parts, dtype=jnp.int32)
        is_part = (part < n_slots)[:, None] & rows.is_row[None, :]
        row = row_tile * MERGE_ROWS + jnp.arange(MERGE_ROWS, dtype=jnp.int32)
        first = ((first_slot + part) * layout.n_kv_heads + kv_head) * layout.block_m
        index = first[:, None] + row[None, :]
        tops = pltriton.load(top.at[index], mask=is_part, other=LOWEST)
        totals = pltriton.load(total.at[index], mask=is_part, other=0.0)
        new_top = jnp.maximum(state.top, tops.max(0))
        shrink, grow = jnp.exp2(state.top - new_top), jnp.exp2(tops - new_top[None, :])
        values = load_parts(layout, acc, index, is_part)
        sums = [(value * grow[..., None]).sum(0) for value in values]
        new_acc = tuple(a * shrink[:, None] + b for a, b in zip(state.acc, sums, strict=True))
        return Softmax(new_acc, new_top, state.total * shrink + (totals * grow).sum(0))

    @pl.when(row_tile * MERGE_ROWS < n_tokens * layout.group_size)
    def merge():
        zeros = jnp.zeros(MERGE_ROWS, jnp.float32)
        empty = tuple(jnp.zeros((MERGE_ROWS, width), jnp.float32) for _, width in layout.parts)
        state = Softmax(empty, zeros + LOWEST, zeros)
        state = lax.fori_loop(0, pl.cdiv(n_slots, n_parts), add, state)
        store_rows(layout, out, rows.index, finish(state), rows.is_row)


def _chunk_kernel(_, inputs: Inputs, out, *, layout: Layout):
    kv_head, item = pl.program_id(0), read_item(inputs.items, pl.program_id(1))

    @pl.when(item.n_tokens > 0)
    def run():
        rows = tile_rows(layout, item.token, item.n_tokens, kv_head)
        queries = load_queries(layout, inputs, item, rows)
        state = start(layout, inputs, item, rows)
        state = attend(layout, inputs, item, kv_head, queries, state, tile_spans(layout, item))
        store_rows(layout, out, rows.index, join(layout, finish(state)), rows.is_row)
