"""Embeddings are those of the dense model, whatever else the engine does meanwhile."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.pooling import Pooled, normalized
from fastgen_jax.engine.types import Output, Request
from fastgen_jax.errors import ContextLengthExceeded, InvalidRequest
from fastgen_jax.sampling_params import POOLINGS, SamplingParams
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


def embedding_requests(seed: int, count: int, longest: int = LONGEST) -> list[Request]:
    """Of random prompts, the two poolings in turn."""
    prompts = [r.prompt_token_ids for r in random_requests(seed, count, longest)]
    return [Request.to_embed(prompt, POOLINGS[i % 2]) for i, prompt in enumerate(prompts)]


def expected(naive: Naive, request: Request) -> np.ndarray:
    hidden = naive.hidden(request.prompt_token_ids)
    return hidden[-1] if request.pooling == "last" else hidden.mean(axis=0)


def assert_embedded(naive: Naive, request: Request, outputs: list[Output]) -> None:
    (output,) = outputs
    assert (output.token_id, output.finish_reason, output.error) == (None, "stop", None)
    assert output.embedding is not None and output.embedding.dtype == np.float32
    np.testing.assert_allclose(output.embedding, expected(naive, request), atol=1e-4)


def run_with(engine: Engine, requests: list[Request], before_step) -> dict[int, list[Output]]:
    """Outputs by request; `before_step` is called with the number of the step that comes."""
    outputs: dict[int, list[Output]] = {id: [] for id in engine.submit_all(requests)}
    n_steps = 0
    while engine.has_work:
        before_step(n_steps)
        n_steps += 1
        for output in engine.step():
            outputs[output.request_id].append(output)
    return outputs


def test_embeddings_are_those_of_the_dense_model(engine, naive):
    requests = embedding_requests(0, 12)
    for request, outputs in zip(requests, run(engine, requests), strict=True):
        assert_embedded(naive, request, outputs)
    assert_idle(engine)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("n", [1, 2, 33, LONGEST])
def test_prompts_of_one_token_and_of_the_longest_kind_are_embedded(engine, naive, pooling, n):
    request = Request.to_embed([i % 62 for i in range(n)], pooling)
    assert_embedded(naive, request, run(engine, [request])[0])
    assert_idle(engine)


@pytest.mark.parametrize(("budget", "block_size"), [(8, 4), (24, 32)])
def test_embeddings_do_not_depend_on_chunks_or_blocks(folder, naive, budget, block_size):
    other = make_engine(folder, one_program, max_num_batched_tokens=budget, block_size=block_size)
    requests = embedding_requests(budget, 8)
    for request, outputs in zip(requests, run(other, requests), strict=True):
        assert_embedded(naive, request, outputs)


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 1.0, "seed": 3}, {"allowed_token_ids": tuple(range(9))}]
)
def test_neighbours_tokens_do_not_change_beside_embeddings(engine, naive, params, forbid_compile):
    samples, embeddings = random_requests(1, 6, **params), embedding_requests(2, 6)
    alone = [tokens(outputs) for outputs in run(engine, samples)]
    mixed = [request for pair in zip(samples, embeddings, strict=True) for request in pair]
    with forbid_compile():
        outputs = run(engine, mixed)
    assert [tokens(o) for o in outputs[::2]] == alone
    for request, own in zip(embeddings, outputs[1::2], strict=True):
        assert_embedded(naive, request, own)


@pytest.mark.parametrize("n_steps", [1, 2, 4])
def test_preempted_prompts_have_the_same_embeddings(engine, naive, n_steps):
    requests, n_before = embedding_requests(4, 12), engine.stats().n_preemptions

    def preempt_all(n):
        if n == n_steps:
            engine._placement.preempt([s for s in engine._lives.live.values() if s.row >= 0])

    outputs = run_with(engine, requests, preempt_all)
    assert engine.stats().n_preemptions > n_before
    for request, own in zip(requests, outputs.values(), strict=True):
        assert_embedded(naive, request, own)
    assert_idle(engine)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_only_the_last_hidden_state_can_do_with_a_cached_prefix(folder, naive, pooling):
    engine = make_engine(folder, one_program)
    request = Request.to_embed([i * 7 % 62 for i in range(60)], pooling)
    run(engine, [request])
    (outputs,) = run(engine, [request])
    assert_embedded(naive, request, outputs)
    assert outputs[0].n_reused == engine.stats().n_prefix_hits == (56 if pooling == "last" else 0)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_what_was_embedded_is_a_cached_prefix_of_others(folder, pooling):
    engine = make_engine(folder, one_program)
    prompt = [i * 7 % 62 for i in range(60)]
    run(engine, [Request.to_embed(prompt, pooling)])
    outputs = run(engine, [Request(prompt, SamplingParams(max_tokens=1))])
    assert outputs[0][0].n_reused == 56


def test_failed_step_changes_no_embedding(folder, naive, monkeypatch):
    engine = make_engine(folder, one_program, max_num_seqs=4)
    requests = embedding_requests(5, 8)
    fetch, n_calls = engine._runner.fetch_pooled, 0

    def fail_once(launched):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 4:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return fetch(launched)

    monkeypatch.setattr(engine._runner, "fetch_pooled", fail_once)
    for request, outputs in zip(requests, run(engine, requests), strict=True):
        assert_embedded(naive, request, outputs)
    assert engine.stats().n_failed_steps == 1
    assert_idle(engine)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("n_steps", [0, 1, 2, 3])
def test_cancelled_embedding_ends_without_a_vector(engine, pooling, n_steps):
    request_id = engine.submit(Request.to_embed([5] * LONGEST, pooling))
    for _ in range(n_steps):
        engine.step()
    engine.cancel(request_id)
    (output,) = engine.step() + engine.step()
    assert (output.finish_reason, output.embedding) == ("abort", None)
    assert_idle(engine)


def test_embedding_that_is_not_finite_fails_alone(engine, naive, monkeypatch):
    requests = embedding_requests(6, 6)
    fetch, n_poisoned = engine._runner.fetch_pooled, 0

    def poison(launched):
        nonlocal n_poisoned
        sums = fetch(launched).copy()
        if n_poisoned == 0:
            sums[0, 3] = np.nan
            n_poisoned += 1
        return sums

    monkeypatch.setattr(engine._runner, "fetch_pooled", poison)
    n_before = engine.stats().n_nonfinite
    first, *others = run(engine, requests[1:])  # the first is a mean: a hidden state of any chunk
    assert (first[0].finish_reason, first[0].embedding) == ("error", None)
    assert "non-finite" in first[0].error
    assert engine.stats().n_nonfinite == n_before + 1
    for request, outputs in zip(requests[2:], others, strict=True):
        assert_embedded(naive, request, outputs)
    assert_idle(engine)


def test_batches_without_embeddings_read_no_hidden_states(engine, monkeypatch):
    def fail(launched):
        raise AssertionError("hidden states were read")

    monkeypatch.setattr(engine._runner, "fetch_pooled", fail)
    assert all(
        outputs[-1].finish_reason == "length" for outputs in run(engine, random_requests(7, 3))
    )
    assert engine.stats().n_failed_steps == 0


def test_two_devices_make_the_same_embeddings():
    options = EngineConfig(
        model="tests/golden/gqa", max_model_len=96, num_kv_blocks=64, max_num_batched_tokens=16
    )
    requests = embedding_requests(8, 4)
    single = run(one_program(options), requests)
    sharded = run(one_program(dataclasses.replace(options, tensor_parallel_size=2)), requests)
    for (one,), (two,) in zip(single, sharded, strict=True):
        np.testing.assert_allclose(one.embedding, two.embedding, atol=1e-4)


def test_prompt_that_is_too_long_is_refused_with_the_numbers(engine):
    with pytest.raises(ContextLengthExceeded, match=r"length is 96 tokens.*prompt has 97 tokens"):
        engine.submit(Request.to_embed([5] * (LONGEST + 1), "last"))


@pytest.mark.parametrize(("changes", "message"), [
    ({"pooling": "max"}, "pooling must be last or mean, got 'max'"),
    ({"params": SamplingParams(n=2)}, "an embedding samples nothing"),
    ({"bad_words": ((1,),)}, "an embedding samples nothing"),
])  # fmt: skip
def test_request_for_both_an_embedding_and_samples_is_refused(engine, changes, message):
    request = dataclasses.replace(Request.to_embed([5], "last"), **changes)
    with pytest.raises(InvalidRequest, match=message):
        engine.submit(request)
    assert_idle(engine)


@given(st.lists(st.lists(st.integers(-99, 99), min_size=2, max_size=2), min_size=1), st.data())
def test_any_chunks_of_a_prompt_that_was_begun_before_make_its_vector(hidden, data):
    hidden = np.array(hidden, np.float32)
    pooling = data.draw(st.sampled_from(POOLINGS))
    pooled, n = Pooled(pooling), len(hidden)
    lost = data.draw(st.lists(st.sets(st.integers(1, n)), max_size=2))
    for ends in [*lost, {n} | data.draw(st.sets(st.integers(1, n)))]:
        for start, end in itertools.pairwise([0, *sorted(ends)]):
            left_out = pooled.n_left_out(end - start)
            pooled.add(hidden[start + left_out : end].sum(axis=0), start)
    vector = hidden[-1] if pooling == "last" else hidden.sum(axis=0) / np.float32(n)
    assert np.array_equal(pooled.vector(n), vector)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=9))
def test_normalized_vectors_have_length_one_unless_they_are_zero(numbers):
    vector = normalized(np.array(numbers, np.float32))
    assert vector.dtype == np.float32
    assert np.linalg.norm(vector) == pytest.approx(1.0 if any(numbers) else 0.0, abs=1e-5)
