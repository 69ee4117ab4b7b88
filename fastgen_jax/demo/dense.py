"""Attention over whole texts at once, for training: the dense twin of the engine's paged attention.

Barriers keep XLA:CPU from fusing products with what surrounds them: with the backward pass written
out, attention takes a fifth of the time that `jax.grad` of the plain formula takes.
"""

import jax
import jax.numpy as jnp
from jax.lax import optimization_barrier as barrier
from jaxtyping import Array, Float, Int

from fastgen_jax.models.layers import Attend

QUERY_CHUNK = 256


@jax.custom_vjp
def attention(
    q: Float[Array, "B K Q H"], k: Float[Array, "B K L H"], v: Float[Array, "B K L H"], bias
) -> Float[Array, "B K Q H"]:
    """softmax(q k + bias) v, the queries of a group one after the other: Q = G * (rows of bias)."""
    return _attention_forward(q, k, v, bias)[0]


def _attention_forward(q, k, v, bias):
    scores = barrier(jnp.einsum("bkqh,bksh->bkqs", q, k))
    shape = scores.shape
    scores = scores.reshape(*shape[:2], -1, *bias.shape[1:]) + bias[:, None, None]
    weights = barrier(jax.nn.softmax(scores, axis=-1)).reshape(shape)
    out = barrier(jnp.einsum("bkqs,bksh->bkqh", weights, v))
    return out, (q, k, v, weights, out)


def _attention_backward(saved, d_out):
    q, k, v, weights, out = saved
    d_v = barrier(jnp.einsum("bkqs,bkqh->bkhs", weights, d_out)).swapaxes(2, 3)
    d_weights = barrier(jnp.einsum("bkqh,bksh->bkqs", d_out, v))
    d_scores = barrier(weights * (d_weights - jnp.sum(d_out * out, -1, keepdims=True)))
    d_q = barrier(jnp.einsum("bkqs,bksh->bkqh", d_scores, k))
    d_k = barrier(jnp.einsum("bkqs,bkqh->bkhs", d_scores, q)).swapaxes(2, 3)
    return d_q, d_k, d_v, None


attention.defvjp(_attention_forward, _attention_backward)


def causal_attention(segments: Int[Array, "B L"]) -> Attend:
    """Attention of each token to its own text so far, over chunks of queries."""
    n_rows, length = segments.shape
    starts = range(0, length, QUERY_CHUNK)
    biases = [_mask_bias(segments, start, min(start + QUERY_CHUNK, length)) for start in starts]

    def attend(q, k, v, cache, *, spec):
        n_kv, group, size = k.shape[1], q.shape[1] // k.shape[1], q.shape[2]
        q = (q * spec.scale).reshape(n_rows, length, n_kv, group, size).transpose(0, 2, 3, 1, 4)
        k, v = (x.reshape(n_rows, length, n_kv, size).swapaxes(1, 2) for x in (k, v))
        q, k, v = barrier((q, k, v))
        outs = []
        for start, bias in zip(starts, biases, strict=True):
            n, end = bias.shape[1:]
            chunk = q[:, :, :, start:end].reshape(n_rows, n_kv, group * n, size)
            out = attention(chunk, k[:, :, :end], v[:, :, :end], bias)
            outs.append(out.reshape(n_rows, n_kv, group, n, size))
        out = jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4)
        return barrier(out.reshape(n_rows * length, n_kv * group, size)), cache

    return attend


def _mask_bias(segments: Int[Array, "B L"], start: int, end: int) -> Float[Array, "B Q L"]:
    """0 where query start + i may see key j < end, else a large negative number."""
    sees = segments[:, start:end, None] == segments[:, None, :end]
    sees &= jnp.arange(start, end)[None, :, None] >= jnp.arange(end)[None, None]
    return barrier(jnp.where(sees, 0.0, -1e9))
