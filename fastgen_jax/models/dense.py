"""Attention of whole rows of tokens, dense and differentiable: the trainer's twin of the engine's
paged attention, with the semantics of pallas_kernels/reference.py.

Both passes go over chunks of queries and, for each, of keys, and keep the scores' logarithmic sums
only (Dao et al., FlashAttention, 2022): memory grows with the length of a row, not with its square.
Barriers keep XLA:CPU from fusing products with what surrounds them, which runs them more slowly.
"""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import optimization_barrier as barrier
from jaxtyping import Array, Float, Int

from fastgen_jax.errors import ConfigError
from fastgen_jax.models.layers import Attend
from pallas_kernels import AttentionSpec

Implementation = Literal["chunked", "xla", "cudnn"]
CHUNK = 128  # tokens
HIDDEN = -1e30  # a score that weighs nothing


def dense_attend(
    n_rows: int, segment_ids: Int[Array, "B T"] | None, implementation: Implementation = "chunked"
) -> Attend:
    """Attention of each token to those before it in its row, and of them to its segment only.

    Args:
        n_rows: B. The attend's queries, keys and values are flat: "B*T N H".
        implementation: "chunked", this file's; "xla" or "cudnn", jax.nn.dot_product_attention's,
            which know neither soft caps nor sinks nor ALiBi. "cudnn" wants bfloat16 or float16.

    Raises:
        ConfigError: an implementation that is not known or does not know what a layer needs.
    """
    if implementation not in get_args(Implementation):
        known = ", ".join(get_args(Implementation))
        raise ConfigError(f"attention={implementation!r} is not known; known: {known}")

    def attend(q, k, v, cache, *, spec, alibi_slopes=None, sinks=None):
        q, k, v = (x.reshape(n_rows, -1, *x.shape[1:]) for x in (q, k, v))
        if implementation == "chunked":
            out = _chunked(q, k, v, segment_ids, spec, alibi_slopes, sinks)
        else:
            if spec.soft_cap is not None or alibi_slopes is not None or sinks is not None:
                raise ConfigError(
                    f"attention={implementation!r} has neither soft caps nor sinks nor ALiBi, and "
                    'this model needs one of them; use attention="chunked"'
                )
            out = _by_library(q, k, v, segment_ids, spec, implementation)
        return out.reshape(-1, *out.shape[2:]), cache

    return attend


def _by_library(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None,
    spec: AttentionSpec,
    implementation: Literal["xla", "cudnn"],
) -> Float[Array, "B T N H"]:
    mask = (
        None if segment_ids is None else segment_ids[:, None, :, None] == segment_ids[:, None, None]
    )
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        scale=spec.scale,
        is_causal=True,
        local_window_size=None if spec.window is None else (spec.window - 1, 0),
        implementation=implementation,
    )


def _chunked(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None,
    spec: AttentionSpec,
    alibi_slopes: Float[Array, "N"] | None,
    sinks: Float[Array, "N"] | None,
) -> Float[Array, "B T N H"]:
    n_tokens, n_kv_heads = q.shape[1], k.shape[2]
    size = min(n_tokens, CHUNK)
    n_chunks = -(-n_tokens // size)

    def chunks(x: Array) -> Array:
        missing = [(0, 0)] * x.ndim
        missing[1] = (0, n_chunks * size - n_tokens)  # behind all queries, so none sees them
        x = jnp.pad(x, missing)
        return x.reshape(len(x), n_chunks, size, *x.shape[2:]).swapaxes(0, 1)

    q = chunks(q).reshape(n_chunks, len(q), size, n_kv_heads, -1, q.shape[3])
    q = q.transpose(0, 1, 3, 4, 2, 5)
    k, v = (chunks(x).swapaxes(2, 3) for x in (k, v))
    segment_ids = None if segment_ids is None else chunks(segment_ids)

    def of_heads(x: Array | None) -> Array | None:
        return None if x is None else x.astype(jnp.float32).reshape(1, n_kv_heads, -1, 1, 1)

    slopes, sinks = of_heads(alibi_slopes), of_heads(sinks)
    out: Array = _attention(spec, q, k, v, segment_ids, slopes, sinks)
    out = out.transpose(1, 0, 4, 2, 3, 5)  # B I Q K G H
    return out.reshape(len(out), n_chunks * size, -1, out.shape[-1])[:, :n_tokens]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    spec: AttentionSpec,
    q: Float[Array, "I B K G Q H"],
    k: Float[Array, "I B K Q H"],
    v: Float[Array, "I B K Q H"],
    segment_ids: Int[Array, "I B Q"] | None,
    slopes: Float[Array, "1 K G 1 1"] | None,
    sinks: Float[Array, "1 K G 1 1"] | None,
) -> Float[Array, "I B K G Q H"]:
    """Of I chunks. Slopes have no gradient: they are constants of a config."""
    return _forward(spec, q, k, v, segment_ids, slopes, sinks)[0]


