"""Whole engine steps of Llama models, compiled by the real compilers for absent accelerators."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks.gpu.launches import WHOLE, launches_of, of_a_layer
from fastgen_jax.checkpoints.loading import abstract_model
from fastgen_jax.engine import batch
from fastgen_jax.engine.batch import MaskedShape, packed_size
from fastgen_jax.engine.constraint import mask_width
from fastgen_jax.engine.sampling import RowParams, RowTables, adjust
from fastgen_jax.engine.startup import BACKENDS
from fastgen_jax.engine.step import Program, masked_step
from fastgen_jax.models.layers import Policy
from fastgen_jax.models.layout import HeadLayout
from fastgen_jax.models.row_tiles import row_tile
from tests import targets
from tests.engine.whole_steps import (
    LLAMA_2_7B,
    LLAMA_3_8B,
    N_SEQS,
    N_TOKENS,
    QWEN3_8B,
    ROW_TABLES,
    SMALL,
    compile_step,
    make_target,
    placed_params,
)

# Newer versions of jax give it when a program is lowered.
pytestmark = [
    pytest.mark.compile,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),
]

# Pairs of layers whose heads, and vocabularies, eight devices do not divide.
QWEN2_7B = dataclasses.replace(
    SMALL, vocab_size=32001, hidden_size=3584, n_heads=28, ffn_size=18944, qkv_bias=True
)
PHI_4 = dataclasses.replace(
    SMALL, vocab_size=32002, hidden_size=5120, n_heads=40, n_kv_heads=10, ffn_size=17920
)


@pytest.mark.parametrize(("chip", "n_devices"), [("h100", 1), ("v6e", 1), ("h100", 4)])
def test_drawing_with_masks_needs_little_memory_beside_the_logits(chip, n_devices):
    target, config = make_target(chip, n_devices), SMALL
    model = abstract_model(config, Policy("bfloat16", "bfloat16", target.mesh))
    backend = BACKENDS["gpu" if target.platform == "cuda" else "tpu"]
    program = Program(
        jax.tree.structure(model), backend.attention, target.mesh, backend.sample_tile
    )
    shape = MaskedShape(N_SEQS, mask_width(config.vocab_size))
    compiled = target.compile(
        functools.partial(masked_step, program=program, shape=shape),
        placed_params(model, target.mesh),
        jax.ShapeDtypeStruct((N_SEQS + 1, config.max_position), jnp.int32),
        jax.ShapeDtypeStruct((N_SEQS, config.hidden_size), jnp.bfloat16),
        jax.ShapeDtypeStruct((packed_size(shape),), jnp.int32),
        ROW_TABLES,
        donate_argnums=(1,),
    )
    memory = compiled.memory_analysis()
    logits = N_SEQS * config.vocab_size * 4
    assert memory.alias_size_in_bytes >= (N_SEQS + 1) * config.max_position * 4
    assert memory.temp_size_in_bytes < 12 * logits


def test_penalties_are_counted_on_a_tpu_without_sorting_what_was_said():
    target, n_rows = make_target("v5e"), 64
    n_params = len(batch.FLOAT_PARAMS) + len(batch.INT_PARAMS)
    packed = jax.ShapeDtypeStruct((n_rows, n_params), jnp.int32)
    int32 = jax.ShapeDtypeStruct((n_rows,), jnp.int32)
    compiled = target.compile(
        adjust,
        jax.ShapeDtypeStruct((n_rows, LLAMA_3_8B.vocab_size), jnp.float32),
        jax.eval_shape(RowParams.unpack, packed),
        RowTables(jax.ShapeDtypeStruct((n_rows + 1, 512), jnp.int32), *ROW_TABLES),
        int32,
        int32,
    )
    text = compiled.as_text()
    assert " while(" in text  # a row after the other: with all at once there are four sorts
    assert " sort(" not in text  # which took a third of a step's compilation


# Model, chip, devices, GiB of cache on each, what it is of: as a user would serve it.
WHOLE_STEPS = [
    pytest.param(LLAMA_3_8B, "v6e", 1, 8, "bfloat16", id="Llama-3-8B-v6e"),
    pytest.param(LLAMA_2_7B, "v5e", 4, 8, "bfloat16", id="Llama-2-7B-2x2-v5e"),
    pytest.param(LLAMA_3_8B, "h100", 8, 32, "bfloat16", id="Llama-3-8B-8-h100"),
    pytest.param(LLAMA_2_7B, "h100", 1, 32, "bfloat16", id="Llama-2-7B-h100"),
    pytest.param(SMALL, "v5e", 4, 1, "int8", id="small-2x2-v5e-int8"),
    pytest.param(SMALL, "h100", 1, 1, "float8_e4m3fn", id="small-h100-fp8"),
]


@pytest.mark.parametrize(("config", "chip", "n_devices", "cache_gib", "kv_dtype"), WHOLE_STEPS)
def test_whole_step_never_copies_a_layers_cache(config, chip, n_devices, cache_gib, kv_dtype):
    target = make_target(chip, n_devices)
    compiled, cache_bytes = compile_step(
        config, target, cache_bytes=cache_gib << 30, kv_dtype=kv_dtype
    )
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    logits, ffn = 4 * N_SEQS * config.vocab_size, 4 * N_TOKENS * config.ffn_size
    # Sampling sorts logits. With a copy of one layer's cache, each of these would be over it.
    assert memory.temp_size_in_bytes < 6 * logits + 3 * ffn


@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_temporaries_of_a_step_do_not_grow_with_the_cache(chip):
    steps = [
        compile_step(SMALL, make_target(chip), attention="xla", cache_bytes=size << 20)
        for size in (64, 1024)
    ]
    small, large = (compiled.memory_analysis() for compiled, _ in steps)
    cache_bytes = steps[1][1]
    assert large.alias_size_in_bytes >= cache_bytes
    assert large.temp_size_in_bytes - small.temp_size_in_bytes < 0.01 * cache_bytes


@pytest.mark.parametrize(
    ("config", "chip", "n_devices"),
    [
        pytest.param(SMALL, "v5e", 4, id="2x2-v5e"),
        pytest.param(SMALL, "h100", 4, id="4-h100"),
        pytest.param(QWEN2_7B, "v5e", 8, id="Qwen2-7B-2x4-v5e"),
        pytest.param(QWEN2_7B, "h100", 8, id="Qwen2-7B-8-h100"),
        pytest.param(PHI_4, "v5e", 8, id="Phi-4-2x4-v5e"),
        pytest.param(PHI_4, "h100", 8, id="Phi-4-8-h100"),
    ],
)
def test_tensor_parallel_step_sums_twice_a_layer_and_moves_no_cache(config, chip, n_devices):
    compiled, cache_bytes = compile_step(config, make_target(chip, n_devices))
    assert compiled.memory_analysis().alias_size_in_bytes >= cache_bytes
    text = compiled.as_text()
    moved = [line for line in text.splitlines() if re.search(targets.COLLECTIVE, line)]
    sums = [line for line in moved if f"[{N_TOKENS},{config.hidden_size}]" in line]
    assert len(sums) == 2 * config.n_layers
    # All else belongs to drawing and scoring, whose rows of logits are split by the vocabulary.
    others = [line for line in moved if line not in sums and "op_name=" in line]
    assert not [line for line in others if not re.search(r"/(sample|score)/", line)]
    whole_cache = rf"\[\d+,{HeadLayout.of(config, n_devices).n_kv_slots},2,"
    assert not re.search(whole_cache, text)


@pytest.mark.parametrize("chip", ["h100", "v5e"])
def test_products_of_a_deterministic_step_have_the_rows_of_a_tile_not_those_of_a_batch(chip):
    compiled, _ = compile_step(
        SMALL,
        make_target(chip),
        attention="invariant",
        row_tile=row_tile("gpu"),
        cache_bytes=1 << 26,
    )
    kind = r" (dot|convolution)\(|custom_call_target=\"__(cublas|triton)"
    products = [line for line in compiled.as_text().splitlines() if re.search(kind, line)]
    assert len(products) >= 4 * SMALL.n_layers + 1
    sizes = [re.findall(r"\[([\d,]+)\]", line.split("metadata=")[0]) for line in products]
    assert not [line for line in sizes if str(N_TOKENS) in ",".join(line).split(",")]


@pytest.mark.parametrize(("chip", "n_tokens"), [("h100", 512), ("a100", 32)])
def test_gpu_launches_a_step_at_once_and_the_host_waits_for_none_of_it(chip, n_tokens):
    config = dataclasses.replace(SMALL, n_layers=1)
    found = launches_of(config, chip, n_tokens)
    assert (found.n_graphs, found.n_alone, found.n_waits) == (1, 0, 0)


@pytest.mark.parametrize(
    ("config", "most"),
    [pytest.param(LLAMA_3_8B, 12, id="Llama-3-8B"), pytest.param(QWEN3_8B, 13, id="Qwen3-8B")],
)
def test_a_layer_on_a_gpu_is_few_launches_where_no_product_is_split(config, most):
    """Norms of queries and keys by themselves would be 15.5."""
    added, _ = of_a_layer(config, "h100", 32, **WHOLE)
    assert sum(added.values()) <= most
