"""Heads, rows and experts on devices that they do not divide into, against one device."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.startup import layout_of
from fastgen_jax.engine.types import Request
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.layout import EMPTY, HeadLayout, places, taken
from fastgen_jax.models.sharding import SPLITS, laid_out, lines_of, make_mesh, place
from fastgen_jax.sampling_params import SamplingParams
from tests.models.test_golden import GOLDEN, NAMES, TOLERANCE, logits_of
from tests.tiny import OPTIONS, one_program, random_requests, run, tokens, write_config

# At least one for each way that a parameter is split.
SAMPLED = ("biases", "bloom_six_heads", "deepseek_v2", "falcon_7b", "gpt_oss", "mpt_six_heads")
SAMPLED += ("olmo2", "qwen2_moe", "stablelm_parallel")
HEADS = st.tuples(st.integers(1, 20), st.integers(1, 16), st.integers(1, 16))  # K, G, devices


def layout(n_kv_heads: int, group_size: int, n_shards: int) -> HeadLayout:
    return HeadLayout(n_kv_heads * group_size, n_kv_heads, n_shards)


def model_config(n_heads: int, n_kv_heads: int, **fields) -> ModelConfig:
    shape = {"vocab_size": 64, "hidden_size": 16, "n_layers": 1, "head_dim": 4, "ffn_size": 32}
    shape |= {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "max_position": 64}
    return ModelConfig(family="llama", **shape | fields)


@given(heads=HEADS)
def test_every_query_has_one_slot_beside_a_copy_of_its_kv_head(heads):
    n_kv_heads, group_size, _ = heads
    slots = layout(*heads)
    queries = slots.queries(np.arange(slots.n_heads), EMPTY)
    keys = slots.keys(np.arange(n_kv_heads), EMPTY)
    assert sorted(queries[queries != EMPTY].tolist()) == list(range(slots.n_heads))
    kv_slot, _ = np.nonzero(queries != EMPTY)
    assert (keys[kv_slot] == queries[queries != EMPTY] // group_size).all()
    assert np.bincount(keys[keys != EMPTY]).tolist() == [slots.n_copies] * n_kv_heads


@given(heads=HEADS)
def test_devices_have_as_few_slots_as_whole_heads_allow(heads):
    n_kv_heads, group_size, n_shards = heads
    slots = layout(*heads)
    assert slots.n_own_kv_slots == -(-n_kv_heads // n_shards)
    assert slots.n_kv_slots == n_shards * slots.n_own_kv_slots
    fewer = slots.group_size - 1
    assert fewer * slots.n_copies < group_size <= slots.group_size * slots.n_copies


@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "n_shards", "n_kv_slots", "group_size"),
    [
        (32, 8, 8, 8, 4),  # divides
        (64, 4, 8, 8, 8),  # Qwen3 235B: two copies, half of the queries at each
        (28, 4, 8, 8, 4),  # Qwen2 7B
        (40, 10, 4, 12, 4),  # Phi-4: no copies, which would fill the cache
        (8, 1, 2, 2, 4),  # Gemma 2B
        (4, 2, 8, 8, 1),  # more devices than heads
    ],
)
def test_slots_of_known_models(n_heads, n_kv_heads, n_shards, n_kv_slots, group_size):
    slots = HeadLayout(n_heads, n_kv_heads, n_shards)
    assert (slots.n_kv_slots, slots.group_size) == (n_kv_slots, group_size)


def test_queries_are_dealt_out_to_the_copies_of_their_kv_head():
    slots = HeadLayout(10, 2, 5)
    assert slots.queries(np.arange(10), EMPTY).tolist() == [
        [0, 1, 2], [3, 4, EMPTY], [5, 6, 7], [8, 9, EMPTY], [EMPTY] * 3,
    ]  # fmt: skip
    assert slots.keys(np.arange(2), EMPTY).tolist() == [0, 0, 1, 1, EMPTY]


@given(heads=HEADS, ffn_size=st.integers(1, 40))
def test_no_line_is_lost_and_only_kv_heads_have_copies(heads, ffn_size):
    n_kv_heads, group_size, n_shards = heads
    config = model_config(n_kv_heads * group_size, n_kv_heads)
    sizes = {"queries": 2 * config.n_heads, "keys": 2 * n_kv_heads}
    sizes |= {"qkv": 2 * n_kv_heads * (group_size + 2), "gate_up": 2 * ffn_size, "even": ffn_size}
    for kind, size in sizes.items():
        lines = places(kind, size, config, n_shards)
        assert len(lines) % n_shards == 0
        counts = np.bincount(lines[lines != EMPTY], minlength=size)
        n_copies = layout(*heads).n_copies if kind in ("keys", "qkv") else 1
        assert set(counts.tolist()) <= {1, n_copies}


@given(ffn_size=st.integers(1, 40), n_shards=st.integers(1, 9))
def test_each_device_has_the_ups_of_its_gates(ffn_size, n_shards):
    lines = places("gate_up", 2 * ffn_size, model_config(4, 4), n_shards)
    gates, ups = np.moveaxis(lines.reshape(n_shards, 2, -1), 1, 0)
    assert (ups[gates != EMPTY] == gates[gates != EMPTY] + ffn_size).all()
    assert (ups[gates == EMPTY] == EMPTY).all()


@given(st.lists(st.integers(-1, 9), min_size=1, max_size=12), st.integers(0, 1))
def test_lines_are_taken_as_one_by_one(lines, axis):
    array = np.arange(1, 101).reshape(10, 10)
    one_by_one = [array.take(i, axis) if i != EMPTY else 0 * array[0] for i in lines]
    found = taken(array, np.array(lines), axis)
    np.testing.assert_array_equal(found, np.stack(one_by_one, axis))


@pytest.mark.parametrize("path", SPLITS)
def test_one_device_has_every_parameter_as_it_is_stored(path):
    assert lines_of(f"layers.0.{path}", (60, 60, 60), model_config(6, 2), 1) is None


@pytest.mark.parametrize("path", ["attention.qkv.weight", "attention.out.weight", "mlp.down"])
@pytest.mark.parametrize("n_shards", [3, 8])
def test_parameters_lie_alike_from_the_host_and_from_a_program(path, n_shards):
    config, path = model_config(6, 2), f"layers.0.{path}"
    array = np.random.default_rng(0).normal(size=(60, 60)).astype(np.float32)
    from_host = place(path, array, config, make_mesh(n_shards))
    assert len(from_host.sharding.device_set) == n_shards
    in_program = laid_out(path, jnp.array(array), config, n_shards)
    np.testing.assert_array_equal(from_host, in_program)


@pytest.mark.parametrize(
    ("name", "n_devices"),
    [
        *((name, 5) for name in SAMPLED),
        *(pytest.param(name, 8, marks=pytest.mark.exhaustive) for name in SAMPLED),
        *(pytest.param(n, 5, marks=pytest.mark.exhaustive) for n in NAMES if n not in SAMPLED),
    ],
)
def test_logits_on_devices_that_nothing_divides_into_equal_hugging_face(name, n_devices):
    with np.load(GOLDEN / name / "golden.npz", allow_pickle=False) as arrays:
        known = np.concatenate([arrays["prompt_ids"], arrays["greedy_ids"][:-1]])
        expected = arrays["logits"]
    logits = logits_of(name, known, n_devices)
    assert logits.shape == expected.shape  # no column more than the vocabulary has
    assert np.abs(logits - expected).max() <= TOLERANCE


# What config.json changes of tests.tiny.CONFIG, and devices.
SHAPES = {
    "Qwen2 7B's heads": ({"num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 4}, 8),
    "Phi-4's heads": ({"num_attention_heads": 40, "num_key_value_heads": 10, "head_dim": 4}, 4),
    "one KV head": ({"num_key_value_heads": 1}, 2),
    "odd sizes": ({"vocab_size": 63, "intermediate_size": 65, "tie_word_embeddings": False}, 4),
}


@pytest.mark.parametrize("name", SHAPES)
def test_engine_on_several_devices_makes_the_tokens_of_one(tmp_path, name):
    changes, n_devices = SHAPES[name]
    config = EngineConfig(model=write_config(tmp_path, **changes), **OPTIONS)
    several = dataclasses.replace(config, tensor_parallel_size=n_devices)
    drawn = {"temperature": 1.5, "top_p": 0.9, "seed": 3, "logprobs": 5}
    requests = [
        *random_requests(1, 3, max_tokens=12),
        Request([5, 6, 7], SamplingParams(max_tokens=12, ignore_eos=True, **drawn)),
    ]
    expected, found = (run(one_program(c), requests) for c in (config, several))
    assert [tokens(outputs) for outputs in found] == [tokens(outputs) for outputs in expected]


def test_cache_of_a_device_has_its_slots(tmp_path):
    changes, n_devices = SHAPES["Phi-4's heads"]
    options = OPTIONS | {"tensor_parallel_size": n_devices}
    engine = one_program(EngineConfig(model=write_config(tmp_path, **changes), **options))
    cache = engine._runner.state.caches[0].cells
    own = cache.sharding.shard_shape(cache.shape)
    assert own[1] == 3
    assert np.prod(own[1:]) == layout_of(engine.config, engine.model_config).block_elements
