"""The layers that model families are made of: linear, norms, embedding, MLPs, attention.

Activations are flat over tokens ("T D"): no layer knows batches or sequences. Attention hands its
queries, keys and values to the `attend` it was given, which owns the KV cache. Weights are stored
(out, in), as Hugging Face stores them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from fastgen_jax.errors import ConfigError
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.layout import HeadLayout
from fastgen_jax.models.product import (
    Scale,
    along_last,
    gate,
    gated_product,
    product,
    rms_norm,
)
from fastgen_jax.models.rope import Rotation
from pallas_kernels import AttentionSpec

DTYPES = {"cpu": "float32", "gpu": "bfloat16", "tpu": "bfloat16"}  # of weights, by backend
Cache = Any  # whatever the attend function reads and returns
# (q, k, v, cache, *, spec, alibi_slopes=None, sinks=None) -> (out, cache)
Attend = Callable[..., tuple[Array, Cache]]


@dataclass(frozen=True)
class Policy:
    """Dtypes of weights and of activations between layers, and the devices that split weights.

    Products accumulate in float32 and norms work in float32 whatever the policy says.
    """

    weights: str = "float32"
    activations: str = "float32"
    mesh: Mesh | None = None  # None: one device

    @classmethod
    def here(cls, dtype: str, mesh: Mesh | None) -> "Policy":
        """What the mesh's devices, or else the default backend, want for weights of that dtype;
        auto: of its own.

        On CPU activations stay float32 between products: 16-bit elementwise work is slow there.
        """
        platform = mesh.devices.flat[0].platform if mesh else jax.default_backend()
        weights = DTYPES[platform] if dtype == "auto" else dtype
        if weights not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
        return cls(weights, "float32" if platform == "cpu" else weights, mesh)

    @property
    def n_shards(self) -> int:
        return 1 if self.mesh is None else self.mesh.size


Norm = Callable[[Array], Array]  # a module


def normalised(norm: Norm | None, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    return x if norm is None else norm(x)


def before_product(
    norm: Norm | None, x: Float[Array, "T D"]
) -> tuple[Float[Array, "T D"], Scale | None]:
    """x, and its norm if that is one which a product does by itself; else x has it already."""
    if isinstance(norm, RMSNorm):
        return x, norm.scale
    return normalised(norm, x), None


class Linear(nnx.Module):
    """x W^T + b, with W (out, in); of x a norm, and something added to it, cost next to nothing."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool, policy: Policy, rngs: nnx.Rngs):
        self.policy = policy
        weight = jax.random.normal(rngs.params(), (out_size, in_size), jnp.float32) * in_size**-0.5
        self.weight = nnx.Param(weight.astype(policy.weights))
        self.bias = nnx.Param(jnp.zeros(out_size, policy.weights)) if bias else None

    def __call__(
        self,
        x: Float[Array, "T I"],
        *,
        norm: Norm | None = None,
        added: Float[Array, "T O"] | None = None,
    ) -> Float[Array, "T O"]:
        x, own = before_product(norm, x)
        multiply = functools.partial(product, x, self.weight[...], self.policy.n_shards, norm=own)
        if self.bias is None:
            return multiply(added=added).astype(self.policy.activations)
        y = (multiply() + self.bias[...].astype(jnp.float32)[None]).astype(self.policy.activations)
        return y if added is None else added + y


class RMSNorm(nnx.Module):
    """x / rms(x) * (weight + offset), statistics in float32 (Zhang and Sennrich, 2019).

    n_copies: how often x has each of its `size` elements; beside them it may have zeros.
    """

    def __init__(
        self, size: int, *, eps: float, policy: Policy, offset: float = 0.0, n_copies: int = 1
    ):
        self.eps, self.offset, self.n_summed = eps, offset, size * n_copies
        self.weight = nnx.Param(jnp.full(size, 1.0 - offset, policy.weights))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms_norm(x, *self.scale, self.n_summed)

    @property
    def scale(self) -> Scale:
        return self.weight[...].astype(jnp.float32) + self.offset, self.eps


