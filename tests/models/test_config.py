"""Shapes that no decoder can have are refused."""

import dataclasses
import math

import pytest

from fastgen_jax.errors import ConfigError
from fastgen_jax.models.config import ModelConfig, RopeConfig

NAN, INF = math.nan, math.inf
MODEL = {
    "family": "llama",
    "vocab_size": 8,
    "hidden_size": 8,
    "n_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 2,
    "ffn_size": 8,
    "max_position": 8,
}


@pytest.mark.parametrize("name", [n for n in MODEL if n != "family"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "2", NAN], ids=repr)
def test_model_sizes_are_positive_integers(name, value):
    with pytest.raises(ConfigError, match=f"model config: {name} must be a positive integer, got"):
        ModelConfig(**MODEL | {name: value})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_heads": 3}, "3 query heads do not divide into 2 KV heads"),
        ({"head_dim": 3}, "rotary size must be even and from 2 to head_dim=3, got 3"),
        ({"rope": RopeConfig(size=0)}, "rotary size must be even and from 2 to head_dim=2, got 0"),
        ({"residual": "post", "norm_places": ("after",)}, "'post' has no norm_places=.'after',"),
        ({"alibi_slopes": (0.5, 0.25)}, "2 ALiBi slopes for 4 heads"),
    ],
)
def test_model_shapes_that_cannot_work_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**MODEL | given)


@pytest.mark.parametrize("value", [0, -1, NAN, INF, True, None, "1"], ids=repr)
def test_norm_eps_is_a_positive_number(value):
    with pytest.raises(ConfigError, match="norm_eps must be a positive number, got"):
        ModelConfig(**MODEL, norm_eps=value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "stretched"}, "rope type 'stretched' is not supported; known: default, linear"),
        ({"theta": 0.0}, "rope theta must be a positive number, got 0.0"),
        ({"theta": NAN}, "rope theta must be a positive number, got nan"),
        ({"theta": "1e4"}, "rope theta must be a positive number, got '1e4'"),
        ({"factor": 0.5}, "rope factor must be at least 1, got 0.5"),
        ({"factor": INF}, "rope factor must be at least 1, got inf"),
        ({"factor": None}, "rope factor must be at least 1, got None"),
    ],
)
def test_rope_values_that_cannot_work_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        RopeConfig(**given)


def test_group_size_is_query_heads_per_kv_head():
    assert ModelConfig(**MODEL).group_size == 2


def test_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig(**MODEL).family = "gpt2"
