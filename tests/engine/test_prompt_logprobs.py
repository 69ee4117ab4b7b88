"""Scores of a prompt are read as a list of them would be."""

import numpy as np
import pytest

from fastgen_jax.engine.scoring import N_READ, PromptLogprobs, Scores, token_logprobs
from fastgen_jax.sampling_params import MAX_LOGPROBS

SIZES = (1, N_READ, 3 * N_READ + 5, 2)


@pytest.fixture
def parts() -> list[Scores]:
    rng = np.random.default_rng(0)
    return [
        Scores(
            rng.normal(size=n).astype(np.float32),
            rng.integers(0, 99, (n, MAX_LOGPROBS), np.int32),
            rng.normal(size=(n, MAX_LOGPROBS)).astype(np.float32),
        )
        for n in SIZES
    ]


@pytest.mark.parametrize("n_top", [0, 3])
def test_they_are_those_of_each_step_in_order(parts, n_top):
    expected = [line for part in parts for line in token_logprobs(part, n_top)]
    found = PromptLogprobs(parts, n_top)
    assert list(found) == expected
    assert [found[i] for i in range(len(found))] == found[:] == expected
    assert (found[-1], found[5:9]) == (expected[-1], expected[5:9])
    with pytest.raises(IndexError):
        found[sum(SIZES)]


def test_a_prompt_of_one_token_has_none():
    assert not PromptLogprobs([], 1)