class UnitNorm(nnx.Module):
    """x / rms(x), in float32."""

    def __init__(self, *, eps: float):
        self.eps = eps

    def __call__(self, x: Float[Array, "... H"]) -> Float[Array, "... H"]:
        x32 = x.astype(jnp.float32)
        scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * scale).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * (weight + offset) + bias, statistics in float32 (Ba et al., 2016).

    size: of the weight; its last axis is normalised.
    """

    def __init__(
        self,
        size: int | tuple[int, ...],
        *,
        eps: float,
        policy: Policy,
        bias: bool,
        offset: float = 0.0,
    ):
        self.eps, self.offset = eps, offset
        self.weight = nnx.Param(jnp.full(size, 1.0 - offset, policy.weights))
        self.bias = nnx.Param(jnp.zeros(size, policy.weights)) if bias else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        weight = self.weight[...].astype(jnp.float32) + self.offset
        y = x32 * scale * along_last(weight, x)
        if self.bias is not None:
            y = y + along_last(self.bias[...].astype(jnp.float32), x)
        return y.astype(x.dtype)


def make_norm(config: ModelConfig, policy: Policy) -> nnx.Module:
    """The kind of norm that the hidden states of this model have."""
    shape = {"eps": config.norm_eps, "policy": policy, "offset": config.norm_offset}
    if config.norm == "rms":
        return RMSNorm(config.hidden_size, **shape)
    return LayerNorm(config.hidden_size, bias=config.norm_bias, **shape)


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
        return product(x, self.weight[...], self.policy.n_shards)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class XIELU(nnx.Module):
    """beta x + p x^2 where x is positive, else beta x + n (e^x - 1 - x), with learned p and n
    (Huang and Schlag, 2024).
    """

    def __init__(self, policy: Policy):
        self.alpha_p = nnx.Param(jnp.zeros(1, policy.weights))  # softplus of it is p
        self.alpha_n = nnx.Param(jnp.zeros(1, policy.weights))  # n is that of this, plus beta
        self.beta = nnx.Param(jnp.full((), 0.5, policy.weights))

    def __call__(self, x: Float[Array, "T F"]) -> Float[Array, "T F"]:
        beta = self.beta[...].astype(jnp.float32)
        p, n = (
            jax.nn.softplus(alpha[...].astype(jnp.float32))[None]
            for alpha in (self.alpha_p, self.alpha_n)
        )
        bent = (beta + n) * (jnp.expm1(jnp.minimum(x, 0.0)) - x)
        return beta * x + jnp.where(x > 0, p * x * x, bent)


class MLP(nnx.Module):
    """down(act(up(x)))."""

    def __init__(self, config: ModelConfig, *, policy: Policy, rngs: nnx.Rngs):
        self.activation = config.activation
        self.xielu = XIELU(policy) if config.activation == "xielu" else None
        shape = {"bias": config.mlp_bias, "policy": policy, "rngs": rngs}
        self.up = Linear(config.hidden_size, config.ffn_size, **shape)
        self.down = Linear(config.ffn_size, config.hidden_size, **shape)

    def __call__(
        self,
        x: Float[Array, "T D"],
        *,
        norm: Norm | None = None,
        added: Float[Array, "T D"] | None = None,
    ) -> Float[Array, "T D"]:
        activate = ACTIVATIONS[self.activation] if self.xielu is None else self.xielu
        hidden = activate(self.up(x, norm=norm).astype(jnp.float32))
        return self.down(hidden.astype(x.dtype), added=added)


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x)); gate and up are one product (Shazeer, 2020).

    Rows of `gate_up` are (shard, gate|up, F / n_shards), F rounded up, so that splitting them over
    devices keeps pairs together.
    """

    def __init__(
        self, config: ModelConfig, *, policy: Policy, rngs: nnx.Rngs, ffn_size: int | None = None
    ):
        self.n_shards = policy.n_shards
        self.activation = config.activation
        shape = {"bias": config.mlp_bias, "policy": policy, "rngs": rngs}
        ffn_size = ffn_size or config.ffn_size
        self.gate_up = Linear(config.hidden_size, 2 * ffn_size, **shape)
        self.down = Linear(ffn_size, config.hidden_size, **shape)

    def __call__(
        self,
        x: Float[Array, "T D"],
        *,
        norm: Norm | None = None,
        added: Float[Array, "T D"] | None = None,
    ) -> Float[Array, "T D"]:
        if self.activation == "silu" and self.gate_up.bias is None and self.n_shards == 1:
            x, own = before_product(norm, x)
            hidden = gated_product(x, self.gate_up.weight[...], norm=own)
        else:
            both = self.gate_up(x, norm=norm).reshape(len(x), self.n_shards, 2, -1)
            hidden = gate(both, ACTIVATIONS[self.activation]).astype(x.dtype)
        return self.down(hidden.reshape(len(x), -1), added=added)


