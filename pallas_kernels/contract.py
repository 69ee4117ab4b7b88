"""The attention contract that every backend implements: a ragged batch's arrays, the static spec,
how a KV cache is stored.

Dim letters: T tokens in the batch, S sequences, P blocks per sequence, B blocks in the pool,
C cells per block, N query heads, K KV heads, H head size. 'Page' in the literature is our block.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num


class RaggedMeta(NamedTuple):
    """Which tokens belong to which sequence and where their KV cells are; all int32.

    Sequences that owe one token come first, `n_single` of them, so that token t < n_single is
    sequence t. Rows of sequences >= n_seqs and tokens >= cu_q_lens[n_seqs] are padding: zeros are
    valid values for them. A token's position is seq_len - (cu_q_lens' difference) + its index.
    Block 0 of the pool is scratch: padding tokens write there, no sequence owns it.
    """

    positions: Int[Array, "T"]  # of each token in its sequence
    slots: Int[Array, "T"]  # block * C + cell of each token's KV; padding: cells of block 0
    block_tables: Int[Array, "S P"]
    seq_lens: Int[Array, "S"]  # cached + new tokens; 0 for padding rows
    cu_q_lens: Int[Array, "S+1"]  # new tokens before each sequence; constant after n_seqs
    n_seqs: Int[Array, ""]
    n_single: Int[Array, ""]
    plan: Any = None  # the host's division of the work, for backends that have `plan_sizes`


@dataclass(frozen=True)
class AttentionSpec:
    """Static choices of one layer's attention. Hashable: part of the compiled program's key."""

    scale: float  # of q . k, before the soft cap
    window: int | None = None  # a token sees itself and window - 1 before it
    soft_cap: float | None = None  # scores become cap * tanh(scores / cap), before the mask

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")


class RaggedPagedAttention(Protocol):
    """Writes this step's keys and values into the cache, attends to all that each token may see.

    Args:
        q: queries, rotary applied.
        k, v: this step's new tokens, rotary applied to k.
        kv_cache: one layer's pool "B K 2 C H" ("B K 2 H C" for pallas_tpu: see `cache_shape`);
            donated by the jitted caller and returned updated. Its dtype is `cache_dtype(...)`, of
            a quantised cache, int8 or float8_e4m3fn, with `kv_scales`. Cells that hold no cached
            token may hold anything, NaN included. At most MAX_CACHE_SIZE elements.
        meta: see RaggedMeta.
        spec: see AttentionSpec.
        alibi_slopes: per query head; adds slope * (key position - query position) to the scores,
            after the soft cap.
        sinks: per query head; adds exp(sink) to the softmax denominator only.
        kv_scales: of a quantised cache: the key or value of a token and head is its cell times this
            (see `quantize`); donated and updated like the cache. As the cache, it may hold anything
            where no token is cached.

    A call may change cells behind a sequence's last token in its own blocks.

    Returns:
        out "T N H" in q's dtype, softmax in float32; padding tokens' rows are zeros. And the cache;
        with kv_scales also those: (out, kv_cache, kv_scales).
    """

    def __call__(
        self,
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
    ) -> tuple[Array, ...]: ...


MAX_CACHE_SIZE = 2**31 - 1  # elements of one layer's cache: kernels address cells with 32 bits
TINY = 1e-30  # keys and values that are smaller throughout become zeros: their scale would too
MAX_GROUP_SIZE = 128  # query heads per KV head on GPUs: rows of one tile
QUANTIZED = {  # largest cell
    jnp.dtype(jnp.int8): 127.0,
    jnp.dtype(jnp.float8_e4m3fn): 448.0,
    jnp.dtype(jnp.uint8): 448.0,  # float8_e4m3fn in bits, see cache_dtype
}
IN_BITS = {jnp.dtype(jnp.uint16): jnp.bfloat16, jnp.dtype(jnp.uint8): jnp.float8_e4m3fn}


def cache_shape(
    backend: str, *, n_blocks: int, n_kv_heads: int, block_size: int, head_size: int
) -> tuple[int, ...]:
    """Of one layer's cache. On TPU cells are lanes, so that no head size needs padding there.

    Raises:
        ValueError: the cache is too large, or a block size that the backend does not take.
    """
    check_block_size(backend, block_size)
    tile = (head_size, block_size) if backend == "pallas_tpu" else (block_size, head_size)
    shape = (n_blocks, n_kv_heads, 2, *tile)
    if math.prod(shape) > MAX_CACHE_SIZE:
        raise ValueError(
            f"a KV cache of {n_blocks} blocks has {math.prod(shape)} elements per layer; at most "
            f"{MAX_CACHE_SIZE} fit: use {MAX_CACHE_SIZE // math.prod(shape[1:])} blocks"
        )
    return shape


def check_block_size(backend: str, n_cells: int) -> None:
    """Raises ValueError for blocks that the backend does not take."""
    if backend == "pallas_tpu" and n_cells != 128:
        raise ValueError(f"pallas_tpu has blocks of 128 cells, not {n_cells}; use block_size=128")
    if backend == "mosaic_gpu" and (n_cells % 8 or (n_cells % 128 and 128 % n_cells)):
        raise ValueError(
            f"mosaic_gpu has blocks of 8, 16, 32, 64 or n * 128 cells, not {n_cells}; "
            "use block_size=64"
        )


def check_heads(
    backend: str, *, head_size: int, group_size: int, dtype: Any, cache_dtype: Any = None
) -> None:
    """Raises ValueError for queries, and a KV cache, that the backend does not take.

    group_size: query heads per KV head.
    cache_dtype: None: the queries' dtype.
    """
    if backend in ("pallas_gpu", "jax_triton") and (head_size % 16 or group_size > MAX_GROUP_SIZE):
        raise ValueError(
            f"head size {head_size} with {group_size} query heads per KV head: {backend} has head "
            f"sizes that 16 divides and at most {MAX_GROUP_SIZE} query heads per KV head"
        )
    if backend == "mosaic_gpu":
        _check_wgmma(head_size, group_size, dtype, dtype if cache_dtype is None else cache_dtype)
    if backend == "pallas_tpu" and dtype == jnp.float16:
        raise ValueError("pallas_tpu: TPUs have no float16; use bfloat16")


def _check_wgmma(head_size: int, group_size: int, dtype: Any, cache_dtype: Any) -> None:
    if head_size not in (64, 128) or group_size not in (1, 2, 4, 8, 16):
        raise ValueError(
            f"head size {head_size} with {group_size} query heads per KV head: mosaic_gpu has head "
            "sizes 64 and 128, and 1, 2, 4, 8 or 16 query heads per KV head; use pallas_gpu"
        )
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        raise ValueError(f"mosaic_gpu has bfloat16 and float16, not {dtype}; use pallas_gpu")
    if jnp.dtype(cache_dtype) != jnp.dtype(dtype):
        raise ValueError(
            f"mosaic_gpu takes a KV cache of the queries' {jnp.dtype(dtype)}, not of "
            f"{jnp.dtype(cache_dtype)}; "
            "pallas_gpu takes both"
        )


def quantize(
    x: Float[Array, "*dims H"], dtype
) -> tuple[Num[Array, "*dims H"], Float[Array, "*dims"]]:
    """Cells and scales of keys or values: one scale per token and head, x = cell * scale.

    No scale is finite where x is not, so that what is read again is not finite either.
    """
    dtype = jnp.dtype(dtype)
    x = x.astype(jnp.float32)
    top = jnp.abs(x).max(-1)
    scale = jnp.where(top > TINY, top / QUANTIZED[dtype], 1.0)
    scale = jnp.where(jnp.isfinite(x).all(-1), scale, jnp.nan)  # XLA:CPU's max may lose a NaN
    cells = x / scale[..., None]
    if dtype == jnp.int8:
        cells = jnp.round(cells)
    return encode(cells, dtype), scale


def cache_dtype(dtype: str, platform: str) -> str:
    """How a KV cache of `dtype` is stored: on CPU those of IN_BITS as their bits.

    XLA:CPU has no scatter of them: it would convert the whole pool to float32 and back.
    """
    in_bits = {jnp.dtype(dtype).name: bits.name for bits, dtype in IN_BITS.items()}
    return in_bits.get(dtype, dtype) if platform == "cpu" else dtype


def encode(x: Float[Array, "*dims"], dtype) -> Num[Array, "*dims"]:
    """Keys or values as a cache of `dtype` stores them."""
    dtype = jnp.dtype(dtype)
    if dtype in IN_BITS:
        return lax.bitcast_convert_type(x.astype(IN_BITS[dtype]), dtype)
    return x.astype(dtype)


def decode(cells: Num[Array, "*dims"]) -> Float[Array, "*dims"]:
    """Keys or values that a cache stores as `cells`; if it is quantised, without their scales."""
    if cells.dtype in IN_BITS:
        return lax.bitcast_convert_type(cells, IN_BITS[cells.dtype])
    return cells


def check_arguments(q, k, v, kv_cache, meta: RaggedMeta, kv_scales, *, cells_last=False) -> None:
    """Raises ValueError for shapes that do not fit each other: static, so free at run time.

    cells_last: the cache is "B K 2 H C".
    """
    n_blocks, n_kv_heads, two, n_cells, head_size = kv_cache.shape
    if cells_last:
        n_cells, head_size = head_size, n_cells
    if two != 2 or not k.shape == v.shape == (len(q), n_kv_heads, head_size):
        raise ValueError(
            f"k {k.shape} and v {v.shape} do not fit q {q.shape} and the cache {kv_cache.shape}"
        )
    if kv_cache.size > MAX_CACHE_SIZE:
        raise ValueError(f"a cache of {kv_cache.size} elements: at most {MAX_CACHE_SIZE} fit")
    if q.shape[2] != head_size or q.shape[1] % n_kv_heads:
        raise ValueError(f"q {q.shape} does not fit {n_kv_heads} KV heads of size {head_size}")
    n_tokens, n_rows = len(q), len(meta.block_tables)
    shapes = meta.positions.shape, meta.slots.shape, meta.seq_lens.shape, meta.cu_q_lens.shape
    if shapes != ((n_tokens,), (n_tokens,), (n_rows,), (n_rows + 1,)):
        raise ValueError(f"meta of shapes {shapes} does not fit T={n_tokens}, S={n_rows}")
    if (kv_cache.dtype in QUANTIZED) != (kv_scales is not None):
        raise ValueError(f"a cache of {kv_cache.dtype} with kv_scales={kv_scales is not None}")
    if kv_scales is not None and kv_scales.shape != (n_blocks, n_kv_heads, 2, n_cells):
        raise ValueError(f"kv_scales {kv_scales.shape} do not fit the cache {kv_cache.shape}")
