"""The model, a fixed number of tokens at a time. What comes of a token is then a function of its
own sequence alone, bit for bit, if attention's rows are so too (pallas_kernels.invariant).

One loop body serves every batch. So no size that depends on the batch reaches a compiler: products,
norms, experts and attention always see as many rows, of which some may be padding.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fastgen_jax.models.layers import Cache
from pallas_kernels import RaggedMeta, RaggedPagedAttention


def by_tiles(
    model: Any,
    attention: RaggedPagedAttention,
    token_ids: Int[Array, "T"],
    caches: tuple[Cache, ...],
    meta: RaggedMeta,
    *,
    n_rows: int,
    layers: tuple[int, ...] = (),
) -> tuple[Float[Array, "T *L D"], tuple[Cache, ...]]:
    """Model.hidden_states of a ragged batch, made of n_rows tokens at a time, and the caches.

    A later tile of a sequence finds the earlier ones' keys and values in its cache. Tiles without
    a token are not computed; their rows are zeros.

    Args:
        token_ids: n_rows divides their number.
    """
    n_tokens = len(token_ids)
    assert n_tokens % n_rows == 0, (n_tokens, n_rows)

    def run(ids: Int[Array, "R"], caches: tuple[Cache, ...], meta: RaggedMeta):
        attend = partial(_attend, attention, meta)
        return model.hidden_states(ids, meta.positions, caches, attend, layers)

    def body(i, carry):
        hidden, caches = carry
        start = i * n_rows
        ids = lax.dynamic_slice_in_dim(token_ids, start, n_rows)
        rows, caches = run(ids, caches, cut(meta, start, n_rows))
        return lax.dynamic_update_slice_in_dim(hidden, rows, start, axis=0), caches

    row, _ = jax.eval_shape(run, token_ids[:n_rows], caches, cut(meta, 0, n_rows))
    hidden = jnp.zeros((n_tokens, *row.shape[1:]), row.dtype)
    n_tiles = (meta.cu_q_lens[-1] + n_rows - 1) // n_rows
    return lax.fori_loop(0, n_tiles, body, (hidden, caches))


def _attend(attention: RaggedPagedAttention, meta: RaggedMeta, q, k, v, cache, **options):
    with jax.named_scope("attention"):
        return attention(q, k, v, cache, meta, **options)


def cut(meta: RaggedMeta, start: Int[Array, ""] | int, n_tokens: int) -> RaggedMeta:
    """The part of a ragged batch that tokens start, start + 1, ... are; sequences may have none."""
    ends = meta.cu_q_lens[1:]
    n_later = jnp.clip(ends - (start + n_tokens), 0, jnp.diff(meta.cu_q_lens))
    return meta._replace(
        positions=lax.dynamic_slice_in_dim(meta.positions, start, n_tokens),
        slots=lax.dynamic_slice_in_dim(meta.slots, start, n_tokens),
        seq_lens=meta.seq_lens - n_later,
        cu_q_lens=jnp.clip(meta.cu_q_lens - start, 0, n_tokens),
        n_single=jnp.zeros_like(meta.n_single),
    )
