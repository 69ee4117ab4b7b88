"""The layers that model families are made of: linear, norm, embedding, rotary, gated MLP,
attention.

Activations are flat over tokens ("T D"): no layer knows batches or sequences. Attention hands its
queries, keys and values to the `attend` it was given, which owns the KV cache. Weights are stored
(out, in), as Hugging Face stores them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from fastgen_jax.config import ModelConfig, RopeConfig
from pallas_kernels.contract import AttentionSpec

Cache = Any  # whatever the attend function reads and returns
Attend = Callable[..., tuple[Array, Cache]]  # (q, k, v, cache, *, spec) -> (out, cache)


@dataclass(frozen=True)
class Policy:
    """Dtypes of weights and of activations between layers, and over how many devices weights are
    split.

    Products accumulate in float32 and norms work in float32 whatever the policy says.
    """

    weights: str = "float32"
    activations: str = "float32"
    n_shards: int = 1


def product(x: Float[Array, "T I"], weight: Float[Array, "O I"]) -> Float[Array, "T O"]:
    """x W^T with the weight's dtype as input and float32 as output.

    On CPU a matrix product packs its right-hand side anew in every call, so with few tokens the
    weight had better be on the left: up to 1.25 times as fast (benchmarks/matmul.py).
    """
    x = x.astype(weight.dtype)

    def dot(a, b):
        contract = (((1,), (1,)), ((), ()))
        return lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)

    def cpu(x, weight):
        fewest = 1 if weight.dtype == jnp.float32 else 32
        if not fewest <= len(x) < 128:
            return dot(x, weight)
        return lax.optimization_barrier(dot(weight, x)).T  # XLA would turn it back

    return lax.platform_dependent(x, weight, cpu=cpu, default=dot)


class Linear(nnx.Module):
    """y = x W^T + b, with W (out, in)."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool, policy: Policy, rngs: nnx.Rngs):
        self.policy = policy
        weight = jax.random.normal(rngs.params(), (out_size, in_size), jnp.float32) * in_size**-0.5
        self.weight = nnx.Param(weight.astype(policy.weights))
        self.bias = nnx.Param(jnp.zeros(out_size, policy.weights)) if bias else None

    def __call__(self, x: Float[Array, "T I"]) -> Float[Array, "T O"]:
        y = product(x, self.weight[...])
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)[None]
        return y.astype(self.policy.activations)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight, statistics in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, *, eps: float, policy: Policy):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(size, policy.weights))

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        x32 = x.astype(jnp.float32)
        scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * scale * self.weight[...].astype(jnp.float32)[None]).astype(x.dtype)


class Embedding(nnx.Module):
    """Token ids to vectors, and back to logits when the output shares the table."""

    def __init__(self, vocab_size: int, size: int, *, policy: Policy, rngs: nnx.Rngs):
        self.policy = policy
        weight = jax.random.normal(rngs.params(), (vocab_size, size), jnp.float32) * 0.02
        self.weight = nnx.Param(weight.astype(policy.weights))

    def __call__(self, token_ids: Int[Array, "T"]) -> Float[Array, "T D"]:
        rows = jnp.take(self.weight[...], token_ids, axis=0, mode="clip")
        return rows.astype(self.policy.activations)

    def unembed(self, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
        """Logits in float32."""
        return product(x, self.weight[...])


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x)); gate and up are one product (Shazeer, 2020).

    Rows of `gate_up` are (shard, gate|up, F / n_shards), so that splitting them over devices
    keeps pairs together.
    """

    def __init__(self, config: ModelConfig, *, policy: Policy, rngs: nnx.Rngs):
        self.n_shards = policy.n_shards
        self.activation = config.activation
        shape = {"bias": config.mlp_bias, "policy": policy, "rngs": rngs}
        self.gate_up = Linear(config.hidden_size, 2 * config.ffn_size, **shape)
        self.down = Linear(config.ffn_size, config.hidden_size, **shape)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        both = self.gate_up(x).reshape(len(x), self.n_shards, 2, -1)
        gate = getattr(jax.nn, self.activation)(both[:, :, 0].astype(jnp.float32))
        hidden = (gate * both[:, :, 1].astype(jnp.float32)).astype(x.dtype)
        return self.down(hidden.reshape(len(x), -1))


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; queries, keys and values are one product.

    Rows of `qkv` are (K, G + 2, H): each KV head with its queries, so that splitting over KV
    heads is contiguous.
    """

    def __init__(self, config: ModelConfig, *, policy: Policy, rngs: nnx.Rngs):
        self.config = config
        self.spec = AttentionSpec(scale=config.head_dim**-0.5)
        heads = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
        self.qkv = Linear(config.hidden_size, heads, bias=config.qkv_bias, policy=policy, rngs=rngs)
        self.out = Linear(
            config.n_heads * config.head_dim,
            config.hidden_size,
            bias=config.out_bias,
            policy=policy,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "T D"], rotation: "Rotation", cache: Cache, attend: Attend
    ) -> tuple[Float[Array, "T D"], Cache]:
        c = self.config
        qkv = self.qkv(x).reshape(len(x), c.n_kv_heads, c.group_size + 2, c.head_dim)
        q = qkv[:, :, : c.group_size].reshape(len(x), c.n_heads, c.head_dim)
        k, v = qkv[:, :, c.group_size], qkv[:, :, c.group_size + 1]
        out, cache = attend(rotation(q), rotation(k), v, cache, spec=self.spec)
        return self.out(out.reshape(len(x), -1)), cache


