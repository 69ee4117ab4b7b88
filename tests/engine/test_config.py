"""What a user may choose of an engine, and what is refused."""

import dataclasses
import math

import pytest

from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.errors import ConfigError

NAN, INF = math.nan, math.inf
COUNTS = ["max_model_len", "block_size", "num_kv_blocks", "max_num_batched_tokens", "max_num_seqs"]


@pytest.mark.parametrize("name", [*COUNTS, "max_queued_requests", "tensor_parallel_size"])
@pytest.mark.parametrize("value", [0, -1, 1.0, NAN, "8", True], ids=repr)
def test_engine_counts_are_positive_integers(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be a positive integer, got {value!r}"):
        EngineConfig(**{name: value})


@pytest.mark.parametrize("name", ["max_model_len", "num_kv_blocks"])
def test_one_is_too_few_where_nothing_could_be_served(name):
    with pytest.raises(ConfigError, match=f"{name} must be at least 2, got 1: "):
        EngineConfig(**{name: 1})
    assert getattr(EngineConfig(**{name: 2}), name) == 2


@pytest.mark.parametrize("name", ["max_queued_requests", "tensor_parallel_size"])
def test_engine_counts_without_automatic_choice_are_needed(name):
    with pytest.raises(ConfigError, match=f"{name} must be a positive integer, got None"):
        EngineConfig(**{name: None})


@pytest.mark.parametrize("value", [0, -0.1, 1.01, NAN, INF, "0.5", True], ids=repr)
def test_memory_fraction_is_a_share(value):
    with pytest.raises(ConfigError, match=r"memory_fraction must be in \(0, 1\], got"):
        EngineConfig(memory_fraction=value)


@pytest.mark.parametrize("value", [-1, 2**32, 0.5, NAN, "7", True, None], ids=repr)
def test_engine_seed_has_32_bits(value):
    with pytest.raises(ConfigError, match=r"seed must be .*\[0, 2\*\*32\), got"):
        EngineConfig(seed=value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"dtype": "float8"},
            "dtype must be one of auto, float32, bfloat16, float16, got 'float8'",
        ),
        ({"load_format": "pickle"}, "load_format must be one of auto, dummy, got 'pickle'"),
        (
            {"kv_cache_dtype": "fp8_e5m2"},
            "kv_cache_dtype must be one of auto, int8, fp8, fp8_e4m3, got 'fp8_e5m2'",
        ),
        ({"kv_cache_dtype": ["int8"]}, r"kv_cache_dtype must be one of .*, got \['int8'\]"),
    ],
)
def test_engine_choices_name_what_is_known(given, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**given)


def test_every_engine_option_explains_itself():
    for field in dataclasses.fields(EngineConfig):
        assert field.metadata["help"]
        assert field.metadata["group"]


def test_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().seed = 1
