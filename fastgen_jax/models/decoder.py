"""The decoder that all families share: what differs between them is in ModelConfig."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from fastgen_jax.models.config import ModelConfig, QueryScale
from fastgen_jax.models.dense import Implementation, dense_attend
from fastgen_jax.models.layers import (
    MLP,
    Attend,
    Attention,
    Cache,
    Embedding,
    GatedMLP,
    Linear,
    Policy,
    make_norm,
    normalised,
)
from fastgen_jax.models.mla import LatentAttention
from fastgen_jax.models.moe import MoE
from fastgen_jax.models.rope import Rotation
from fastgen_jax.models.sharding import FSDP


class Layer(nnx.Module):
    """Attention and MLP, each with norms before it, after it or both.

    sequential: x += attention(x), then x += mlp(x). parallel: x += attention(x) + mlp(x).
    post: x = norm(x + attention(x)), then x = norm(x + mlp(x)).
    """

    def __init__(self, config: ModelConfig, index: int, *, policy: Policy, rngs: nnx.Rngs):
        self.residual, self.scale = config.residual, config.residual_scale

        def norm(place: str):
            return make_norm(config, policy) if place in config.norm_places else None

        self.attention_norm = norm("before")
        attention = LatentAttention if config.latent else Attention
        self.attention = attention(config, index, policy=policy, rngs=rngs)
        self.attention_out_norm = norm("after")
        self.mlp_norm = None if config.shared_norm else norm("before")
        self.mlp = _mlp(config, index, policy, rngs)
        self.mlp_out_norm = norm("after")
        self.adds_as_it_is = config.residual_scale == 1.0 and "after" not in config.norm_places

    def __call__(
        self, x: Float[Array, "T D"], rotation: Rotation | None, cache: Cache, attend: Attend
    ) -> tuple[Float[Array, "T D"], Cache]:
        if self.residual == "post":
            x, cache = self.attention(x, rotation, cache, attend, added=x)
            x = normalised(self.attention_norm, x)
            return normalised(self.mlp_norm, self._feed_forward(x, added=x)), cache
        norm = self.attention_norm
        out, cache = self.attention(
            x, rotation, cache, attend, norm=norm, added=x if self.adds_as_it_is else None
        )
        attended = self._added(x, self.attention_out_norm, out)
        if self.residual == "parallel":
            inputs, norm = x, self.mlp_norm or norm
        else:
            inputs, norm = attended, self.mlp_norm
        out = self._feed_forward(inputs, norm=norm, added=attended if self.adds_as_it_is else None)
        return self._added(attended, self.mlp_out_norm, out), cache

    def _feed_forward(self, x: Float[Array, "T D"], **around) -> Float[Array, "T D"]:
        with jax.named_scope("mlp"):
            return self.mlp(x, **around)

    def _added(self, x: Float[Array, "T D"], norm, out: Float[Array, "T D"]):
        return out if self.adds_as_it_is else x + self.scale * normalised(norm, out)


def _mlp(config: ModelConfig, index: int, policy: Policy, rngs: nnx.Rngs) -> nnx.Module:
    if config.moe is not None and index in config.moe.layers:
        return MoE(config, policy=policy, rngs=rngs)
    return (GatedMLP if config.gated_mlp else MLP)(config, policy=policy, rngs=rngs)


# Runs a layer: (layer, x, cache) -> (x, cache).
Run = Callable[[Layer, Float[Array, "T D"], Cache], tuple[Float[Array, "T D"], Cache]]


def as_it_is(run: Run) -> Run:
    return run


def _in_training(run: Run, *, remat: bool | Callable[..., bool], mesh: Mesh | None) -> Run:
    """On each device its own tokens, and of each layer that is kept which `remat` says."""

    def split(layer, x, cache):
        x, cache = run(layer, _split_rows(x, mesh), cache)
        return _split_rows(x, mesh), cache

    if remat is False:
        return split
    return jax.checkpoint(split, policy=None if remat is True else remat)


def _split_rows(x: Array, mesh: Mesh | None) -> Array:
    if mesh is None or FSDP not in mesh.shape:
        return x
    return lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(FSDP)))


def scale_queries(attend: Attend, positions: Int[Array, "T"], scale: QueryScale) -> Attend:
    """The same attention of queries that grow with their position."""
    places = positions.astype(jnp.float32) + scale.first
    factors = 1.0 + scale.weight * jnp.log1p(jnp.floor(places / scale.length))

    def scaled(q: Float[Array, "T N H"], *inputs, **options):
        q = (q.astype(jnp.float32) * factors[:, None, None]).astype(q.dtype)
        return attend(q, *inputs, **options)

    return scaled


def row_lengths(weight: Float[Array, "V D"]) -> Float[Array, "V"]:
    """Euclidean; a row of zeros, which pads, counts as very short."""
    w32 = weight.astype(jnp.float32)
    return jnp.sqrt(jnp.maximum(jnp.sum(w32 * w32, axis=1), 1e-24))


def places_in_segments(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """How many tokens of its segment are before each token; a segment's tokens are neighbours."""
    place = lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
    is_first = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    return place - lax.cummax(jnp.where(is_first, place, 0), axis=1)


