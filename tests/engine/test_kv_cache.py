"""A quantised KV cache behind the engine's promises: same tokens however they come about."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.checkpoints.directory import read_config
from fastgen_jax.engine import startup, step
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.types import Request
from fastgen_jax.models.sharding import make_mesh
from fastgen_jax.sampling_params import SamplingParams
from pallas_kernels.cpu.build import library
from tests.engine import test_deterministic as deterministic
from tests.engine.test_engine import interpreted
from tests.golden import agreement
from tests.tiny import (
    Naive,
    assert_idle,
    make_engine,
    one_program,
    random_requests,
    run,
    tokens,
    write_config,
)

GOLDEN = Path(__file__).parents[1] / "golden"
DTYPES = "int8", "fp8"
SIZES = {"max_model_len": 256, "block_size": 8, "num_kv_blocks": 64, "max_num_batched_tokens": 23,
         "max_num_seqs": 4, "dtype": "float32"}  # fmt: skip
N_NEW = 24
BACKENDS = [
    "reference",
    "xla",
    "invariant",
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            not library().exists(),
            reason="pallas_kernels.cpu is not built: `make setup`, with a compiler",
        ),
    ),
]
# A key or value between two steps of its grid may be rounded up by one program and down by another,
# whose sums differ in their last bit: few are. Measured: at most 6e-4, medians up to 2e-5.
ROUNDED_OTHERWISE = 5e-3
ALIKE = 1e-4


def on_golden(name: str, **options) -> Engine:
    return one_program(EngineConfig(model=str(GOLDEN / name), **SIZES | options))


def assert_equals_slow_twin(engine: Engine, name: str) -> None:
    prompt = agreement.prompt_of(name)
    params = SamplingParams(max_tokens=N_NEW, temperature=0.0, ignore_eos=True, logprobs=0)
    (outputs,) = run(engine, [Request(prompt, params)])
    naive = Naive(engine, 256)
    assert tokens(outputs) == naive.greedy(prompt, N_NEW)
    known = np.array([*prompt, *tokens(outputs)])
    said = [output.logprobs.logprob for output in outputs]
    differences = np.abs(agreement.logprobs_of(naive.logits(known), known) - said)
    assert np.median(differences) < ALIKE
    assert differences.max() < ROUNDED_OTHERWISE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_makes_the_tokens_of_a_slow_twin_with_a_rounded_cache(backend, dtype):
    engine = on_golden("gqa", kv_cache_dtype=dtype, attention_backend=backend)
    assert_equals_slow_twin(engine, "gqa")
    assert_idle(engine)


# Sinks and a window; latent attention; a soft cap; ALiBi; each of two layers' windows; one KV head.
GOLDENS = ["gpt_oss", "deepseek_v3", "gemma2", "bloom", "mistral", "mqa_tied"]
CHOICES = [
    pytest.param(n, d, marks=() if (i + j) % 2 == 0 else pytest.mark.exhaustive)
    for i, n in enumerate(GOLDENS)
    for j, d in enumerate(DTYPES)
]


@pytest.mark.parametrize(("name", "dtype"), CHOICES)
def test_every_kind_of_attention_makes_the_tokens_of_its_slow_twin(name, dtype):
    assert_equals_slow_twin(on_golden(name, kv_cache_dtype=dtype), name)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("pallas_gpu", "int8"), ("pallas_gpu", "fp8"), ("pallas_tpu", "int8")]
)
def test_interpreted_kernels_make_the_same_tokens(tmp_path, monkeypatch, backend, dtype):
    options = EngineConfig(
        model=write_config(tmp_path, hidden_size=64, num_hidden_layers=1),  # heads of 16
        load_format="dummy",
        block_size=128,
        num_kv_blocks=16,
        max_num_batched_tokens=8,
        max_num_seqs=2,
        kv_cache_dtype=dtype,
    )
    requests = random_requests(16, 2, longest=50, max_tokens=6)
    expected = [tokens(o) for o in run(one_program(options), requests)]
    cpu = dataclasses.replace(startup.BACKENDS["cpu"], attention=backend)
    monkeypatch.setitem(startup.BACKENDS, "cpu", cpu)
    monkeypatch.setattr(step, "select", interpreted)
    assert [tokens(o) for o in run(one_program(options), requests)] == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_company_cut_or_cached_prefix_changes_a_bit(dtype):
    model = {"model": str(GOLDEN / "gqa"), "kv_cache_dtype": dtype}
    roomy, tight = (
        Engine(EngineConfig(**options | model | {"enable_prefix_caching": is_tight}))
        for is_tight, options in enumerate((deterministic.ROOMY, deterministic.TIGHT))
    )
    alone = [deterministic.bits(run(roomy, [r])[0]) for r in deterministic.REQUESTS]

    order = list(range(deterministic.N_REQUESTS))
    for bursts in ([1, 0, 4], [deterministic.N_REQUESTS]):
        assert deterministic.bits_of_all(tight, order, bursts) == alone
    assert tight.stats().n_prefix_hits > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_preempted_and_cached_sequences_make_the_same_tokens(tmp_path, dtype):
    options = {"kv_cache_dtype": dtype, "enable_prefix_caching": False}
    roomy = make_engine(tmp_path, one_program, **options)
    tight = make_engine(tmp_path, one_program, **options | {"num_kv_blocks": 15})
    cached = make_engine(tmp_path, one_program, kv_cache_dtype=dtype)
    requests = random_requests(3, 20, longest=70)
    expected = [tokens(o) for o in run(roomy, requests)]
    assert [tokens(o) for o in run(tight, requests)] == expected
    assert tight.stats().n_preemptions > 0
    for _ in range(2):
        assert [tokens(o) for o in run(cached, requests)] == expected
    assert cached.stats().n_prefix_hits > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_devices_share_cells_and_scales_and_make_the_tokens_of_one(dtype):
    requests = random_requests(14, 6)
    single, sharded = (
        on_golden("gqa", kv_cache_dtype=dtype, tensor_parallel_size=n) for n in (1, 2)
    )
    expected = [tokens(o) for o in run(single, requests)]
    assert [tokens(o) for o in run(sharded, requests)] == expected
    for array in sharded._runner.state.caches[0]:
        assert array.sharding.shard_shape(array.shape)[1] == array.shape[1] // 2


def cache_bytes(engine: Engine) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(engine._runner.state.caches))


@pytest.mark.parametrize("attention", ["xla", "auto"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_aliases_cells_and_scales_and_needs_little_memory_beside_them(
    tmp_path, dtype, attention
):
    engine = make_engine(
        tmp_path,
        one_program,
        num_kv_blocks=8192,
        kv_cache_dtype=dtype,
        attention_backend=attention,
    )
    (shape,) = engine._runner.shapes
    memory = engine._runner.programs.made[shape].memory_analysis()
    size = cache_bytes(engine)
    assert memory.alias_size_in_bytes >= size
    activations = 4 * shape.n_tokens * (3 * 64 + 8 * 32) + 16 * 4 * 62 * shape.n_seqs
    assert memory.temp_size_in_bytes < 0.05 * size + 16 * activations


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "factor"),
    [("bfloat16", "int8", 1.94), ("float32", "fp8", 3.88), ("float16", "fp8_e4m3", 1.94)],
)
def test_the_same_memory_holds_as_many_more_blocks(tmp_path, dtype, kv_dtype, factor):
    """Heads of 128, whose scale takes 4 bytes beside 128."""
    sizes = {"hidden_size": 512, "num_attention_heads": 4, "max_position_embeddings": 2**20}
    plain = EngineConfig(
        model=write_config(tmp_path, **sizes), dtype=dtype, max_num_seqs=64, memory_fraction=0.5
    )
    model, mesh, n_blocks = read_config(tmp_path), make_mesh(1), []
    for config in (plain, dataclasses.replace(plain, kv_cache_dtype=kv_dtype)):
        resolved, model, shapes = startup.design(config, model, mesh)
        size = model.n_layers * startup.layout_of(resolved, model).block_bytes
        n_blocks.append(startup.fit_blocks(resolved, model, None, shapes, mesh, 2**30))
        assert 0.99 * 2**29 < size * n_blocks[-1] <= 2**29
    assert n_blocks[1] / n_blocks[0] == pytest.approx(factor, abs=0.005)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pool_takes_the_bytes_that_it_is_counted_for(tmp_path, dtype):
    engine = make_engine(tmp_path, one_program, kv_cache_dtype=dtype)
    layout = startup.layout_of(engine.config, engine.model_config)
    assert cache_bytes(engine) == 128 * 2 * layout.block_bytes
    assert (engine.config.kv_cache_dtype, layout.is_quantized) == (dtype, True)


def test_names_of_vllm_mean_the_same(tmp_path):
    engine = make_engine(tmp_path, one_program, kv_cache_dtype="fp8_e4m3")
    assert (engine.config.kv_cache_dtype, engine.config.cache_dtype) == ("fp8", "float8_e4m3fn")


def test_sleep_frees_scales_too_and_new_weights_leave_none_behind(tmp_path, forbid_compile):
    options = {"kv_cache_dtype": "int8"}
    engine = make_engine(tmp_path, one_program, **options)
    fresh = make_engine(tmp_path, one_program, seed=1, **options)
    requests = random_requests(7, 3)
    first, other = ([tokens(o) for o in run(e, requests)] for e in (engine, fresh))
    assert first != other
    with forbid_compile():
        engine.sleep()
        assert cache_bytes(engine) == 0
        engine.wake_up()
        assert [tokens(o) for o in run(engine, requests)] == first
        engine.update_weights(agreement.model_of(fresh))
        assert [tokens(o) for o in run(engine, requests)] == other


@pytest.mark.parametrize("dtype", ["auto", *DTYPES])
def test_token_that_is_not_finite_fails_who_attends_to_it(tmp_path, dtype):
    """Eight bits of an integer hold no NaN: it is in the scale."""
    path = write_config(tmp_path, tie_word_embeddings=False)
    options = {"load_format": "dummy", "num_kv_blocks": 32, "max_model_len": 64, "block_size": 8}
    engine = one_program(EngineConfig(model=path, kv_cache_dtype=dtype, **options))
    model = agreement.model_of(engine)
    model.embed.weight[...] = model.embed.weight[...].at[5].set(jnp.nan)
    engine._runner.leaves = tuple(jax.tree.leaves(model))
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    bad, good = run(engine, [Request([1, 5, 2, 3], params), Request([1, 4, 2, 3], params)])
    assert bad[-1].finish_reason == "error"
    assert "non-finite" in bad[-1].error
    assert good[-1].finish_reason == "length"
