"""Prompts' scores are those of the dense model, whatever else the engine does meanwhile."""

import dataclasses
import itertools
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.scoring import Scores, Scoring
from fastgen_jax.engine.types import Output, Request
from fastgen_jax.errors import ContextLengthExceeded, InvalidRequest
from fastgen_jax.sampling_params import MAX_LOGPROBS, SamplingParams
from tests.engine.test_embeddings import embedding_requests, run_with
from tests.tiny import (
    OPTIONS,
    Naive,
    assert_idle,
    make_engine,
    one_program,
    random_requests,
    run,
    tokens,
)

LONGEST = OPTIONS["max_model_len"]
KINDS = [{"max_tokens": 0}, {"max_tokens": 1}, {"max_tokens": 5, "n": 2, "temperature": 1.0}]


def scoring_requests(draw: int, count: int, **params) -> list[Request]:
    """Of random prompts, with 0, 1 ... top ones, some of which score their ends only."""
    requests = []
    for i, request in enumerate(random_requests(draw, count)):
        kind = {"prompt_logprobs": i % 4, "temperature": 0.0, "ignore_eos": True}
        kind |= KINDS[i % 3] | params
        first = len(request.prompt_token_ids) // 2 or None
        own = Request(request.prompt_token_ids, SamplingParams(**kind))
        requests.append(dataclasses.replace(own, scored_from=first) if i % 2 else own)
    return requests


def expected(naive: Naive, request: Request) -> np.ndarray:
    """f32[positions, V] from `scored_from` on."""
    logprobs = jax.nn.log_softmax(naive.logits(request.prompt_token_ids), axis=-1)
    return np.asarray(logprobs)[(request.scored_from or 1) - 1 : -1]


def assert_scored(naive: Naive, request: Request, outputs: list[Output]) -> None:
    params, prompt = request.params, request.prompt_token_ids
    first = next(output for output in outputs if output.index == 0)
    assert [output for output in outputs if output.prompt_logprobs is not None] == [first]
    lines = expected(naive, request)
    ids = prompt[len(prompt) - len(lines) :]
    own = [position.logprob for position in first.prompt_logprobs]
    np.testing.assert_allclose(own, lines[np.arange(len(ids)), ids], atol=1e-4)
    for line, position in zip(lines, first.prompt_logprobs, strict=True):
        best = np.sort(line)[::-1][: params.prompt_logprobs]
        np.testing.assert_allclose([value for _, value in position.top], best, atol=1e-4)
        np.testing.assert_allclose([line[id] for id, _ in position.top], best, atol=1e-4)
    n_tokens = params.n * params.max_tokens
    assert len(tokens(outputs)) == n_tokens
    assert [o.finish_reason for o in outputs if o.finish_reason] == ["length"] * params.n


def test_scores_are_those_of_the_dense_model(engine, naive):
    requests = scoring_requests(0, 12)
    for request, outputs in zip(requests, run(engine, requests), strict=True):
        assert_scored(naive, request, outputs)
    assert_idle(engine)


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("n", [1, 2, 33, LONGEST])
def test_prompts_of_one_token_and_of_the_longest_kind_are_scored(engine, naive, max_tokens, n):
    n -= max_tokens if n == LONGEST else 0
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=0, temperature=0.0)
    request = Request([i % 62 for i in range(n)], params)
    assert_scored(naive, request, run(engine, [request])[0])


@pytest.mark.parametrize(("budget", "block_size"), [(8, 4), (24, 32)])
def test_scores_do_not_depend_on_chunks_or_blocks(folder, naive, budget, block_size):
    other = make_engine(folder, one_program, max_num_batched_tokens=budget, block_size=block_size)
    requests = scoring_requests(budget, 9)
    for request, outputs in zip(requests, run(other, requests), strict=True):
        assert_scored(naive, request, outputs)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 99), st.integers(2, 6), st.integers(2, 16))
def test_any_company_and_any_budget_leave_scores_as_they_are(small_engine, naive, draw, n, budget):
    companies = scoring_requests(draw, n), random_requests(draw + 1, n), embedding_requests(draw, 2)
    requests = [r for each in itertools.zip_longest(*companies) for r in each if r]
    placement = small_engine._placement
    limits = placement.limits._replace(max_batched_tokens=budget)
    with mock.patch.object(placement, "limits", limits):  # other tests have the engine after this
        answers = run(small_engine, requests)
    for request, outputs in zip(requests, answers, strict=True):
        if request.params.prompt_logprobs is not None:
            assert_scored(naive, request, outputs)
    assert_idle(small_engine)