class Model(nnx.Module):
    """Token ids to logits, for training. The engine, which attends to a KV cache and needs logits
    of few tokens, calls the halves: `hidden_states`, then `unembed` of the rows that it samples.
    """

    def __init__(self, config: ModelConfig, *, policy: Policy, rngs: nnx.Rngs):
        self.config = config
        size = config.embedding_size or config.hidden_size
        make = {"policy": policy, "rngs": rngs}
        self.embed = Embedding(config.vocab_size, size, **make)
        n_positions, hidden_size = config.n_learned_positions, config.hidden_size
        self.position_embed = Embedding(n_positions, hidden_size, **make) if n_positions else None
        self.embed_norm = make_norm(config, policy) if config.embedding_norm else None
        is_same = size == hidden_size
        self.project_in = None if is_same else Linear(size, hidden_size, bias=False, **make)
        self.project_out = None if is_same else Linear(hidden_size, size, bias=False, **make)
        self.layers = nnx.List([Layer(config, i, **make) for i in range(config.n_layers)])
        self.norm = make_norm(config, policy) if config.final_norm else None
        self.lm_head = None if config.tie_embeddings else self._head(size, policy, rngs)

    def _head(self, size: int, policy: Policy, rngs: nnx.Rngs) -> Linear:
        policy = dataclasses.replace(policy, activations="float32")
        bias = self.config.head_bias
        return Linear(size, self.config.vocab_size, bias=bias, policy=policy, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "*B T"],
        segment_ids: Int[Array, "*B T"] | None = None,
        positions: Int[Array, "*B T"] | None = None,
        *,
        remat: bool | Callable[..., bool] = False,
        mesh: Mesh | None = None,
        attention: Implementation = "chunked",
    ) -> Float[Array, "*B T V"]:
        """Logits of the token after each, in float32: the dense forward, differentiable.

        All rows go through the layers as one: a product has as many rows as there are tokens, and
        rows that are split over devices stay so.

        Args:
            tokens: ids; "T" or "B T".
            segment_ids: of rows that pack several texts, which are neighbours. A token sees the
                tokens before it that have its id. 0 pads by custom: what padding sees is padding,
                and its logits mean nothing. None: a row is one text.
            positions: of each token in its text; None: its place in the segment. They reach the
                embeddings of positions only: order, windows and ALiBi go by the place in the row.
            remat: keeps of each layer its input only, and computes the rest again for gradients;
                or a policy of jax.checkpoint_policies that says what else is kept.
            mesh: whose axis "fsdp" splits the rows, as sharding.training_sharding says of the
                parameters.
            attention: see dense.dense_attend.
        """
        shape = tokens.shape
        tokens = tokens.reshape(-1, shape[-1])
        if segment_ids is not None:
            segment_ids = segment_ids.reshape(tokens.shape)
        if positions is None:
            one_text = jnp.zeros_like(tokens)
            positions = places_in_segments(one_text if segment_ids is None else segment_ids)
        attend = dense_attend(len(tokens), segment_ids, attention)
        nothing = (None,) * self.config.n_layers
        around = partial(_in_training, remat=remat, mesh=mesh)
        hidden, _ = self.hidden_states(
            tokens.reshape(-1), positions.reshape(-1), nothing, attend, around=around
        )
        return self.unembed(hidden).reshape(*shape, -1)

    def hidden_states(
        self,
        token_ids: Int[Array, "T"],
        positions: Int[Array, "T"],
        caches: tuple[Cache, ...],
        attend: Attend,
        layers: tuple[int, ...] = (),
        around: Callable[[Run], Run] = as_it_is,
    ) -> tuple[Float[Array, "T *L D"], tuple[Cache, ...]]:
        """Final hidden states, of tokens that `attend` puts into sequences, and each layer's cache.

        If layers are named, their states come first ("T L+1 D"): 0 what the first layer takes, i
        what the i-th leaves, n_layers the final ones. around: changes how a layer is run.
        """
        config = self.config
        x = self.embed(token_ids) * config.embedding_scale
        if self.project_in is not None:
            x = self.project_in(x)
        if self.position_embed is not None:
            x = x + self.position_embed(positions + config.position_offset)
        x = normalised(self.embed_norm, x)
        ropes = {config.rope_of(i) for i in range(config.n_layers)}
        rotations = {rope: rope and Rotation(positions, config.head_dim, rope) for rope in ropes}
        scale = config.query_scale
        scaled = attend if scale is None else scale_queries(attend, positions, scale)
        updated, seen = [], [x]
        for i, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            is_scaled = scale is not None and i in scale.layers
            rotation, chosen = rotations[config.rope_of(i)], scaled if is_scaled else attend

            def run(layer, x, cache, rotation=rotation, attend=chosen):
                return layer(x, rotation, cache, attend)

            x, cache = around(run)(layer, x, cache)
            updated.append(cache)
            seen.append(x)
        seen[-1] = x = normalised(self.norm, x)
        hidden = jnp.stack([*(seen[i] for i in layers), x], axis=1) if layers else x
        return hidden, tuple(updated)

    def unembed(self, hidden: Float[Array, "S D"]) -> Float[Array, "S V"]:
        """Logits in float32."""
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        if self.lm_head is None:
            logits = self.embed.unembed(hidden)
        else:
            logits = self.lm_head(hidden)
            if self.config.unit_head:
                logits = logits / row_lengths(self.lm_head.weight[...])[None]
            logits = logits[:, : self.config.vocab_size]  # the rest fills devices
        logits = logits * self.config.logits_scale
        cap = self.config.logits_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)
