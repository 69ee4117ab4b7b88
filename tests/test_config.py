"""What all configs share."""

import dataclasses

import pytest

from fastgen_jax.config import check_known
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.errors import ConfigError
from fastgen_jax.sampling_params import SamplingParams


def test_unknown_option_names_the_nearest_known_one():
    with pytest.raises(ConfigError, match="unknown option 'max_token'; did you mean 'max_tokens'"):
        check_known({"temperature": 1, "max_token": 3}, SamplingParams)


def test_unknown_option_without_a_near_one_lists_all():
    with pytest.raises(
        ConfigError, match="unknown option 'zzz'; known: model, tokenizer, revision"
    ):
        check_known({"zzz": 1}, EngineConfig)


def test_known_options_pass():
    check_known({f.name: None for f in dataclasses.fields(EngineConfig)}, EngineConfig)
