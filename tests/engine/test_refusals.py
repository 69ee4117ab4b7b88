"""What the engine refuses leaves no trace: not in its books, and not in a neighbour's logits."""

import dataclasses

import numpy as np
import pytest

from fastgen_jax.engine.types import Request
from fastgen_jax.errors import RequestError
from fastgen_jax.sampling_params import SamplingParams
from tests.tiny import assert_idle, make_engine, one_program, random_requests, run, tokens

VOCAB_SIZE = 62
BAD_IDS = (-1, VOCAB_SIZE, 2**31 - 1, 2**31, 2**63, -(2**63), 1.5, True, "5", None)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return make_engine(folder, one_program, enable_prefix_caching=False)


def refused_request(i: int) -> Request:
    """The i-th of many that cannot be served; each kind fails at another check."""
    bad = BAD_IDS[i % len(BAD_IDS)]
    ids, params = [5, 6], SamplingParams(max_tokens=4)
    kinds = [
        lambda: Request([5, bad, 6], params),
        lambda: Request(ids, dataclasses.replace(params, stop_token_ids=(3, bad))),
        lambda: Request(ids, dataclasses.replace(params, logit_bias={bad: -100.0})),
        lambda: Request([], params),
        lambda: Request([5] * 96, params),
        lambda: Request(ids, dataclasses.replace(params, max_tokens=2**31 - 1)),
        lambda: Request(ids, dataclasses.replace(params, temperature=float("nan"))),
        lambda: Request(ids, dataclasses.replace(params, n=10**9)),
    ]
    return kinds[i // len(BAD_IDS) % len(kinds)]()


def refuse(engine, i: int):
    with pytest.raises(RequestError):
        engine.submit_all([Request([5], SamplingParams(max_tokens=1)), refused_request(i)])


def test_a_neighbours_logprobs_are_the_same_to_the_bit_beside_refusals(engine):
    (victim,) = random_requests(1, 1, logprobs=20, max_tokens=30)
    (alone,) = run(engine, [victim])
    request_id, beside, n_refused = engine.submit(victim), [], 0
    while engine.has_work:
        for _ in range(40):
            refuse(engine, n_refused)
            n_refused += 1
        beside += [output for output in engine.step() if output.request_id == request_id]
    assert n_refused >= 1000
    assert tokens(beside) == tokens(alone)
    for a, b in zip(alone, beside, strict=True):
        assert a.logprobs == b.logprobs  # floats, with no tolerance
    assert np.isfinite([output.logprobs.logprob for output in beside]).all()


def test_twenty_thousand_refusals_leave_nothing_and_one_more_is_served(engine):
    (request,) = random_requests(2, 1)
    (expected,) = run(engine, [request])
    for i in range(20_000):
        refuse(engine, i)
    assert not engine.has_work
    assert_idle(engine)
    (got,) = run(engine, [request])
    assert tokens(got) == tokens(expected)


PENALTIES = {
    "presence_penalty": 1.5, "frequency_penalty": 1.0, "repetition_penalty": 1.7, "min_tokens": 10,
    "logit_bias": {5: 4.0, 61: -100.0}, "stop_token_ids": (9,), "logprobs": 2,
}  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_penalties_count_the_same_in_chunks_and_after_preemption(
    engine, tmp_path_factory, temperature
):
    """Prompts in chunks of at most 8 tokens, in a pool that holds one request and a bit."""
    folder = tmp_path_factory.mktemp("tight")
    tight = make_engine(
        folder, one_program, num_kv_blocks=15, max_num_batched_tokens=8,
        enable_prefix_caching=False,
    )  # fmt: skip
    params = PENALTIES | {"temperature": temperature, "seed": 4}
    requests = random_requests(7, 16, longest=70, **params)
    expected, got = run(engine, requests), run(tight, requests)
    assert tight.stats().n_preemptions > 0
    assert max(len(request.prompt_token_ids) for request in requests) > 5 * 8
    assert [tokens(outputs) for outputs in got] == [tokens(outputs) for outputs in expected]
    assert_idle(tight)
