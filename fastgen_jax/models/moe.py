"""Mixture of experts (Shazeer et al., 2017): each token goes through its best experts only.

Pairs of token and expert are sorted by expert, so that an expert's tokens are neighbours and a
product with its weights is a matrix product of just those rows. Over devices experts are split
(Lepikhin et al., GShard, 2020): each device takes the pairs of its own experts, and outputs are
summed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from fastgen_jax.models.config import ModelConfig, MoeConfig
from fastgen_jax.models.layers import ACTIVATIONS, GatedMLP, Linear, Norm, Policy, normalised
from fastgen_jax.models.layout import padded
from fastgen_jax.models.product import product
from pallas_kernels import tiles_product

GLU_SLOPE = 1.702  # of GPT-OSS's clamped gate


class MoE(nnx.Module):
    """sum over the chosen experts e of weight(e) * down_e(act(gate_e(x)) * up_e(x)).

    Rows of `gate_up` are (E, gate|up, F). A shared MLP, which all tokens take, may be added.
    """

    def __init__(self, config: ModelConfig, *, policy: Policy, rngs: nnx.Rngs):
        moe = config.moe
        assert moe is not None
        self.moe, self.activation, self.policy = moe, config.activation, policy
        size, dtype = config.hidden_size, policy.weights

        def random(*shape):
            weight = jax.random.normal(rngs.params(), shape, jnp.float32) * shape[-1] ** -0.5
            return nnx.Param(weight.astype(dtype))

        def bias(is_there: bool, *shape):
            return nnx.Param(jnp.zeros(shape, dtype)) if is_there else None

        self.router = random(moe.n_experts, size)
        self.router_bias = bias(moe.router_bias, moe.n_experts)
        # In float32 whatever the policy: it decides between near scores.
        score_bias = jnp.zeros(moe.n_experts, jnp.float32)
        self.score_bias = nnx.Param(score_bias) if moe.score_bias else None
        self.gate_up = random(moe.n_experts, 2 * moe.ffn_size, size)
        self.gate_up_bias = bias(moe.expert_bias, moe.n_experts, 2 * moe.ffn_size)
        self.down = random(moe.n_experts, size, moe.ffn_size)
        self.down_bias = bias(moe.expert_bias, moe.n_experts, size)
        shape = {"policy": policy, "rngs": rngs}
        shared = moe.shared_size
        self.shared = GatedMLP(config, ffn_size=shared, **shape) if shared else None
        has_gate = shared and moe.shared_gate
        self.shared_gate = Linear(size, 1, bias=False, **shape) if has_gate else None

    def __call__(
        self,
        x: Float[Array, "T D"],
        *,
        norm: Norm | None = None,
        added: Float[Array, "T D"] | None = None,
    ) -> Float[Array, "T D"]:
        x = normalised(norm, x)
        logits = product(x.astype(jnp.float32), self.router[...].astype(jnp.float32))
        router_bias, score_bias = _float32(self.router_bias), _float32(self.score_bias)
        weights, experts = route(logits, router_bias, score_bias, self.moe)
        arrays = self.gate_up, self.gate_up_bias, self.down, self.down_bias
        arrays = tuple(None if array is None else array[...] for array in arrays)
        out = self._experts(x, weights, experts, arrays)
        if self.shared is not None:
            shared = self.shared(x).astype(jnp.float32)
            if self.shared_gate is not None:
                shared = shared * jax.nn.sigmoid(self.shared_gate(x).astype(jnp.float32))
            out = out + shared
        out = out.astype(x.dtype)
        return out if added is None else added + out

    def _experts(self, x, weights, experts, arrays) -> Float[Array, "T D"]:
        mesh = self.policy.mesh
        if mesh is None or mesh.size == 1:
            return self._own_experts(x, weights, experts, arrays)
        (axis,) = mesh.axis_names
        n_own = padded(self.moe.n_experts, mesh.size) // mesh.size

        def own(x, weights, experts, arrays):
            out = self._own_experts(x, weights, experts - n_own * lax.axis_index(axis), arrays)
            return lax.psum(out, axis)

        every = PartitionSpec()
        specs = every, every, every, PartitionSpec(axis)
        sharded = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=every, check_vma=False)
        return sharded(x, weights, experts, arrays)

    def _own_experts(
        self,
        x: Float[Array, "T D"],
        weights: Float[Array, "T k"],
        experts: Int[Array, "T k"],
        arrays,
    ) -> Float[Array, "T D"]:
        """Those of `arrays`; pairs with other experts count nothing. In float32."""
        gate_up, gate_up_bias, down, down_bias = arrays
        n_experts, n_chosen = len(gate_up), experts.shape[1]
        expert = experts.reshape(-1)
        is_own = (expert >= 0) & (expert < n_experts)
        expert = jnp.where(is_own, expert, n_experts)
        order = jnp.argsort(expert, stable=True)
        sizes = jnp.bincount(expert, length=n_experts + 1)[:n_experts].astype(jnp.int32)
        expert = expert[order]  # n_experts: no expert's
        rows = x[order // n_chosen]
        if self.moe.weighs_input:
            rows = rows.astype(jnp.float32) * weights.reshape(-1)[order][:, None]
            weights = jnp.ones_like(weights)
        both = grouped_product(rows.astype(gate_up.dtype), gate_up, sizes)
        both = both + _rows(gate_up_bias, expert)
        hidden = self._activated(*jnp.split(both, 2, axis=1))
        out = grouped_product(hidden.astype(down.dtype), down, sizes) + _rows(down_bias, expert)
        out = jnp.where((expert < n_experts)[:, None], out, 0.0)
        back = jnp.argsort(order)
        return jnp.einsum("tkd,tk->td", out[back].reshape(*weights.shape, -1), weights)

    def _activated(self, gate: Float[Array, "M F"], up: Float[Array, "M F"]):
        clamp = self.moe.clamp
        if clamp is None:
            return ACTIVATIONS[self.activation](gate) * up
        gate, up = jnp.minimum(gate, clamp), jnp.clip(up, -clamp, clamp)
        return gate * jax.nn.sigmoid(GLU_SLOPE * gate) * (up + 1)


def _float32(bias) -> Array | float:
    return 0.0 if bias is None else bias[...].astype(jnp.float32)[None]


def _rows(bias: Float[Array, "E O"] | None, expert: Int[Array, "M"]) -> Array | float:
    return 0.0 if bias is None else bias.astype(jnp.float32)[expert]


def route(
    logits: Float[Array, "T E"],
    router_bias: Array | float,
    score_bias: Array | float,
    moe: MoeConfig,
) -> tuple[Float[Array, "T k"], Int[Array, "T k"]]:
    """Weights and ids of each token's experts."""
    logits = logits + router_bias
    match moe.scores:
        case "chosen":
            top, experts = lax.top_k(logits, moe.n_chosen)
            return moe.scale * jax.nn.softmax(top, axis=-1), experts
        case "each_chosen":
            top, experts = lax.top_k(logits, moe.n_chosen)
            return moe.scale * jax.nn.sigmoid(top), experts
        case "sparsemixer":
            return _sparsemixer(logits, moe)
        case "softmax":
            scores = jax.nn.softmax(logits, axis=-1)
        case _:
            scores = jax.nn.sigmoid(logits)
    _, experts = lax.top_k(_best_groups(scores + score_bias, moe), moe.n_chosen)
    weights = jnp.take_along_axis(scores, experts, axis=1)
    if moe.normalise:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return moe.scale * weights, experts