def test_scored_samples_that_gave_way_are_scored_the_same(small_engine, naive):
    requests = scoring_requests(9, 8, max_tokens=20, n=2)
    n_before = small_engine.stats().n_preemptions
    for request, outputs in zip(requests, run(small_engine, requests), strict=True):
        assert_scored(naive, request, outputs)
    assert small_engine.stats().n_preemptions > n_before


@pytest.fixture(scope="module")
def small_engine(folder):
    return make_engine(folder, one_program, num_kv_blocks=16, max_num_batched_tokens=16)


def test_neighbours_tokens_do_not_change_beside_scores(engine, naive, forbid_compile):
    kinds = [{}, {"temperature": 1.0, "seed": 3}, {"allowed_token_ids": tuple(range(9))}]
    samples = [r for i, kind in enumerate(kinds) for r in random_requests(i, 2, **kind)]
    scored = scoring_requests(2, len(samples))
    alone = [tokens(outputs) for outputs in run(engine, samples)]
    mixed = [request for pair in zip(samples, scored, strict=True) for request in pair]
    with forbid_compile():
        outputs = run(engine, mixed)
    assert [tokens(o) for o in outputs[::2]] == alone
    for request, own in zip(scored, outputs[1::2], strict=True):
        assert_scored(naive, request, own)


def test_constrained_samples_are_scored_too(engine, naive):
    for request in scoring_requests(3, 3, max_tokens=2, allowed_token_ids=(3, 4)):
        (outputs,) = run(engine, [request])
        assert_scored(naive, request, outputs)
        assert set(tokens(outputs)) <= {3, 4}


@pytest.mark.parametrize(("first", "n_reused"), [(1, 0), (8, 0), (9, 8), (41, 40), (60, 56)])
def test_cached_prefix_is_used_up_to_what_the_first_score_needs(folder, naive, first, n_reused):
    engine = make_engine(folder, one_program)
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    request = Request([i * 7 % 62 for i in range(60)], params, scored_from=first)
    run(engine, [request])
    (outputs,) = run(engine, [request])
    assert_scored(naive, request, outputs)
    assert outputs[0].n_reused == n_reused


def test_what_was_scored_is_a_cached_prefix_of_its_other_samples(folder):
    engine = make_engine(folder, one_program)
    params = SamplingParams(max_tokens=2, n=3, prompt_logprobs=0, ignore_eos=True)
    run(engine, [Request([i * 7 % 62 for i in range(60)], params)])
    assert engine.stats().n_prefix_hits == 2 * 56


def test_preempted_prompt_goes_on_where_it_was_scored(folder, naive):
    engine = make_engine(folder, one_program, max_num_batched_tokens=8)
    (request,) = scoring_requests(5, 1, max_tokens=0)
    n_scored = []

    def preempt_all(step):
        if step in (3, 5):
            engine._placement.preempt([s for s in engine._lives.live.values() if s.row >= 0])
        flying = engine._pipeline.in_flight
        n_scored.append(flying.batch.scored if flying else [])

    (outputs,) = run_with(engine, [request], preempt_all).values()
    assert engine.stats().n_preemptions == 2
    positions = [p for scored in n_scored for _, own in scored for p in own]
    assert positions == sorted(set(positions))
    assert_scored(naive, request, outputs)


def test_failed_step_changes_no_score(folder, naive, monkeypatch):
    engine = make_engine(folder, one_program, max_num_seqs=4, max_num_batched_tokens=16)
    requests = scoring_requests(6, 8)
    fetch, n_calls = engine._runner.fetch_scores, 0

    def fail_once(launched):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 4:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return fetch(launched)

    monkeypatch.setattr(engine._runner, "fetch_scores", fail_once)
    for request, outputs in zip(requests, run(engine, requests), strict=True):
        assert_scored(naive, request, outputs)
    assert engine.stats().n_failed_steps == 1
    assert_idle(engine)