class Rotation:
    """Rotary position embedding of one batch of tokens (Su et al., 2021), Llama's halves."""

    def __init__(self, positions: Int[Array, "T"], head_dim: int, rope: RopeConfig):
        frequencies, scale = token_frequencies(positions, head_dim, rope)
        angles = positions.astype(jnp.float32)[:, None] * frequencies  # T H/2
        sin = jnp.sin(angles) * scale
        self.cos = (jnp.cos(angles) * scale)[:, None, None]
        self.sin = jnp.stack([-sin, sin], axis=1)[:, None]  # T 1 2 H/2

    def __call__(self, x: Float[Array, "T N H"]) -> Float[Array, "T N H"]:
        halves = x.astype(jnp.float32).reshape(*x.shape[:2], 2, -1)
        rotated = halves * self.cos + halves[:, :, ::-1] * self.sin  # a c - b s, b c + a s
        return rotated.reshape(x.shape).astype(x.dtype)


def token_frequencies(
    positions: Int[Array, "T"], head_dim: int, rope: RopeConfig
) -> tuple[Float[Array, "#T F"], float]:
    """Angular frequencies per token (one row for all tokens unless the kind is dynamic) and a
    factor on cos and sin.

    Dynamic NTK: a token at position p uses the base that fits a context of p + 1, as transformers
    does when it decodes token by token. So the result does not depend on how a prompt is cut into
    chunks.
    """
    if rope.kind != "dynamic":
        frequencies, scale = rope_frequencies(head_dim, rope)
        return jnp.asarray(frequencies)[None], scale
    assert rope.original_max_position is not None
    original = float(rope.original_max_position)
    length = jnp.maximum(positions.astype(jnp.float32) + 1.0, original)[:, None]
    base = rope.theta * (rope.factor * length / original - (rope.factor - 1.0)) ** (
        head_dim / (head_dim - 2)
    )
    exponents = jnp.asarray(np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)[None]
    return 1.0 / base**exponents, 1.0


@lru_cache
def rope_frequencies(head_dim: int, rope: RopeConfig) -> tuple[np.ndarray, float]:
    """Angular frequencies "H/2" in float32 and the factor on cos and sin, on the host."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    match rope.kind:
        case "default":
            return plain, 1.0
        case "linear":
            return plain / np.float32(rope.factor), 1.0
        case "llama3":
            return _llama3(plain, rope), 1.0
        case "yarn":
            return _yarn(plain, head_dim, rope), _yarn_scale(rope)
    raise AssertionError(rope.kind)


def _llama3(plain: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Llama 3.1: long wavelengths divided by the factor, short ones kept, a ramp between."""
    assert rope.original_max_position is not None
    turns = rope.original_max_position * plain / (2 * math.pi)  # within the original context
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(ramp, 0.0, 1.0)
    return (plain * keep + plain / rope.factor * (1 - keep)).astype(np.float32)


def _yarn(plain: np.ndarray, head_dim: int, rope: RopeConfig) -> np.ndarray:
    """YaRN (Peng et al., 2023), equation 23: interpolate dimensions that turn seldom, keep those
    that turn often.
    """
    assert rope.original_max_position is not None
    length = rope.original_max_position

    def dimension(turns: float) -> float:
        wavelength = length / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - low) / max(high - low, 0.001)
    keep = 1 - np.clip(ramp, 0.0, 1.0)
    return (plain / rope.factor * (1 - keep) + plain * keep).astype(np.float32)


def _yarn_scale(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