def _sparsemixer(
    logits: Float[Array, "T E"], moe: MoeConfig
) -> tuple[Float[Array, "T k"], Int[Array, "T k"]]:
    """The best expert, weighed by a softmax over those near it, then the best of the others (Liu et
    al., GRIN, 2024), as it infers.
    """
    left, weights, experts = logits, [], []
    for _ in range(moe.n_chosen):
        best, expert = lax.top_k(left, 1)
        is_far = best - logits > moe.tolerance * jnp.maximum(jnp.abs(logits), best)
        near = jax.nn.logsumexp(jnp.where(is_far, -jnp.inf, left), axis=1, keepdims=True)
        weights.append(moe.scale * jnp.exp(best - near))
        experts.append(expert)
        left = jnp.where(jax.nn.one_hot(expert[:, 0], moe.n_experts) > 0, -jnp.inf, left)
    return jnp.concatenate(weights, axis=1), jnp.concatenate(experts, axis=1)


def _best_groups(scores: Float[Array, "T E"], moe: MoeConfig) -> Float[Array, "T E"]:
    """Scores, none outside the best groups (DeepSeek-AI, 2024): of a group its best counts, with a
    bias its best two.
    """
    if moe.n_groups == 1:
        return scores
    grouped = scores.reshape(len(scores), moe.n_groups, -1)
    value = lax.top_k(grouped, 2 if moe.score_bias else 1)[0].sum(axis=-1)
    _, best = lax.top_k(value, moe.n_chosen_groups)
    is_best = jax.nn.one_hot(best, moe.n_groups, dtype=jnp.bool_).any(axis=1)
    return jnp.where(is_best[:, :, None], grouped, -jnp.inf).reshape(scores.shape)