def test_score_that_is_not_finite_ends_its_sample_alone(engine, naive, monkeypatch):
    requests = scoring_requests(7, 4, max_tokens=1, n=1)
    fetch, is_poisoned = engine._runner.fetch_scores, False

    def poison(launched):
        nonlocal is_poisoned
        scores = fetch(launched)
        logprobs = scores.logprobs.copy()
        if not is_poisoned:
            logprobs[0], is_poisoned = np.nan, True
        return scores._replace(logprobs=logprobs)

    monkeypatch.setattr(engine._runner, "fetch_scores", poison)
    first, *others = run(engine, requests)
    assert (first[0].finish_reason, first[0].prompt_logprobs) == ("error", None)
    assert "non-finite" in first[0].error
    for request, outputs in zip(requests[1:], others, strict=True):
        assert_scored(naive, request, outputs)
    assert_idle(engine)


def test_batches_without_scores_read_none(engine, monkeypatch):
    def fail(launched):
        raise AssertionError("scores were read")

    monkeypatch.setattr(engine._runner, "fetch_scores", fail)
    run(engine, random_requests(7, 3))
    assert engine.stats().n_failed_steps == 0


def test_two_devices_make_the_same_scores():
    options = EngineConfig(
        model="tests/golden/gqa", max_model_len=96, num_kv_blocks=64, max_num_batched_tokens=16
    )
    requests = scoring_requests(8, 4, max_tokens=0, n=1)
    single = run(one_program(options), requests)
    sharded = run(one_program(dataclasses.replace(options, tensor_parallel_size=2)), requests)
    for (one,), (two,) in zip(single, sharded, strict=True):
        for a, b in zip(one.prompt_logprobs, two.prompt_logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_memory_of_a_step_does_not_grow_with_tokens_times_vocabulary(folder):
    """Of the scores; where nothing else grows, a step of more tokens needs as much for logits."""
    sizes = {"vocab_size": 4096, "max_num_seqs": 8}
    temporary = []
    for n_tokens in (64, 1024):
        engine = make_engine(
            folder / "wide", one_program, max_num_batched_tokens=n_tokens, max_num_seqs=8,
            hf_overrides={"vocab_size": sizes["vocab_size"]},
        )  # fmt: skip
        (shape,) = engine._runner.shapes
        temporary.append(engine._runner.programs.made[shape].memory_analysis().temp_size_in_bytes)
        engine.close()
    assert temporary[1] - temporary[0] < 4 * (1024 - 64) * sizes["vocab_size"] / 4


REFUSED = [
    ({"scored_from": 0}, "scored_from must be a position from 1 to 3, .* got 0: nothing comes"),
    ({"scored_from": 4}, "scored_from must be a position from 1 to 3, .* got 4"),
    ({"scored_from": True}, "scored_from must be a position"),
    ({"scored_from": 1, "params": SamplingParams()}, "scored_from needs prompt_logprobs"),
    ({"pooling": "last"}, "an embedding samples nothing"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_scores_of_what_is_not_there_are_refused(engine, changes, message):
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    with pytest.raises(InvalidRequest, match=message):
        engine.submit(dataclasses.replace(Request([5, 6, 7], params), **changes))
    assert_idle(engine)


def test_prompt_too_long_to_be_scored_is_refused_with_the_numbers(engine):
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    with pytest.raises(ContextLengthExceeded, match=r"length is 96 tokens.*prompt has 97 tokens"):
        engine.submit(Request([5] * (LONGEST + 1), params))


@given(st.integers(1, 30), st.data())
def test_any_chunks_of_a_prompt_that_was_begun_before_score_each_position_once(n_prompt, data):
    first = data.draw(st.integers(1, n_prompt))
    scoring = Scoring(first, n_prompt, n_top=1)
    ends = data.draw(st.lists(st.sets(st.integers(1, n_prompt)), max_size=2))
    for stops in [*ends, {n_prompt}]:
        start = 0 if np.isinf(scoring.n_cacheable) else data.draw(
            st.integers(0, int(scoring.n_cacheable))
        )  # fmt: skip
        for stop in sorted(s for s in stops if s > start):
            due = scoring.due(start, stop - start)
            if due:
                values = np.array(due, np.float32)
                tops = np.repeat(values[:, None], MAX_LOGPROBS, axis=1)
                scoring.add(Scores(values, tops.astype(np.int32), tops), due)
            start = stop
    found = scoring.logprobs()
    assert [position.logprob for position in found] == list(range(first, n_prompt))
    assert all(position.top == [(p, p)] for p, position in enumerate(found, first))
