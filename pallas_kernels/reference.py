"""The oracle: attention by definition, one sequence after the other, over its whole block table.

Every backend is tested against it. Runs inside and outside jit, in float32; obvious and slow.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.contract import (
    AttentionSpec,
    RaggedMeta,
    check_arguments,
    decode,
    encode,
    quantize,
)


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
) -> tuple[Array, ...]:
    """See contract.RaggedPagedAttention."""
    check_arguments(q, k, v, kv_cache, meta, kv_scales)
    q, k, v, kv_cache, meta, kv_scales = jax.tree.map(
        jnp.asarray, (q, k, v, kv_cache, meta, kv_scales)
    )
    kv_cache, kv_scales = write(k, v, kv_cache, kv_scales, meta.slots)
    token = jnp.arange(len(q))

    def add_sequence(s, out):
        keys, values = _context(kv_cache, kv_scales, meta.block_tables[s])
        key_position = jnp.arange(keys.shape[1])
        is_cached = key_position < meta.seq_lens[s]
        values = jnp.where(is_cached[None, :, None], values, 0.0)  # unused cells may be NaN
        distance = key_position[None, :] - meta.positions[:, None]  # T M
        visible = is_cached[None, :] & (distance <= 0)
        if spec.window is not None:
            visible &= distance > -spec.window
        scores = _scores(q, keys, distance, spec, alibi_slopes)
        result = _softmax(jnp.where(visible, scores, -jnp.inf), sinks) @ _per_query_head(values, q)
        is_owned = (meta.cu_q_lens[s] <= token) & (token < meta.cu_q_lens[s + 1])
        return jnp.where(is_owned[:, None, None], result.transpose(1, 0, 2), out)

    with jax.default_matmul_precision("highest"), jax.numpy_rank_promotion("allow"):
        out = jnp.zeros(q.shape, jnp.float32)
        out = jax.lax.fori_loop(0, meta.n_seqs, add_sequence, out)
    out = out.astype(q.dtype)
    return (out, kv_cache) if kv_scales is None else (out, kv_cache, kv_scales)


def write(
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    kv_cache: Num[Array, "B K 2 C H"],
    kv_scales: Float[Array, "B K 2 C"] | None,
    slots: Int[Array, "T"],
) -> tuple[Num[Array, "B K 2 C H"], Float[Array, "B K 2 C"] | None]:
    """The cache with each token's key and value in its cell; slots past the pool are dropped."""
    n_cells = kv_cache.shape[3]
    index = slots // n_cells, slice(None), slice(None), slots % n_cells
    new = jnp.stack([k, v], axis=2)  # T K 2 H
    if kv_scales is None:
        return kv_cache.at[index].set(encode(new, kv_cache.dtype), mode="drop"), None
    cells, scales = quantize(new, kv_cache.dtype)
    kv_cache = kv_cache.at[index].set(cells, mode="drop")
    return kv_cache, kv_scales.at[index].set(scales.astype(kv_scales.dtype), mode="drop")


def _context(
    kv_cache: Num[Array, "B K 2 C H"],
    kv_scales: Float[Array, "B K 2 C"] | None,
    block_table: Int[Array, "P"],
) -> Float[Array, "2 K M H"]:
    """The keys and values of one sequence in order of position; M = P * C."""
    kv = decode(kv_cache[block_table]).astype(jnp.float32)
    if kv_scales is not None:
        kv = kv * kv_scales[block_table].astype(jnp.float32)[..., None]
    kv = kv.transpose(2, 1, 0, 3, 4)  # 2 K P C H
    return kv.reshape(2, kv.shape[1], -1, kv.shape[4])


def _per_query_head(x: Float[Array, "K M H"], q: Float[Array, "T N H"]) -> Float[Array, "N M H"]:
    return jnp.repeat(x, q.shape[1] // len(x), axis=0)


def _scores(
    q: Float[Array, "T N H"],
    keys: Float[Array, "K M H"],
    distance: Int[Array, "T M"],
    spec: AttentionSpec,
    alibi_slopes: Float[Array, "N"] | None,
) -> Float[Array, "N T M"]:
    queries = q.astype(jnp.float32).transpose(1, 0, 2)  # N T H
    scores = spec.scale * (queries @ _per_query_head(keys, q).transpose(0, 2, 1))
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    if alibi_slopes is not None:
        slopes = jnp.asarray(alibi_slopes, jnp.float32)[:, None, None]
        scores = scores + slopes * distance.astype(jnp.float32)
    return scores


def _softmax(
    scores: Float[Array, "N T M"], sinks: Float[Array, "N"] | None
) -> Float[Array, "N T M"]:
    """Over the last axis, with the sink as one more score; zeros where every score is -inf."""
    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        sinks = jnp.broadcast_to(jnp.asarray(sinks, jnp.float32)[:, None, None], top.shape)
        top = jnp.maximum(top, sinks)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    return weights / jnp.where(total == 0.0, 1.0, total)