@jax.custom_vjp
def grouped_product(
    x: Float[Array, "M I"], weight: Float[Array, "E O I"], sizes: Int[Array, "E"]
) -> Float[Array, "M O"]:
    """Rows of x times their expert's weight, in float32; the first sizes[0] rows are expert 0's.

    What rows behind the last expert's become is undefined. Of XLA only TPU's has a product for
    this: elsewhere its ragged_dot multiplies every row, masked, by every expert.
    """
    return _by_platform(_by_tiles, _ragged_dot, x, weight, sizes, cuda=_by_kernel)


def _product_forward(x, weight, sizes):
    return grouped_product(x, weight, sizes), (x, weight, sizes)


def _product_backward(saved, d_y: Float[Array, "M O"]):
    x, weight, sizes = saved
    is_owned = lax.iota(jnp.int32, len(x))[:, None] < jnp.sum(sizes)
    d_y = jnp.where(is_owned, d_y, 0.0).astype(weight.dtype)
    d_x, d_weight = _by_platform(_tiles_backward, _ragged_backward, x, weight, sizes, d_y)
    return jnp.where(is_owned, d_x, 0.0).astype(x.dtype), d_weight.astype(weight.dtype), None


grouped_product.defvjp(_product_forward, _product_backward)


def _by_platform(by_tiles, ragged, x, weight, sizes, *others, **kernels):
    tiled = functools.partial(by_tiles, tile=_tile(len(x), len(weight)))
    branches = {"cpu": tiled, "tpu": ragged, "default": functools.partial(tiled, is_static=True)}
    return lax.platform_dependent(x, weight, sizes, *others, **branches | kernels)


def _by_kernel(x, weight, sizes, *, interpret: bool = False):
    """All tiles in one launch."""
    tile = max(_tile(len(x), len(weight)), 16)  # rows of a matrix unit
    tiles = Tiles.of(sizes, len(x), tile)
    places = tiles.rows, tiles.experts, tiles.n_rows
    return tiles_product(x, weight, *places, tile=tile, interpret=interpret)


def _ragged_dot(x, weight, sizes):
    return lax.ragged_dot(x, weight.swapaxes(1, 2), sizes, preferred_element_type=jnp.float32)


def _ragged_backward(x, weight, sizes, d_y):
    d_x = lax.ragged_dot(d_y, weight, sizes, preferred_element_type=jnp.float32)
    rows = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    d_weight = lax.ragged_dot_general(d_y, x, sizes, rows, preferred_element_type=jnp.float32)
    return d_x, d_weight