def _forward(spec, q, k, v, segment_ids, slopes, sinks):
    q, k, v = barrier((q, k, v))

    def attend(i, queries):
        def add(j, state):
            top, total, out = state
            scores, _ = _scores(spec, queries, k[j], i, j, segment_ids, slopes)
            new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
            weights, shrink = jnp.exp(scores - new_top), jnp.exp(top - new_top)
            own = _product("bkgqs,bksh->bkgqh", weights.astype(v.dtype), v[j])
            total = total * shrink + weights.sum(-1, keepdims=True)
            return new_top, total, out * shrink + own

        top = jnp.full((*queries.shape[:-1], 1), HIDDEN, jnp.float32)
        total = jnp.zeros_like(top)
        if sinks is not None:
            top, total = jnp.broadcast_to(sinks, top.shape), jnp.ones_like(top)
        start = top, total, jnp.zeros(queries.shape, jnp.float32)
        first = _first_chunk(spec, i, queries.shape[-2])
        top, total, out = lax.fori_loop(first, i + 1, add, start)
        return i + 1, ((out / total).astype(queries.dtype), top + jnp.log(total))

    _, (out, logs) = lax.scan(attend, jnp.int32(0), q)
    return out, (q, k, v, segment_ids, slopes, sinks, out, logs)


def _backward(spec, saved, d_out):
    q, k, v, segment_ids, slopes, sinks, out, logs = saved
    inner = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    d_out = barrier(d_out.astype(v.dtype))

    def attend(state, chunk):
        i, d_k, d_v = state
        queries, d_out, inner, logs = chunk

        def add(j, state):
            d_q, d_k, d_v = state
            scores, slope = _scores(spec, queries, k[j], i, j, segment_ids, slopes)
            weights = jnp.exp(scores - logs)
            d_weights = _product("bkgqh,bksh->bkgqs", d_out, v[j])
            d_scores = (weights * (d_weights - inner) * slope).astype(q.dtype)
            weights = weights.astype(v.dtype)
            d_q = d_q + _product("bkgqs,bksh->bkgqh", d_scores, k[j])
            d_k = d_k.at[j].add(_product("bkgqs,bkgqh->bksh", d_scores, queries))
            return d_q, d_k, d_v.at[j].add(_product("bkgqs,bkgqh->bksh", weights, d_out))

        start = jnp.zeros(queries.shape, jnp.float32), d_k, d_v
        first = _first_chunk(spec, i, queries.shape[-2])
        d_q, d_k, d_v = lax.fori_loop(first, i + 1, add, start)
        return (i + 1, d_k, d_v), d_q.astype(q.dtype)

    start = jnp.int32(0), jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (_, d_k, d_v), d_q = lax.scan(attend, start, (q, d_out, inner, logs))
    d_sinks = None
    if sinks is not None:
        d_sinks = -(jnp.exp(sinks[None] - logs) * inner).sum((0, 1, 4), keepdims=True)[0]
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None, None, d_sinks


_attention.defvjp(_forward, _backward)


def _first_chunk(spec: AttentionSpec, i: Int[Array, ""], size: int) -> Int[Array, ""]:
    """Of keys that a query of chunk i may see."""
    if spec.window is None:
        return jnp.int32(0)
    return jnp.maximum(i * size - spec.window + 1, 0) // size


def _scores(
    spec: AttentionSpec,
    queries: Float[Array, "B K G Q H"],
    keys: Float[Array, "B K Q H"],
    i: Int[Array, ""],
    j: Int[Array, ""],
    segment_ids: Int[Array, "I B Q"] | None,
    slopes: Float[Array, "1 K G 1 1"] | None,
) -> tuple[Float[Array, "B K G Q Q"], Float[Array, "B K G Q Q"] | float]:
    """Of the queries of chunk i and the keys of chunk j; and their derivative by q . k."""
    scores, slope = _product("bkgqh,bksh->bkgqs", queries, keys) * spec.scale, spec.scale
    if spec.soft_cap is not None:
        bent = jnp.tanh(scores / spec.soft_cap)
        scores, slope = spec.soft_cap * bent, spec.scale * (1 - bent * bent)
    size = keys.shape[2]
    place = lax.iota(jnp.int32, size)
    distance = place[None] - place[:, None] + (j - i) * size  # of a key from a query
    if slopes is not None:
        scores = scores + slopes * distance.astype(jnp.float32)[None, None, None]
    visible = distance <= 0
    if spec.window is not None:
        visible &= distance > -spec.window
    visible = visible[None]
    if segment_ids is not None:
        visible &= segment_ids[i][:, :, None] == segment_ids[j][:, None]
    return jnp.where(visible[:, None, None], scores, HIDDEN), slope


def _product(indices: str, a: Array, b: Array) -> Array:
    return barrier(jnp.einsum(indices, a, b, preferred_element_type=jnp.float32))
