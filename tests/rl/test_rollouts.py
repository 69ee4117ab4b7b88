"""What Tunix's rollout config says, in the engine's words; without Tunix."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest

from fastgen_jax.errors import InvalidRequest
from fastgen_jax.results import CompletionOutput, Logprob
from fastgen_jax.rl.rollouts import (
    Group,
    grouped,
    left_padded,
    params_of,
    sampled_logprobs,
    seed_of,
)


@dataclass
class Config:
    """As tunix.rl.rollout.base_rollout.RolloutConfig, with its defaults."""

    max_tokens_to_generate: int = 64
    max_prompt_length: int = 64
    temperature: float = 0.9
    top_p: float | None = 1.0
    top_k: int | None = None
    seed: Any = None
    eos_tokens: list[int] | None = None
    return_logprobs: bool = False


def test_equal_neighbours_are_samples_of_one_prompt():
    assert grouped(["a", "a", "b", "a"]) == [Group("a", 2), Group("b", 1), Group("a", 1)]
    assert grouped(["a"] * 5, most=2) == [Group("a", 2), Group("a", 2), Group("a", 1)]
    assert grouped([]) == []


def test_the_defaults_of_tunix_are_understood():
    params = params_of(Config(), eos_id=7, n=4, place=0)
    assert (params.n, params.max_tokens, params.temperature) == (4, 64, 0.9)
    assert (params.top_p, params.top_k, params.seed, params.logprobs) == (1.0, 0, None, None)
    assert (params.stop_token_ids, params.ignore_eos) == ((7,), True)


def test_what_a_config_says_is_done():
    config = Config(top_p=None, top_k=5, temperature=1.0, eos_tokens=[1, 5], return_logprobs=True)
    params = params_of(config, eos_id=7, n=1, place=0, min_p=0.1)
    assert (params.top_p, params.top_k, params.min_p) == (1.0, 5, 0.1)
    assert (params.stop_token_ids, params.logprobs) == ((1, 5), 0)


def test_logprobs_of_another_temperature_are_refused():
    with pytest.raises(InvalidRequest, match=r"temperature=0\.9 changes: use temperature=1\.0"):
        params_of(Config(return_logprobs=True), eos_id=7, n=1, place=0)


@pytest.mark.parametrize("key", [3, jax.random.key(3), jax.random.PRNGKey(3)])
def test_a_seed_gives_each_group_its_own_noise_again_and_again(key):
    seeds = [seed_of(key, place) for place in range(8)]
    assert seeds == [seed_of(key, place) for place in range(8)]
    assert len(set(seeds)) == 8


def test_keys_of_both_forms_are_the_same_seed():
    assert seed_of(jax.random.key(3), 1) == seed_of(jax.random.PRNGKey(3), 1)
    assert seed_of(None, 1) is None


def test_rows_end_where_their_prompts_end():
    padded = left_padded([[1, 2], [3], [4, 5, 6]], width=4, pad_id=9)
    assert padded.tolist() == [[9, 9, 1, 2], [9, 9, 9, 3], [9, 4, 5, 6]]
    assert padded.dtype == np.int32


def test_a_prompt_that_is_too_long_is_refused_and_not_cut():
    with pytest.raises(InvalidRequest, match="prompt of 3 tokens exceeds max_prompt_length=2"):
        left_padded([[1], [1, 2, 3]], width=2, pad_id=0)


def test_logprobs_are_those_of_the_tokens_that_were_drawn():
    positions = [{4: Logprob(-0.5, None, None), 3: Logprob(-0.25, 1, None)}]
    sample = CompletionOutput(0, "", [4], -0.5, positions, "length", None)
    assert sampled_logprobs(sample).tolist() == [-0.5]
