"""Multi-head latent attention (DeepSeek-AI, DeepSeek-V2, 2024), run as plain multi-head attention.

The kernels have one head size for queries, keys and values, and one KV head per stored vector. So
each token's latent is expanded to the keys and values of all heads before they are cached, and
values are padded with zeros to the size of keys. What it costs, in DeepSeek's shape: the cache
holds 2 * 192 numbers per token and head (49152 per token for DeepSeek-V3's 128 heads), where the
latent and the rotated key that heads share would be 512 + 64 = 576 per token; and a third of the
attention's second product is zeros.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.layers import Attend, Cache, Linear, Norm, Policy, RMSNorm, normalised
from fastgen_jax.models.rope import Rotation
from pallas_kernels import AttentionSpec

LATENT_NORM_EPS = 1e-6  # whatever the other norms have


class LatentAttention(nnx.Module):
    """Attention of one layer with keys and values from a latent c of R numbers per token.

    kv_down: x -> c, rotated key of all heads. kv_up: norm(c) -> for each head: key, value.
    Queries: q(x), or q_up(norm(q_down(x))). A query or key is its plain part, then the rotated one.
    """

    def __init__(self, config: ModelConfig, layer: int, *, policy: Policy, rngs: nnx.Rngs):
        latent = config.latent
        assert latent is not None and config.head_dim == latent.head_size
        assert config.n_kv_heads == config.n_heads
        self.latent = latent
        scale = config.attention_scale or config.head_dim**-0.5
        self.spec = AttentionSpec(scale, config.window(layer), config.attention_soft_cap)
        size, n = config.hidden_size, config.n_heads

        def linear(in_size: int, out_size: int, bias: bool = False) -> Linear:
            return Linear(in_size, out_size, bias=bias, policy=policy, rngs=rngs)

        def norm(rank: int) -> RMSNorm:
            return RMSNorm(rank, eps=LATENT_NORM_EPS, policy=policy)

        rank, bias = latent.q_rank, config.qkv_bias
        self.q = None if rank else linear(size, n * config.head_dim)
        self.q_down = linear(size, rank, bias) if rank else None
        self.q_norm = norm(rank) if rank else None
        self.q_up = linear(rank, n * config.head_dim) if rank else None
        self.kv_down = linear(size, latent.kv_rank + latent.rope_size, bias)
        self.kv_norm = norm(latent.kv_rank)
        self.kv_up = linear(latent.kv_rank, n * (latent.nope_size + latent.value_size))
        self.out = linear(n * latent.value_size, size, config.out_bias)

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
        x = normalised(norm, x)
        nope = self.latent.nope_size
        q = self._queries(x)
        compressed = self.kv_down(x)
        shared = compressed[:, None, self.latent.kv_rank :]  # T 1 rope
        q_turned = q[:, :, nope:]
        if rotation is not None:
            q_turned, shared = rotation(q_turned), rotation(shared)
        kv = self.kv_up(self.kv_norm(compressed[:, : self.latent.kv_rank]))
        kv = kv.reshape(*q.shape[:2], -1)  # T N nope+value
        q = jnp.concatenate([q[:, :, :nope], q_turned], axis=2)
        k = jnp.concatenate([kv[:, :, :nope], jnp.broadcast_to(shared, q_turned.shape)], axis=2)
        n_missing = k.shape[2] - self.latent.value_size
        v = jnp.pad(kv[:, :, nope:], ((0, 0), (0, 0), (0, n_missing)))
        out, cache = attend(q, k, v, cache, spec=self.spec)
        out = out[:, :, : self.latent.value_size].reshape(len(x), -1)
        return self.out(out, added=added), cache

    def _queries(self, x: Float[Array, "T D"]) -> Float[Array, "T N H"]:
        if self.q is not None:
            q = self.q(x)
        else:
            assert self.q_down is not None and self.q_norm is not None and self.q_up is not None
            q = self.q_up(self.q_norm(self.q_down(x)))
        return q.reshape(len(x), -1, self.latent.head_size)
