"""The attention contract that every backend implements: a ragged batch's arrays, the static spec.

Dim letters: T tokens in the batch, S sequences, P blocks per sequence, B blocks in the pool,
C cells per block, N query heads, K KV heads, H head size. 'Page' in the literature is our block.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

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
        kv_cache: one layer's pool "B K 2 C H" (CPU, GPU layout); donated by the jitted caller and
            returned updated. Its dtype is `cache_dtype(...)`. Cells that hold no cached token may
            hold anything, NaN included.
        meta: see RaggedMeta.
        spec: see AttentionSpec.
        alibi_slopes: per query head; adds slope * (key position - query position) to the scores,
            after the soft cap.
        sinks: per query head; adds exp(sink) to the softmax denominator only.

    Returns:
        out "T N H" in q's dtype, softmax in float32; padding tokens' rows are zeros. And the cache.
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
    ) -> tuple[Float[Array, "T N H"], Num[Array, "B K 2 C H"]]: ...


def cache_dtype(dtype: str, platform: str) -> str:
    """How a KV cache of `dtype` is stored: bfloat16 as its bits in uint16 on CPU.

    XLA:CPU has no scatter of bfloat16: it would convert the whole pool to float32 and back.
    """
    return "uint16" if platform == "cpu" and dtype == "bfloat16" else dtype


def encode(x: Float[Array, "*dims"], dtype) -> Num[Array, "*dims"]:
    """Keys or values as a cache of `dtype` stores them."""
    if dtype == jnp.uint16:
        return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return x.astype(dtype)


def decode(cells: Num[Array, "*dims"]) -> Float[Array, "*dims"]:
    """Keys or values that a cache stores as `cells`."""
    if cells.dtype == jnp.uint16:
        return lax.bitcast_convert_type(cells, jnp.bfloat16)
    return cells


def check_arguments(q, k, v, kv_cache, meta: RaggedMeta, kv_scales) -> None:
    """Raises ValueError for shapes that do not fit each other: static, so free at run time."""
    if kv_scales is not None:
        raise NotImplementedError("quantised KV (kv_scales) is not supported by this backend")
    n_kv_heads, two, _, head_size = kv_cache.shape[1:]
    if two != 2 or not k.shape == v.shape == (len(q), n_kv_heads, head_size):
        raise ValueError(
            f"k {k.shape} and v {v.shape} do not fit q {q.shape} and the cache {kv_cache.shape}"
        )
    if q.shape[2] != head_size or q.shape[1] % n_kv_heads:
        raise ValueError(f"q {q.shape} does not fit {n_kv_heads} KV heads of size {head_size}")
    n_tokens, n_rows = len(q), len(meta.block_tables)
    shapes = meta.positions.shape, meta.slots.shape, meta.seq_lens.shape, meta.cu_q_lens.shape
    if shapes != ((n_tokens,), (n_tokens,), (n_rows,), (n_rows + 1,)):
        raise ValueError(f"meta of shapes {shapes} does not fit T={n_tokens}, S={n_rows}")