def _tile(n_rows: int, n_experts: int) -> int:
    """A power of two near the rows that an expert may expect, so that few are padding."""
    tile = 8
    while tile < 128 and tile * n_experts < n_rows:
        tile *= 2
    return tile


class Tiles(NamedTuple):
    """Tiles of rows, none of which has rows of two experts that count; those that are too many go
    behind all rows.
    """

    n: Int[Array, ""]
    rows: Int[Array, "n"]  # the first of each
    experts: Int[Array, "n"]
    n_rows: Int[Array, "n"]  # that are its expert's; what follows is another's

    @classmethod
    def of(cls, sizes: Int[Array, "E"], n_rows: int, tile: int) -> "Tiles":
        n_tiles = (sizes + tile - 1) // tile
        last_tile = jnp.cumsum(n_tiles)
        index = jnp.arange(n_rows // tile + min(n_rows, len(sizes)), dtype=jnp.int32)
        expert = jnp.searchsorted(last_tile, index, side="right", method="compare_all")
        expert = jnp.minimum(expert, len(sizes) - 1)
        offset = (index - (last_tile - n_tiles)[expert]) * tile
        is_needed = index < last_tile[-1]
        row = jnp.where(is_needed, (jnp.cumsum(sizes) - sizes)[expert] + offset, n_rows)
        n_own = jnp.where(is_needed, jnp.minimum(sizes[expert] - offset, tile), 0)
        return cls(last_tile[-1], row, expert, n_own)

    def loop(self, body, start, is_static: bool):
        """is_static: over as many tiles as there may be, so that a GPU need not tell the host how
        many there are.
        """
        return lax.fori_loop(0, len(self.rows) if is_static else self.n, body, start)


def _by_tiles(x, weight, sizes, *, tile: int, is_static: bool = False):
    """A tile may reach into the next expert's rows: that expert's own tiles, which come later,
    overwrite them.
    """
    tiles = Tiles.of(sizes, len(x), tile)
    padded_x = jnp.pad(x, ((0, tile), (0, 0)))

    def multiply(i, out):
        rows = lax.dynamic_slice_in_dim(padded_x, tiles.rows[i], tile)
        own = lax.dynamic_index_in_dim(weight, tiles.experts[i], keepdims=False)
        return lax.dynamic_update_slice_in_dim(out, product(rows, own), tiles.rows[i], 0)

    out = jnp.zeros((len(x) + tile, weight.shape[1]), jnp.float32)
    return tiles.loop(multiply, out, is_static)[: len(x)]


def _tiles_backward(x, weight, sizes, d_y, *, tile: int, is_static: bool = False):
    """Gradients of x and of the weights."""
    tiles = Tiles.of(sizes, len(x), tile)
    x, d_y = (jnp.pad(rows, ((0, tile), (0, 0))) for rows in (x, d_y))

    def multiply(i, gradients):
        d_x, d_weight = gradients
        expert, is_own = tiles.experts[i], lax.iota(jnp.int32, tile) < tiles.n_rows[i]
        rows, d_rows = (lax.dynamic_slice_in_dim(a, tiles.rows[i], tile) for a in (x, d_y))
        d_rows = jnp.where(is_own[:, None], d_rows, 0)
        own = lax.dynamic_index_in_dim(weight, expert, keepdims=False)
        made = jnp.einsum("to,oi->ti", d_rows, own, preferred_element_type=jnp.float32)
        d_x = lax.dynamic_update_slice_in_dim(d_x, made, tiles.rows[i], 0)
        made = jnp.einsum("to,ti->oi", d_rows, rows, preferred_element_type=jnp.float32)
        return d_x, d_weight.at[expert].add(made)

    start = jnp.zeros(x.shape, jnp.float32), jnp.zeros(weight.shape, jnp.float32)
    d_x, d_weight = tiles.loop(multiply, start, is_static)
    return d_x[:-tile], d_weight
