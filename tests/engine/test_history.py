import time

import numpy as np

from fastgen_jax.engine.blocks import EVICTABLE, FREE, HELD, SHARED, BlockPool
from fastgen_jax.engine.history import N_STEPS, History
from fastgen_jax.engine.types import Plan, Request
from fastgen_jax.sampling_params import SamplingParams
from tests.tiny import random_requests, run


def one_step(history: History):
    history.begin(Plan([], [], []))
    history.end(0.25, n_padded=16, n_running=2, n_waiting=3)


def test_steps_have_numbers_and_only_the_newest_are_kept():
    history = History()
    assert history.since(0) == []
    for _ in range(N_STEPS + 5):
        one_step(history)
    assert [s.number for s in history.since(0)] == list(range(6, N_STEPS + 6))
    assert [s.number for s in history.since(N_STEPS + 3)] == [N_STEPS + 4, N_STEPS + 5]
    assert history.since(history.n_steps) == []


def test_a_step_that_failed_is_not_told():
    history = History()
    history.begin(Plan([], [], []))
    one_step(history)
    assert history.n_steps == 1


def test_the_record_adds_up_to_what_the_engine_has_computed(engine):
    n_before, started = engine.history.n_steps, time.monotonic()
    tokens_before, generated_before = (
        engine.stats().n_step_tokens, engine.stats().n_generated_tokens,
    )  # fmt: skip
    requests = random_requests(3, 12)
    run(engine, requests)
    steps = engine.history.since(n_before)
    chunks = [chunk for step in steps for chunk in step.chunks]
    n_tokens = sum(n_new for _, n_new, _, _ in chunks)
    n_yielded = sum(n_cached == n_known for _, _, n_cached, n_known in chunks)
    assert n_tokens == engine.stats().n_step_tokens - tokens_before
    # A sequence that turns out to have ended may have been given one token more.
    n_generated = engine.stats().n_generated_tokens - generated_before
    assert n_generated <= n_yielded <= n_generated + len(requests)
    assert all(sum(c[1] for c in s.chunks) <= s.n_padded for s in steps)
    assert all(started <= s.end_time <= time.monotonic() and s.seconds > 0 for s in steps)


def test_decodes_come_before_chunks_of_prompts_and_the_budget_is_met_exactly(engine):
    """A prompt of three budgets beside sequences that are talking."""
    budget = engine.config.max_num_batched_tokens
    n_before = engine.history.n_steps
    talking = [
        Request([i + 1, 2, 3], SamplingParams(max_tokens=40, ignore_eos=True)) for i in range(3)
    ]
    ids = list(np.arange(3 * budget - 8) % 50 + 8)
    late = Request([int(id) for id in ids], SamplingParams(max_tokens=1))
    run(engine, [*talking, late])
    mixed = [
        [n_new for _, n_new, _, _ in step.chunks]
        for step in engine.history.since(n_before)
        if len({n_new == 1 for _, n_new, _, _ in step.chunks}) == 2
    ]
    assert mixed
    assert any(sum(sizes) == budget for sizes in mixed)
    assert all(sizes == sorted(sizes, key=lambda n: n > 1) for sizes in mixed)


def test_a_map_tells_what_each_block_is():
    pool = BlockPool(6)
    a, b, c = pool.allocate(3)
    pool.publish(a, 0, b"a")
    pool.publish(b, 0, b"b")
    pool.match([b"a"])
    pool.release([b])
    expected = {a: SHARED, b: EVICTABLE, c: HELD}
    assert pool.map().classes == bytes(expected.get(block, FREE) for block in range(1, 6))


def test_the_engine_makes_a_map_when_it_is_asked_though_it_has_no_work(engine):
    seen = []
    engine.map_blocks(seen.append)
    engine.step()
    assert len(seen[0].classes) == engine.stats().n_blocks
    assert HELD not in seen[0].classes