class Attention(nnx.Module):
    """Grouped-query attention of one layer; queries, keys and values are one product.

    Rows of `qkv` are (K, G + 2, H): each KV head with its queries, so that splitting over KV
    heads is contiguous. On several devices K and G count slots.
    """

    def __init__(self, config: ModelConfig, layer: int, *, policy: Policy, rngs: nnx.Rngs):
        self.config = config
        scale = config.attention_scale or config.head_dim**-0.5
        self.spec = AttentionSpec(scale, config.window(layer), config.attention_soft_cap)
        size = config.n_heads * config.head_dim
        heads = size + 2 * config.n_kv_heads * config.head_dim
        self.qkv = Linear(config.hidden_size, heads, bias=config.qkv_bias, policy=policy, rngs=rngs)
        self.out = Linear(size, config.hidden_size, bias=config.out_bias, policy=policy, rngs=rngs)
        self.heads = HeadLayout.of(config, policy.n_shards)
        self.q_norm = _qk_norm(config, layer, config.n_heads, policy)
        self.k_norm = _qk_norm(config, layer, config.n_kv_heads, policy, self.heads.n_copies)
        self.sinks = nnx.Param(jnp.zeros(config.n_heads, policy.weights)) if config.sinks else None

    def __call__(
        self,
        x: Float[Array, "T D"],
        rotation: Rotation | None,
        cache: Cache,
        attend: Attend,
        *,
        norm: Norm | None = None,
        added: Float[Array, "T D"] | None = None,
    ) -> tuple[Float[Array, "T D"], Cache]:
        c, g = self.config, self.heads.group_size
        qkv = self.qkv(x, norm=norm).reshape(len(x), -1, g + 2, c.head_dim)
        if c.qkv_clip is not None:
            qkv = jnp.clip(qkv, -c.qkv_clip, c.qkv_clip)
        heads, q_norm, k_norm = qkv[:, :, : g + 1], self.q_norm, self.k_norm
        if c.qk_norm == "head" and not c.qk_norm_last:
            heads, q_norm, k_norm = self._normalised_at_once(heads), None, None
        q = heads[:, :, :g].reshape(len(x), -1, c.head_dim)
        q = self._prepared(q, q_norm, rotation)
        k = self._prepared(heads[:, :, g], k_norm, rotation)
        extras: dict[str, Array] = {}
        if c.alibi_slopes:
            slopes = self.heads.queries(np.array(c.alibi_slopes, np.float32), empty=0)
            extras["alibi_slopes"] = jnp.array(slopes.reshape(-1))
        if self.sinks is not None:
            extras["sinks"] = self.sinks[...].astype(jnp.float32)
        out, cache = attend(q, k, qkv[:, :, g + 1], cache, spec=self.spec, **extras)
        return self.out(out.reshape(len(x), -1), added=added), cache

    def _normalised_at_once(self, heads: Float[Array, "T K G+1 H"]) -> Float[Array, "T K G+1 H"]:
        """Queries and their key: for both together a GPU has two launches less."""
        assert self.q_norm is not None and self.k_norm is not None
        is_key = lax.broadcasted_iota(jnp.int32, (1, 1, heads.shape[2], 1), 2) == heads.shape[2] - 1
        return jnp.where(is_key, self.k_norm(heads), self.q_norm(heads))

    def _prepared(
        self, heads: Float[Array, "T N H"], norm, rotation: Rotation | None
    ) -> Float[Array, "T N H"]:
        """Queries or keys, normalised and turned."""
        if not self.config.qk_norm_last:
            heads = self._normalised(heads, norm)
        if rotation is not None:
            heads = rotation(heads)
        return self._normalised(heads, norm) if self.config.qk_norm_last else heads

    def _normalised(self, heads: Float[Array, "T N H"], norm) -> Float[Array, "T N H"]:
        if norm is None:
            return heads
        if self.config.qk_norm == "all":
            return norm(heads.reshape(len(heads), -1)).reshape(heads.shape)
        return norm(heads)


def _qk_norm(
    config: ModelConfig, layer: int, n_heads: int, policy: Policy, n_copies: int = 1
) -> nnx.Module | None:
    """Of queries or keys: "T N H", but "T N*H" if over all heads."""
    rms = functools.partial(RMSNorm, eps=config.norm_eps, policy=policy, offset=config.norm_offset)
    match config.qk_norm:
        case "head":
            return rms(config.head_dim)
        case "all":
            return rms(n_heads * config.head_dim, n_copies=n_copies)
        case "each_head":
            size = n_heads, config.head_dim
            return LayerNorm(size, eps=config.norm_eps, policy=policy, bias=False)
        case "unit" if config.rope_of(layer):
            return UnitNorm(eps=config.norm_eps)
    return None
