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

from fastgen_jax.errors import ConfigError
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.kv_cache import CacheLayout, attend
from fastgen_jax.models.layers import Cache
from fastgen_jax.models.sharding import make_mesh
from pallas_kernels import RaggedMeta, RaggedPagedAttention, select

BACKEND = "invariant"  # the attention backend whose rows do not depend on each other
BLOCK_SIZE = 64  # cells; any that divides the backend's tile of keys gives the same bits


def row_tile(platform: str) -> int:
    """Tokens that the model sees at once: few where products wait for arithmetic, as on CPU."""
    return 32 if platform == "cpu" else 128


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
        attending = partial(attend, attention, meta)
        return model.hidden_states(ids, meta.positions, caches, attending, layers)

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


@jax.custom_vjp
def logprobs_by_tiles(model: Any, tokens: Int[Array, "B T"]) -> Float[Array, "B T-1"]:
    """Of each token but the first, after those before it in its row: what a deterministic engine
    says, bit for bit, unless its KV cache is quantised. The gradient is that of the dense forward.

    Raises:
        ConfigError: the model is on several devices.
    """
    policy, n_rows = model.embed.policy, row_tile(jax.default_backend())
    if policy.n_shards > 1:
        raise ConfigError(f"logprobs_by_tiles: one device is needed, not {policy.n_shards}")
    n_seqs, length = tokens.shape
    meta = whole_rows(n_seqs, length, n_rows)
    n_missing = len(meta.positions) - tokens.size
    ids, following = (
        jnp.pad(x.reshape(-1), (0, n_missing)) for x in (tokens, jnp.roll(tokens, -1, axis=1))
    )
    attention = jax.jit(select(BACKEND), static_argnames="spec")  # layers share one trace
    caches = _empty_caches(model.config, policy.weights, 1 + meta.block_tables.size)
    hidden, _ = by_tiles(model, attention, ids, caches, meta, n_rows=n_rows)

    def score(rows: tuple[Float[Array, "R D"], Int[Array, "R"]]) -> Float[Array, "R"]:
        logits = model.unembed(rows[0])
        normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return (jnp.take_along_axis(logits, rows[1][:, None], axis=1) - normaliser)[:, 0]

    tiles = hidden.reshape(-1, n_rows, hidden.shape[1]), following.reshape(-1, n_rows)
    found = lax.map(score, tiles).reshape(-1)[: tokens.size]
    return found.reshape(tokens.shape)[:, :-1]


def _empty_caches(config: ModelConfig, dtype: str, n_blocks: int) -> tuple[Cache, ...]:
    layout = CacheLayout.of(config, backend=BACKEND, dtype=dtype, block_size=BLOCK_SIZE)
    arrays = layout.absent(n_blocks, make_mesh(1))
    empty = jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), arrays)
    return (empty,) * config.n_layers


def whole_rows(n_seqs: int, length: int, n_rows: int) -> RaggedMeta:
    """The batch of so many sequences of one length, each with blocks of its own."""
    place = jnp.arange(length, dtype=jnp.int32)
    n_blocks = -(-length // BLOCK_SIZE)
    tables = 1 + jnp.arange(n_seqs * n_blocks, dtype=jnp.int32).reshape(n_seqs, n_blocks)
    slots = tables[:, place // BLOCK_SIZE] * BLOCK_SIZE + (place % BLOCK_SIZE)[None]
    n_missing = -(n_seqs * length) % n_rows
    return RaggedMeta(
        positions=jnp.pad(jnp.tile(place, n_seqs), (0, n_missing)),
        slots=jnp.pad(slots.reshape(-1), (0, n_missing)),
        block_tables=tables,
        seq_lens=jnp.full(n_seqs, length, jnp.int32),
        cu_q_lens=jnp.arange(n_seqs + 1, dtype=jnp.int32) * length,
        n_seqs=jnp.int32(n_seqs),
        n_single=jnp.int32(0),
    )


def _forward(model, tokens):
    return logprobs_by_tiles(model, tokens), (model, tokens)


def _backward(saved, d_logprobs):
    model, tokens = saved

    def dense(model):
        logprobs = jax.nn.log_softmax(model(tokens)[:, :-1], axis=2)
        return jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=2)[:, :, 0]

    _, pull = jax.vjp(dense, model)
    return *pull(d_logprobs), None


logprobs_by_tiles.defvjp(_forward, _backward)
