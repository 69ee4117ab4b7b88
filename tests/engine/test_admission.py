"""Who may enter the engine, asked directly."""

import numpy as np
import pytest

from fastgen_jax.engine.admission import QUEUED_CONTEXTS, Admission, check_ids
from fastgen_jax.engine.types import Request
from fastgen_jax.errors import InvalidRequest, QueueFull
from fastgen_jax.sampling_params import SamplingParams


def make(max_requests: int) -> Admission:
    return Admission(
        max_requests=max_requests, max_model_len=8, n_blocks=2, block_size=4, vocab_size=10
    )


def enter(admission: Admission, n_tokens: int):
    admission.enter([Request([1] * n_tokens, SamplingParams())])


def test_a_full_engine_says_so_and_refuses_the_smallest_request():
    admission = make(max_requests=2)
    enter(admission, 1)
    assert not admission.is_full
    enter(admission, 1)
    assert admission.is_full
    with pytest.raises(QueueFull):
        enter(admission, 1)
    admission.leave()
    assert not admission.is_full
    enter(admission, 1)


def test_an_engine_full_of_waiting_tokens_says_so():
    admission = make(max_requests=1000)
    for _ in range(QUEUED_CONTEXTS):
        assert not admission.is_full
        enter(admission, 8)
    assert admission.is_full
    with pytest.raises(QueueFull):
        enter(admission, 1)
    admission.dequeue(8)
    assert not admission.is_full


@pytest.mark.parametrize("ids", [(), [0, 9], {3: 1.0}, [np.int32(9), 0], (5,)], ids=repr)
def test_ids_within_the_vocabulary_pass(ids):
    check_ids("prompt", ids, 10)


@pytest.mark.parametrize(
    ("ids", "shown"),
    [([0, 10], "10"), ([-1], "-1"), ([2**70], "1180591620717411303424"), ([True], "True"),
     ([1.0], "1.0"), ([np.int32(10)], "10"), (["1"], "'1'"), ([0, None, 20], "None")],
)  # fmt: skip
def test_the_first_id_at_fault_is_named(ids, shown):
    with pytest.raises(InvalidRequest, match="stop_token_ids holds") as caught:
        check_ids("stop_token_ids", ids, 10)
    assert shown in str(caught.value)
    assert "integers from 0 to 9" in str(caught.value)
