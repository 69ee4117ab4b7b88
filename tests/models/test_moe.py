"""Mixtures of experts against plain loops over tokens and experts."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen_jax.checkpoints.loading import flat_params
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.types import Request
from fastgen_jax.errors import ConfigError
from fastgen_jax.models import moe as moe_file
from fastgen_jax.models.config import ModelConfig, MoeConfig
from fastgen_jax.models.layers import Policy
from fastgen_jax.models.moe import MoE, _by_kernel, _by_tiles, _ragged_dot, grouped_product, route
from fastgen_jax.models.sharding import make_mesh
from fastgen_jax.sampling_params import SamplingParams
from tests.tiny import one_program, run, tokens

GOLDEN = Path(__file__).parents[1] / "golden"

MOE = MoeConfig(n_experts=8, n_chosen=3, ffn_size=24, layers=(0, 1))
ROUTES = {
    "softmax": {},
    "normalised": {"normalise": True, "scale": 2.5},
    "chosen": {"scores": "chosen", "scale": 0.5},
    "sigmoid": {"scores": "sigmoid", "normalise": True},
    "each chosen": {"scores": "each_chosen", "scale": 0.5},
    "sparsemixer": {"scores": "sparsemixer", "tolerance": 0.6},
    "groups": {"n_groups": 4, "n_chosen_groups": 2},
    "all groups": {"n_groups": 4, "n_chosen_groups": 4},
    "sigmoid groups": {"scores": "sigmoid", "n_groups": 2, "scale": 1.5, "score_bias": True},
}
PRODUCTS = {
    "tiles of 2": lambda *arrays: _by_tiles(*arrays, tile=2),
    "tiles of 8": lambda *arrays: _by_tiles(*arrays, tile=8),
    "as many tiles as may be": lambda *arrays: _by_tiles(*arrays, tile=2, is_static=True),
    "kernel for GPUs": jax.jit(functools.partial(_by_kernel, interpret=True)),
    "ragged_dot": _ragged_dot,
    "chosen by platform": grouped_product,
}


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def route_one(logits: np.ndarray, score_bias: np.ndarray, moe: MoeConfig) -> dict[int, float]:
    """The experts of one token and their weights, as the papers say it."""
    if moe.scores == "sparsemixer":
        return sparsemixer_one(logits, moe)
    if moe.scores == "chosen":
        best = np.argsort(-logits)[: moe.n_chosen]
        return dict(zip(best.tolist(), moe.scale * softmax(logits[best]), strict=True))
    if moe.scores == "each_chosen":
        best = np.argsort(-logits)[: moe.n_chosen]
        return {int(i): float(moe.scale / (1 + np.exp(-logits[i]))) for i in best}
    scores = softmax(logits) if moe.scores == "softmax" else 1 / (1 + np.exp(-logits))
    groups = np.split(np.arange(moe.n_experts), moe.n_groups)
    choice = scores + score_bias
    n_counted = 2 if moe.score_bias else 1
    groups.sort(key=lambda group: -np.sort(choice[group])[-n_counted:].sum())
    allowed = np.concatenate(groups[: moe.n_chosen_groups])
    best = allowed[np.argsort(-choice[allowed])][: moe.n_chosen]
    total = scores[best].sum() if moe.normalise else 1.0
    return {int(i): float(moe.scale * scores[i] / total) for i in best}


def sparsemixer_one(logits: np.ndarray, moe: MoeConfig) -> dict[int, float]:
    left, found = dict(enumerate(logits)), {}
    while len(found) < moe.n_chosen:
        best = max(left, key=left.__getitem__)
        top = left.pop(best)
        near = [x for x in left.values() if (top - x) / max(abs(x), top) <= moe.tolerance]
        found[best] = softmax(np.array([top, *near]))[0]
    return found


@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize("name", ROUTES)
def test_route_chooses_and_weighs_as_a_loop_over_tokens(name, has_biases):
    moe = dataclasses.replace(MOE, **ROUTES[name])
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (200, moe.n_experts)).astype(np.float32)
    router_bias, score_bias = rng.normal(-1, 1, (2, 1, moe.n_experts)).astype(np.float32)
    score_bias = score_bias if moe.score_bias else 0 * score_bias
    if not has_biases:
        router_bias, score_bias = 0 * router_bias, 0 * score_bias
    weights, experts = map(np.asarray, route(logits, router_bias, score_bias, moe))
    assert weights.shape == experts.shape == (200, moe.n_chosen)
    for token in range(200):
        expected = route_one((logits + router_bias)[token], score_bias[0], moe)
        assert set(experts[token].tolist()) == set(expected)
        wanted = [expected[i] for i in experts[token].tolist()]
        np.testing.assert_allclose(weights[token], wanted, rtol=1e-5)


def loop_product(x: np.ndarray, weight: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    rows = np.split(x, np.cumsum(sizes))
    return np.concatenate([a @ w.T for a, w in zip(rows, weight, strict=False)])


SIZES = st.lists(st.sampled_from((0, 0, 1, 2, 7, 8, 9, 16)), min_size=1, max_size=5)


@pytest.mark.parametrize("name", PRODUCTS)
@given(sizes=SIZES, draw=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_grouped_product_equals_a_loop_over_experts(name, sizes, draw):
    rng = np.random.default_rng(draw)
    sizes = [*sizes, *[0] * (5 - len(sizes))] if len(sizes) > 1 else sizes
    n_rows = max(-(-sum(sizes) // 16), 1) * 16  # few shapes to compile; often some rows behind
    x = rng.normal(size=(n_rows, 5)).astype(np.float32)
    weight = rng.normal(size=(len(sizes), 3, 5)).astype(np.float32)
    out = PRODUCTS[name](jnp.array(x), jnp.array(weight), jnp.array(sizes, jnp.int32))
    assert out.shape == (n_rows, 3)
    assert out.dtype == jnp.float32
    expected = loop_product(x, weight, np.array(sizes))
    np.testing.assert_allclose(out[: sum(sizes)], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "n_tiles"),
    [((0, 0, 0, 0), 0), ((40, 0, 0, 0), 5), ((1, 1, 1, 1), 4), ((8, 9, 0, 1), 4)],
)
def test_products_are_as_many_as_tiles(monkeypatch, sizes, n_tiles):
    shapes = []

    def counted(x, weight):
        shapes.append((x.shape, weight.shape))
        return x @ weight.T

    monkeypatch.setattr(moe_file, "product", counted)
    x, weight = jnp.ones((48, 5), jnp.float32), jnp.ones((4, 3, 5), jnp.float32)
    with jax.disable_jit():
        _by_tiles(x, weight, jnp.array(sizes, jnp.int32), tile=8)
    assert shapes == [((8, 5), (3, 5))] * n_tiles


@pytest.mark.parametrize(("n_rows", "tile"), [(1, 8), (64, 8), (65, 16), (512, 64), (10**5, 128)])
def test_a_tile_is_near_the_rows_of_one_of_8_experts(n_rows, tile):
    assert moe_file._tile(n_rows, 8) == tile


def model_config(moe: MoeConfig, **fields) -> ModelConfig:
    shape = {"vocab_size": 64, "hidden_size": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4}
    shape |= {"head_dim": 4, "ffn_size": 32, "max_position": 64}
    return ModelConfig(family="mixtral", **shape | fields, moe=moe)


def make_moe(moe: MoeConfig, n_devices: int = 1) -> MoE:
    """The same random weights, biases included, whatever the devices."""
    policy = Policy(mesh=make_mesh(n_devices))
    made = MoE(model_config(moe), policy=policy, rngs=nnx.Rngs(0))
    for i, (path, variable) in enumerate(sorted(flat_params(made).items())):
        if "bias" in path:
            variable[...] = jax.random.normal(jax.random.key(i), variable.shape, jnp.float32)
    return made


@pytest.mark.parametrize(("clamp", "weighs_input"), [(None, False), (1.5, False), (None, True)])
def test_output_is_the_weighted_sum_over_each_tokens_experts(clamp, weighs_input):
    biases = {"router_bias": True, "expert_bias": True}
    moe = dataclasses.replace(MOE, scores="chosen", clamp=clamp, **biases)
    moe = dataclasses.replace(moe, weighs_input=weighs_input)
    layer = make_moe(moe)
    params = {name: np.asarray(v[...], np.float64) for name, v in flat_params(layer).items()}
    x = np.random.default_rng(1).normal(0, 2, (9, 16)).astype(np.float32)
    expected = np.zeros((9, 16))
    for token, logits in enumerate(x @ params["router"].T + params["router_bias"]):
        for e, weight in route_one(logits, np.zeros(8), moe).items():
            before, after = (weight, 1.0) if weighs_input else (1.0, weight)
            both = params["gate_up"][e] @ (before * x[token]) + params["gate_up_bias"][e]
            gate, up = np.split(both, 2)
            if clamp is None:
                hidden = gate / (1 + np.exp(-gate)) * up
            else:
                assert np.abs(both).max() > clamp
                gate, up = np.minimum(gate, clamp), np.clip(up, -clamp, clamp)
                hidden = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
            expected[token] += after * (params["down"][e] @ hidden + params["down_bias"][e])
    np.testing.assert_allclose(layer(jnp.array(x)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_devices", [2, 4])
@pytest.mark.parametrize("n_tokens", [1, 40])
def test_experts_on_several_devices_sum_to_the_same(n_devices, n_tokens):
    moe = dataclasses.replace(MOE, expert_bias=True, router_bias=True, score_bias=True)
    x = jax.random.normal(jax.random.key(1), (n_tokens, 16), jnp.float32)
    alone = make_moe(moe)(x)
    together = nnx.jit(make_moe(moe, n_devices))(x)
    assert np.abs(alone).max() > 0.1
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_chosen": 9}, "9 experts per token of 8 experts"),
        (
            {"scores": "tanh"},
            "scores='tanh'.*known: softmax, chosen, sigmoid, sparsemixer, each_chosen",
        ),
        ({"n_groups": 3}, "8 experts .* 3 groups"),
        ({"n_groups": 4, "n_chosen_groups": 5}, "5 of 4 groups"),
        ({"n_groups": 4, "n_chosen_groups": 1}, "3 experts .* 2 "),
        ({"n_groups": 8, "n_chosen_groups": 3, "score_bias": True}, "at least two experts"),
    ],
)
def test_impossible_mixtures_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(MOE, **changes)


@pytest.mark.parametrize(
    ("name", "n_devices"),
    [
        *[("mixtral", 2), ("qwen2_moe", 2), ("gpt_oss", 4), ("deepseek_v2_lite", 8)],
        *[("deepseek_v3", 4), ("granitemoeshared", 4), ("llama4_text", 4)],
    ],
)
def test_engine_on_several_devices_makes_the_tokens_of_hugging_face(name, n_devices):
    with np.load(GOLDEN / name / "golden.npz", allow_pickle=False) as golden:
        prompt, expected = golden["prompt_ids"].tolist(), golden["greedy_ids"].tolist()
    options = {"max_model_len": 256, "num_kv_blocks": 64, "max_num_batched_tokens": 32}
    options |= {"max_num_seqs": 2, "tensor_parallel_size": n_devices}
    engine = one_program(EngineConfig(model=str(GOLDEN / name), **options))
    params = SamplingParams(max_tokens=len(expected), temperature=0.0, ignore_eos=True)
    (outputs,) = run(engine, [Request(prompt, params)])
    assert tokens(outputs) == expected
    held = {a.sharding.shard_shape(a.shape)[0] for a in engine._runner.leaves if a.ndim == 3}
    n_experts = engine.model_config.moe.n_experts
    assert held == {-(-n_experts // n_devices)}  # on each device


def test_experts_that_a_kernel_cannot_address_are_refused():
    weight = jax.ShapeDtypeStruct((8, 65536, 6144), jnp.bfloat16)
    x, sizes = jax.ShapeDtypeStruct((16, 6144), jnp.bfloat16), jax.ShapeDtypeStruct((8,), jnp.int32)
    with pytest.raises(ValueError, match="larger tensor_parallel_size"):
        jax.eval_shape(_by_kernel, x, weight, sizes)
