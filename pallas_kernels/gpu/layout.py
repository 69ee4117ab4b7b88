"""What the GPU backends share that is no kernel: static sizes, what is checked, the write of new
tokens. Knows neither Pallas nor Triton, so that each backend outlives the other.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from pallas_kernels.contract import (
    QUANTIZED,
    AttentionSpec,
    RaggedMeta,
    check_heads,
    encode,
    quantize,
)
from pallas_kernels.gpu import plan

LOG2_E = math.log2(math.e)
LOWEST = -1e30  # below every score; finite, so that differences are never NaN
# What cells of a quantised cache are, divided by what the kernels make of them.
FACTORS = {jnp.dtype(jnp.int8): 128.0} | {
    jnp.dtype(float8): 256.0 for float8 in (jnp.float8_e4m3fn, jnp.uint8)
}
MERGE_ROWS = 4  # of a program of a merge


class Inputs(NamedTuple):
    """What a kernel reads: arrays, and inside the kernel their refs. All but `items` are flat."""

    items: Any  # "W 8", see plan.WorkPlan
    tables: Any  # "S * P"
    q: Any  # "T * N * H"
    kv_cache: Any  # "B * K * 2 * C * H", of a quantised cache int16: two cells to a word
    kv_scales: Any = None  # "B * K * 2 * C"
    slopes: Any = None  # "N"
    sinks: Any = None  # "N"


def make_inputs(q, kv_cache, kv_scales, meta: RaggedMeta, alibi_slopes, sinks) -> Inputs:
    """Of the decode kernel; arguments are those of contract.RaggedPagedAttention."""
    return Inputs(
        items=meta.plan.decode,
        tables=meta.block_tables.reshape(-1),
        q=q.reshape(-1),
        kv_cache=kv_cache.reshape(-1),
        kv_scales=None if kv_scales is None else kv_scales.reshape(-1),
        slopes=None if alibi_slopes is None else jnp.asarray(alibi_slopes, jnp.float32),
        sinks=None if sinks is None else jnp.asarray(sinks, jnp.float32),
    )


@dataclass(frozen=True)
class Layout:
    """Static sizes of one kernel."""

    n_heads: int
    n_kv_heads: int
    head_size: int
    n_cells: int
    table_width: int
    dtype: Any  # of the operands of products
    cache_dtype: Any
    spec: AttentionSpec
    interpret: bool = False
    compute_capability: int = 80  # of the GPU, 90 for an H100
    block_m: int = 0  # rows of a query tile
    block_n: int = 0  # cells of a key tile

    @property
    def group_size(self) -> int:
        return self.n_heads // self.n_kv_heads

    @property
    def n_tile_blocks(self) -> int:
        """Blocks of the cache that a tile of keys lies in: one or two; 0 stands for any number."""
        if self.n_cells % self.block_n == 0:
            return 1
        return 2 if self.n_cells * 2 == self.block_n else 0

    @property
    def parts(self) -> list[tuple[int, int]]:
        """(offset, width) of the parts of a head."""
        parts, start = [], 0
        while start < self.head_size:
            width = 1 << (self.head_size - start).bit_length() - 1
            parts.append((start, width))
            start += width
        return parts

    def is_halved(self, width: int) -> bool:
        """Whether a part is two operands of products, even and odd columns, which are the low and
        high bytes of a quantised cache's words; products need 16 columns.
        """
        return self.cache_dtype in QUANTIZED and width >= 32

    @property
    def operand_widths(self) -> list[int]:
        halved = [(width, self.is_halved(width)) for _, width in self.parts]
        return [w for width, half in halved for w in ([width // 2] * 2 if half else [width])]


def make_layout(
    q: Float[Array, "T N H"],
    kv_cache: Num[Array, "B K 2 C H"],
    meta: RaggedMeta,
    spec: AttentionSpec,
    *,
    interpret: bool = False,
    compute_capability: int = 80,
) -> Layout:
    """Without tiles."""
    return Layout(
        n_heads=q.shape[1],
        n_kv_heads=kv_cache.shape[1],
        head_size=q.shape[2],
        n_cells=kv_cache.shape[3],
        table_width=meta.block_tables.shape[1],
        dtype=operand_dtype(q.dtype, kv_cache.dtype),
        cache_dtype=kv_cache.dtype,
        spec=spec,
        interpret=interpret,
        compute_capability=compute_capability,
    )


def operand_dtype(q_dtype, cache_dtype):
    """What products are made of: a dtype that holds queries and cells without loss.

    Quantised cells become float16 with the fewest operations, and bfloat16 queries fit into it once
    their rows are scaled.
    """
    if cache_dtype in QUANTIZED:
        return jnp.dtype(jnp.float32 if q_dtype == jnp.float32 else jnp.float16)
    if cache_dtype == jnp.uint16:
        cache_dtype = jnp.dtype(jnp.bfloat16)
    return q_dtype if cache_dtype == q_dtype else jnp.dtype(jnp.float32)


AnyLayout = TypeVar("AnyLayout", bound=Layout)


def tiled(layout: AnyLayout, block_m: int) -> AnyLayout:
    """The layout with tiles of block_m rows and as many cells as registers and shared memory hold:
    at most 32 KiB of keys and values, three of which an A100 has room for. A Hopper GPU reads the
    operands of products from shared memory, so that its registers hold the scores of twice as many.
    """
    block_n = 64 if layout.head_size <= 128 else 32
    if layout.dtype == jnp.float32:  # products without matrix units, in registers
        block_n = block_n // 2 if block_m <= 16 else block_n // 4
    elif is_hopper_chunk(layout, block_m):
        block_n = 128
    return dataclasses.replace(layout, block_m=block_m, block_n=block_n)


def is_hopper_chunk(layout: Layout, block_m: int) -> bool:
    """Whether tiles of so many rows are multiplied from shared memory as they were loaded, which
    compute capability 9 does; a soft cap takes the registers that this leaves.
    """
    is_plain = layout.cache_dtype not in QUANTIZED and layout.dtype != jnp.float32
    is_hopper = layout.compute_capability // 10 == 9 and layout.spec.soft_cap is None
    return is_hopper and is_plain and block_m >= 128 and layout.head_size <= 128


def warps_and_stages(layout: Layout) -> dict[str, int]:
    """Of a kernel of these tiles, by the names that both compilers have for them."""
    is_large = layout.block_m > 64 or layout.block_m * layout.head_size > 64 * 128
    n_warps, n_stages = 8 if is_large else 4, 3
    if is_hopper_chunk(layout, layout.block_m):
        n_stages = 2
    if layout.dtype == jnp.float32:
        n_warps, n_stages = 2 * n_warps if layout.block_m > 16 else n_warps, 2
    return {"num_warps": n_warps, "num_stages": n_stages}


def check_plan(backend: str, q, kv_cache, meta: RaggedMeta) -> None:
    """Raises ValueError for sizes that the kernels do not take, or a meta without a plan."""
    group_size = q.shape[1] // kv_cache.shape[1]
    check_heads(backend, head_size=q.shape[2], group_size=group_size, dtype=q.dtype)
    if not isinstance(meta.plan, plan.WorkPlan):
        raise ValueError(f"{backend} needs meta.plan, see pallas_kernels.plan_sizes")
    if any(array.dtype != jnp.int32 for array in meta.plan):
        raise ValueError(f"a plan of {[array.dtype for array in meta.plan]}: int32 is needed")


def write(
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    kv_cache: Num[Array, "B K 2 C H"],
    kv_scales: Float[Array, "B K 2 C"] | None,
    meta: RaggedMeta,
) -> tuple[Num[Array, "B K 2 C H"], Float[Array, "B K 2 C"] | None]:
    """The cache and its scales with each token's key and value; padding tokens are dropped."""
    n_blocks, _, _, n_cells, _ = kv_cache.shape
    token = jnp.arange(len(k), dtype=jnp.int32)
    is_padding = token >= meta.cu_q_lens[-1]
    # Padding tokens get slots past the pool: dropped, and no two tokens have one slot.
    slots = jnp.where(is_padding, n_blocks * n_cells + token, meta.slots)
    at = slots // n_cells, slice(None), slice(None), slots % n_cells
    new = jnp.stack([k, v], axis=2)  # T K 2 H
    if kv_scales is None:
        cells = encode(new, kv_cache.dtype)
    else:
        cells, scales = quantize(new, kv_cache.dtype)
        scales = scales.astype(kv_scales.dtype)
        kv_scales = kv_scales.at[at].set(scales, mode="drop", unique_indices=True)
    return kv_cache.at[at].set(cells, mode="drop", unique_indices=True), kv_scales
