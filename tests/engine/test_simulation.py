"""The engine under random work keeps what it must keep, and each seeded bug is found."""

import random
import threading
import time

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from fastgen_jax.engine import faults, placement, requests
from fastgen_jax.engine.batch import FLOAT_PARAMS, INT_PARAMS, HostTables, unpack
from fastgen_jax.engine.blocks import BlockPool
from fastgen_jax.engine.changes import IN_FLIGHT
from fastgen_jax.engine.config import COMPILE
from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.lives import Lives
from fastgen_jax.engine.pipeline import Pipeline
from fastgen_jax.engine.placement import Placement
from fastgen_jax.engine.pooling import Pooled
from fastgen_jax.engine.prefix import SequenceBlocks
from fastgen_jax.engine.scheduler import _Draft
from fastgen_jax.engine.scoring import Scoring
from fastgen_jax.engine.states import States
from fastgen_jax.engine.types import STEP_SIZES, Request
from fastgen_jax.errors import InvalidRequest, QueueFull
from fastgen_jax.sampling_params import POOLINGS, SamplingParams
from tests.engine.simulation import PHASES, SALT, FakeRunner, Simulation, fake_engine
from tests.tiny import run, tokens

PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=14)
PARAMS = st.builds(
    SamplingParams,
    n=st.sampled_from([1, 1, 1, 2, 3]),
    max_tokens=st.integers(1, 10),
    prompt_logprobs=st.sampled_from([None, None, 0, 3]),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.sampled_from([None, 7]),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), (1,)]),
    logprobs=st.sampled_from([None, 0, 3]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.5]),
    logit_bias=st.sampled_from([None, None, {1: 2.0}, {0: -1.5, 3: 4.0}]),
    allowed_token_ids=st.sampled_from([None, None, None, (0, 2), (1,)]),
)
SALTS = st.sampled_from([b"", SALT])
PRIORITIES = st.sampled_from([0, 0, 0, -1, 3])
BAD_WORDS = st.sampled_from([(), (), ((0, 1), (1, 1, 0)), ((0,), (1,), (3,))])


class EngineMachine(RuleBasedStateMachine):
    """Random acts on an engine with a random small pool."""

    @initialize(
        n_blocks=st.integers(13, 20),
        block_size=st.integers(2, 4),
        budget=st.integers(3, 12),
        n_seqs=st.integers(1, 6),
        caching=st.booleans(),
        window=st.sampled_from([None, None, 2, 3, 8]),
        compile=st.sampled_from(COMPILE),
    )
    def start(self, n_blocks, block_size, budget, n_seqs, caching, window, compile):
        self.simulation = Simulation(
            fake_engine(
                num_kv_blocks=n_blocks,
                block_size=block_size,
                max_num_batched_tokens=max(budget, n_seqs),
                max_num_seqs=n_seqs,
                enable_prefix_caching=caching,
                window=window,
                compile=compile,
            )
        )

    @rule(prompt=PROMPTS, params=PARAMS, salt=SALTS, bad_words=BAD_WORDS, priority=PRIORITIES)
    def submit(self, prompt, params, salt, bad_words, priority):
        self.simulation.submit(prompt, params, salt, bad_words, priority)

    @rule(prompt=PROMPTS, pooling=st.sampled_from(POOLINGS), salt=SALTS, priority=PRIORITIES)
    def embed(self, prompt, pooling, salt, priority):
        self.simulation.embed(prompt, pooling, salt, priority)

    @rule(prompt=PROMPTS, n_top=st.integers(0, 3), data=st.data())
    def score(self, prompt, n_top, data):
        params = SamplingParams(max_tokens=0, prompt_logprobs=n_top)
        first = data.draw(st.sampled_from([None, *range(1, len(prompt) + 1)]))
        self.simulation.submit(prompt, params, scored_from=first)

    @rule(prompt=PROMPTS, data=st.data())
    def read(self, prompt, data):
        positions = st.lists(st.integers(0, len(prompt) - 1), min_size=1, max_size=4)
        self.simulation.read(prompt, tuple(data.draw(positions)))

    @rule(data=st.data())
    def cancel(self, data):
        n_requests = 1 + max((key[0] for key in self.simulation.samples), default=0)
        self.simulation.cancel(data.draw(st.integers(0, n_requests)))  # one of them is unknown

    @precondition(lambda self: self.simulation.samples)
    @rule(data=st.data())
    def finish(self, data):
        self.simulation.finish(*data.draw(st.sampled_from(list(self.simulation.samples))))

    @rule(n=st.integers(1, 6))
    def step(self, n):
        for _ in range(n):
            self.simulation.step()

    @precondition(lambda self: self.simulation.may_fail)
    @rule(phase=st.sampled_from(PHASES))
    def fail_next(self, phase):
        self.simulation.fail_next(phase)

    @rule(in_flight=st.sampled_from(list(IN_FLIGHT)))
    def change(self, in_flight):
        self.simulation.change(in_flight)

    @rule(fails=st.integers(0, 3).map(lambda n: n == 3))
    def compile_next(self, fails):
        self.simulation.compile_next(fails)

    @rule()
    def poison_next(self):
        self.simulation.runner.poison_next = True

    @rule()
    def drain(self):
        self.simulation.drain()

    def teardown(self):
        if hasattr(self, "simulation"):
            self.simulation.drain()


EngineMachine.TestCase.settings = settings(
    max_examples=50, stateful_step_count=50, deadline=None, report_multiple_bugs=False
)
test_random_work_keeps_the_invariants = EngineMachine.TestCase


def random_params(rng: random.Random) -> SamplingParams:
    max_tokens = rng.randint(1, 10)
    return SamplingParams(
        n=rng.choice([1, 1, 1, 2, 3]),
        max_tokens=max_tokens,
        min_tokens=rng.randint(0, max_tokens) if rng.random() < 0.3 else 0,
        temperature=rng.choice([0.0, 1.0]),
        seed=rng.choice([None, 7]),
        ignore_eos=rng.random() < 0.3,
        stop_token_ids=rng.choice([(), (1,)]),
        logprobs=rng.choice([None, 0, 3]),
        prompt_logprobs=rng.choice([None, None, None, 0, 3]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.0, 1.5]),
        logit_bias=rng.choice([None, None, {1: 2.0}, {0: -1.5, 3: 4.0}]),
    )


def simulate(seed: int, n_acts: int = 150, n_faults: float = 0.02, **sizes) -> Simulation:
    """Random acts, then the rest of the work: as the machine, but the same each time and faster."""
    rng = random.Random(seed)
    simulation = Simulation(fake_engine(**{"num_kv_blocks": 12} | sizes))
    for _ in range(n_acts):
        act = rng.random()
        if act < 0.3:
            prompt = [rng.randint(0, 1) for _ in range(rng.randint(1, 12))]
            salt = rng.choice([b"", b"", SALT])
            priority = rng.choice([0, 0, 0, -1, 3])
            kind = rng.random()
            if kind < 0.2:
                simulation.embed(prompt, rng.choice(POOLINGS), salt, priority)
            elif kind < 0.4:
                params = SamplingParams(max_tokens=0, prompt_logprobs=rng.choice([0, 2]))
                simulation.submit(prompt, params, salt, priority=priority)
            elif kind < 0.5:
                simulation.read(prompt, (rng.randrange(len(prompt)), len(prompt) - 1))
            else:
                simulation.submit(prompt, random_params(rng), salt, priority=priority)
        elif act < 0.4 and simulation.samples:
            key = rng.choice(list(simulation.samples))
            simulation.cancel(key[0]) if act < 0.36 else simulation.finish(*key)
        else:
            is_trial = bool(simulation.engine._lives.trials._until)
            if rng.random() < (0.2 if is_trial else n_faults):
                simulation.fail_next(rng.choice(["dispatch", "fetch", "pool", "score", "states"]))
            simulation.runner.poison_next |= rng.random() < n_faults
            simulation.step()
    simulation.drain()
    return simulation


def test_simulation_meets_every_event():
    runs = [simulate(seed, n_acts=300, window=(None, 5)[seed % 2]) for seed in range(7)]
    stats = [run.engine.stats() for run in runs]
    assert sum(s.n_preemptions for s in stats) > 5
    assert sum(run.n_outranked for run in runs) > 2
    assert sum(run.n_gave_way for run in runs) > 2
    assert sum(s.n_prefix_hits for s in stats) > 50
    assert sum(run.n_resets for run in runs) > 2
    assert sum(run.n_poisoned for run in runs) > 2
    assert sum(run.n_guilty for run in runs) > 0
    ends = {sample.end for run in runs for sample in run.samples.values()}
    assert ends == {"stop", "length", "abort", "error", "quiet"}
    embedded = [s for run in runs for s in run.samples.values() if s.expected.embedding is not None]
    assert {s.end for s in embedded} >= {"stop", "abort", "error"}
    scored = [s for run in runs for s in run.samples.values() if s.expected.scores]
    assert {s.end for s in scored} >= {"stop", "length", "abort", "error"}
    read = [s for run in runs for s in run.samples.values() if s.expected.states is not None]
    assert {s.end for s in read} >= {"stop", "abort"}


def start(prompts, *, max_tokens=8, n=1, **sizes) -> Simulation:
    """A simulation with these prompts submitted and nothing run."""
    simulation = Simulation(fake_engine(**sizes))
    for prompt in prompts:
        submit(simulation, prompt, max_tokens=max_tokens, n=n)
    return simulation


def submit(simulation, prompt, priority=0, **params):
    simulation.submit(prompt, SamplingParams(ignore_eos=True, seed=0, **params), priority=priority)


def test_preempted_samples_deliver_the_same_tokens():
    prompts = [[i & 1, i >> 1 & 1, i >> 2 & 1, 1, 0, 1] for i in range(10)]
    simulation = start(prompts, max_num_seqs=6, num_kv_blocks=9)
    simulation.drain()
    stats = simulation.engine.stats()
    assert stats.n_preemptions > 3
    assert stats.n_prompt_tokens == sum(len(prompt) for prompt in prompts)


@pytest.mark.parametrize("caching", [True, False])
def test_blocks_behind_the_window_are_given_back(caching):
    sizes = {"num_kv_blocks": 13, "enable_prefix_caching": caching}
    simulation = start([[0, 1, 1]], max_tokens=20, window=5, **sizes)
    n_held = []
    while simulation.engine.has_work:
        simulation.step()
        n_held.append(simulation.engine.stats().n_blocks_used)
    assert max(n_held) == 3  # five tokens lie in up to three blocks of two cells
    assert simulation.n_tokens == 20


def test_pool_for_one_serves_the_longest_request_beside_others():
    simulation = start([[0] * 6, [1] * 6, [0, 1] * 3], max_tokens=10, num_kv_blocks=9)
    assert simulation.engine.max_total_tokens == 16
    simulation.drain()
    assert simulation.engine.stats().n_preemptions > 0


def test_better_priority_overtakes_and_no_token_changes():
    simulation = start([[0, 1, 1, 0]] * 4, max_tokens=10, max_num_seqs=2)
    for _ in range(3):
        simulation.step()
    submit(simulation, [1] * 5, max_tokens=6, priority=-1)
    simulation.step()
    assert simulation.n_outranked == 1
    assert [s.request_id for s in simulation._running()] == [4, 0]
    simulation.drain()  # which compares all tokens with those of each alone


def test_a_full_queue_refuses_better_priority_too():
    engine = fake_engine(max_queued_requests=1)
    params = SamplingParams(max_tokens=4)
    engine.submit(Request([0, 1], params))
    with pytest.raises(QueueFull):
        engine.submit(Request([0, 1], params, priority=-1))


def test_cached_prefix_is_kept_by_who_overtakes_in_a_short_pool():
    simulation = start([[0, 1] * 4], max_tokens=12, num_kv_blocks=11)
    for _ in range(3):
        simulation.step()
    for _ in range(3):
        submit(simulation, [1, 1, 1, 1], max_tokens=8, priority=3)
    for _ in range(3):
        simulation.step()
    assert simulation.pool.n_free < 2 * simulation.engine.stats().n_running
    submit(simulation, [0, 1] * 4, max_tokens=1, priority=-1)
    simulation.drain()
    assert simulation.n_outranked > 0
    assert simulation.engine.stats().n_prefix_hits >= 6


@pytest.mark.parametrize("priority", [None, True, 1.5, "1", 2**63, -(2**63) - 1])
def test_what_is_no_priority_is_refused(priority):
    with pytest.raises(InvalidRequest, match="priority must be an integer of 64 bits"):
        fake_engine().submit(Request([0, 1], SamplingParams(max_tokens=4), priority=priority))


def test_waiting_prefixes_do_not_starve_what_runs():
    simulation = start([[1, 1, 1, 1]], max_tokens=4, num_kv_blocks=5)
    simulation.drain()  # two of four blocks stay cached
    submit(simulation, [0, 0, 0, 0], max_tokens=2)
    simulation.step()
    submit(simulation, [1, 1, 1, 1, 0], max_tokens=1)  # holds them, and the other needs one
    simulation.drain()
    assert simulation.engine.stats().n_preemptions == 0


def test_next_step_is_dispatched_before_the_last_one_is_fetched():
    simulation = start([[0, 1, 0]], max_tokens=3)
    simulation.drain()
    steps = [f"{phase} {number}" for phase, number in simulation.runner.log]
    assert steps == ["dispatch 0", "dispatch 1", "fetch 0", "dispatch 2", "fetch 1", "fetch 2"]


def test_equal_prompts_share_blocks_once_the_first_has_run():
    simulation = start([[0, 1] * 4])
    simulation.drain()
    submit(simulation, [0, 1] * 4, max_tokens=4)
    simulation.drain()
    assert simulation.engine.stats().n_prefix_hits == 6  # all but the block of the last token


@pytest.mark.parametrize("n_steps", range(6))
def test_cancel_in_any_phase_ends_a_request_once(n_steps):
    simulation = start([[0, 1] * 7, [1] * 3], max_tokens=8, n=2, num_kv_blocks=12)
    for _ in range(n_steps):
        simulation.step()
    for request_id in (0, 0, 99):
        simulation.cancel(request_id)
    simulation.step()
    assert [simulation.samples[0, i].end for i in range(2)] == ["abort", "abort"]
    simulation.cancel(0)
    simulation.drain()


def test_finish_ends_one_sample_quietly():
    simulation = start([[0, 1, 0]], n=3)
    for _ in range(3):
        simulation.step()
    simulation.finish(0, 1)
    simulation.finish(0, 1)
    simulation.drain()
    assert [simulation.samples[0, i].end for i in range(3)] != 3 * ["quiet"]
    assert simulation.samples[0, 1].end == "quiet"


def test_non_finite_row_ends_only_its_sample():
    simulation = start([[0, 1], [1, 0, 1], [1, 1, 0]], max_tokens=6)
    simulation.step()
    simulation.runner.poison_next = True
    simulation.drain()
    assert simulation.n_poisoned == 1
    ends = [sample.end for sample in simulation.samples.values()]
    assert ends == ["error", "length", "length"]


def test_cells_of_a_non_finite_step_are_not_cached():
    simulation = start([[0, 1, 1]], num_kv_blocks=12)
    simulation.step()
    simulation.step()
    simulation.runner.poison_next = True  # the cell of token 3 fills block 1
    simulation.step()
    simulation.drain()
    expected = simulation.samples[0, 0].expected.tokens
    submit(simulation, [0, 1, 1, *expected[:3]], max_tokens=2)
    simulation.drain()
    assert simulation.n_poisoned == 1
    assert simulation.samples[1, 0].end == "length"


@pytest.mark.parametrize("phase", ["dispatch", "fetch"])
@pytest.mark.parametrize("max_tokens", [1, 2, 8])
@pytest.mark.parametrize("n_steps", range(5))
def test_failed_step_ends_nobody(phase, max_tokens, n_steps):
    simulation = start([[0, 1, 0], [1] * 9, [0] * 9], max_tokens=max_tokens, num_kv_blocks=20)
    for _ in range(n_steps):
        simulation.step()
    simulation.fail_next(phase)
    submit(simulation, [1, 0], max_tokens=3)
    simulation.drain()
    assert simulation.n_resets == 1
    expected = {sample.expected.reason for sample in simulation.samples.values()}
    assert {sample.end for sample in simulation.samples.values()} == expected


def test_those_who_are_cleared_run_together_again():
    simulation = start([[0, 1, 0], [1, 1, 0]], max_tokens=12, num_kv_blocks=20)
    for _ in range(3):
        simulation.step()
    simulation.fail_next("fetch")
    sizes = []
    for _ in range(8):
        simulation.step()
        in_flight = simulation.engine._pipeline.in_flight
        sizes.append(len(in_flight.batch.sequences) if in_flight else 0)
    assert sizes == [
        0,
        1,
        1,
        1,
        1,
        2,
        2,
        2,
    ]  # two steps each: one is launched before the other ends


def fails_with(request_id, monkeypatch, error=RuntimeError):
    """Makes every step raise that holds this request; returns the numbers of sequences in them."""
    sizes, fetch = [], FakeRunner.fetch

    def poisoned(runner, launched):
        result = fetch(runner, launched)
        if request_id in [s.request_id for s in launched.batch.sequences]:
            sizes.append(len(launched.batch.sequences))
            raise error("a bad request")
        return result

    monkeypatch.setattr(FakeRunner, "fetch", poisoned)
    return sizes


@pytest.mark.parametrize("error", [RuntimeError, TypeError, KeyError, MemoryError])
def test_request_that_crashes_each_step_fails_alone(monkeypatch, error, caplog):
    prompts = [[0, 1, 0], [1] * 9, [0] * 9, [1, 0, 1, 0, 1, 1]]
    sizes = fails_with(1, monkeypatch, error)
    engine, outputs = fake_engine(num_kv_blocks=30), []
    params = SamplingParams(max_tokens=6, ignore_eos=True, seed=0)
    expected = [tokens(*run(fake_engine(), [Request(p, params)])) for p in prompts]
    engine.submit_all([Request(prompt, params) for prompt in prompts])
    while engine.has_work:
        outputs += engine.step()
    assert sizes[0] > 1 == sizes[-1]
    for i in range(4):
        own = [o for o in outputs if o.request_id == i]
        assert own[-1].finish_reason == ("error" if i == 1 else "length")
        assert i == 1 or tokens(own) == expected[i]
    assert f"the step failed twice: {error.__name__}" in [o.error for o in outputs]
    assert engine.stats().n_failed_steps == len(sizes) == len(caplog.records)
    assert all("requests [" in record.message and record.exc_info for record in caplog.records)


def test_fault_of_planning_is_tried_again_like_any(monkeypatch, caplog):
    engine, faults = fake_engine(), [KeyError("a fault of ours")]
    schedule = placement.schedule

    def fail_once(*args):
        if faults:
            raise faults.pop()
        return schedule(*args)

    monkeypatch.setattr(placement, "schedule", fail_once)
    (outputs,) = run(engine, [Request([0, 1, 0], SamplingParams(max_tokens=3, ignore_eos=True))])
    assert outputs[-1].finish_reason == "length"
    assert "planning a step failed" in caplog.text


def test_lone_failures_do_not_add_up(monkeypatch):
    engine = fake_engine()
    runner: FakeRunner = engine._runner  # type: ignore
    monkeypatch.setattr(faults, "FAILURE_WINDOW", 0.0)
    for _ in range(2 * faults.MAX_FAILED_STEPS):
        runner.fail_next = "fetch"
        request = Request([0, 1, 0], SamplingParams(max_tokens=2, seed=0, ignore_eos=True))
        (outputs,) = run(engine, [request])
        assert outputs[-1].finish_reason == "length"
    assert engine.stats().n_failed_steps == 2 * faults.MAX_FAILED_STEPS


def test_engine_whose_logits_are_not_finite_says_so(monkeypatch, caplog):
    engine, fetch = fake_engine(), FakeRunner.fetch

    def poisoned(runner, launched):
        result = fetch(runner, launched)
        return result._replace(is_finite=np.zeros(len(result.is_finite), bool))

    monkeypatch.setattr(FakeRunner, "fetch", poisoned)
    assert engine.stats().nonfinite_share == 0
    run(engine, [Request([0, 1, 0], SamplingParams(max_tokens=2))] * 4)
    assert engine.stats().nonfinite_share == 1
    assert engine.stats().n_nonfinite == 4
    assert "non-finite logits in 1 of the 1 rows" in caplog.text


def submit_and_drain(simulation, prompt, **params):
    """How many of the prompt's tokens were found in the prefix cache."""
    n_hits = simulation.engine.stats().n_prefix_hits
    salt = params.pop("salt", b"")
    simulation.submit(prompt, SamplingParams(ignore_eos=True, seed=0, **params), salt)
    simulation.drain()
    return simulation.engine.stats().n_prefix_hits - n_hits


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_prompts_of_short_answers_are_cached(max_tokens):
    simulation = start([])
    prompt = [0, 1] * 4
    assert submit_and_drain(simulation, prompt, max_tokens=max_tokens) == 0
    assert submit_and_drain(simulation, prompt, max_tokens=max_tokens) == 6


def test_prompts_are_shared_within_a_salt_only():
    simulation = start([])
    prompt = [0, 1] * 4
    assert submit_and_drain(simulation, prompt, max_tokens=1, salt=SALT) == 0
    assert submit_and_drain(simulation, prompt, max_tokens=1) == 0
    assert submit_and_drain(simulation, prompt, max_tokens=1, salt=SALT) == 6
    assert submit_and_drain(simulation, prompt, max_tokens=1) == 6


@pytest.mark.parametrize("max_tokens", [1, 2, 6])
def test_samples_of_one_request_compute_its_prompt_once(max_tokens, monkeypatch):
    n_new, dispatch = [], FakeRunner.dispatch

    def count(runner, batch, tables):
        n_new.append(unpack(batch.packed, batch.shape)["cu_q_lens"][-1])
        return dispatch(runner, batch, tables)

    monkeypatch.setattr(FakeRunner, "dispatch", count)
    simulation = start([], num_kv_blocks=60, max_num_seqs=8, max_num_batched_tokens=8)
    assert submit_and_drain(simulation, [0, 1] * 4, max_tokens=max_tokens, n=7) == 6 * 6
    # A sample computes the prompt's last block itself, and what it generates.
    assert sum(n_new) <= 8 + 6 * 2 + 7 * (max_tokens - 1)


@pytest.mark.parametrize("phase", ["dispatch", "fetch"])
def test_engine_gives_up_when_every_step_fails(phase):
    engine = fake_engine()
    runner: FakeRunner = engine._runner  # type: ignore
    engine.submit_all([Request([0] * 12, SamplingParams(max_tokens=4))] * 20)

    def step_until_it_raises():
        for _ in range(30):
            runner.fail_next = phase
            engine.step()

    with pytest.raises(RuntimeError, match="failed"):
        step_until_it_raises()
    assert engine.stats().n_failed_steps == faults.MAX_FAILED_STEPS


def test_stats_count_waiting_samples():
    simulation = start([[0, 1]] * 2, n=4)
    simulation.step()
    stats = simulation.engine.stats()
    assert (stats.n_running, stats.n_waiting) == (4, 4)


def test_steps_are_counted_by_the_tokens_that_they_compute():
    simulation = start([[0, 1] * 5], max_tokens=3, max_num_batched_tokens=8)
    simulation.drain()
    stats = simulation.engine.stats()
    assert (stats.n_steps, stats.n_step_tokens) == (4, 12)  # 8 and 2 of the prompt, then two tokens
    assert stats.steps_by_size == (2, 2, *[0] * (len(STEP_SIZES) - 1))


def test_a_sample_starts_once_however_often_it_is_preempted():
    engine = fake_engine(max_num_seqs=6, num_kv_blocks=9)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    before = time.monotonic()
    answers = run(engine, [Request([0, 1, 1, 0, 0, 1], params)] * 10)
    assert engine.stats().n_preemptions > 3
    starts = [{o.start_time for o in outputs if o.token_id is not None} for outputs in answers]
    assert all(len(of_one) == 1 for of_one in starts)
    first, last = min(map(min, starts)), max(map(max, starts))
    assert before <= first < last <= time.monotonic()


def test_request_that_meets_a_stopping_engine_is_not_lost(monkeypatch):
    engine, outputs = fake_engine(), []
    stopper = threading.Thread(target=engine.run, args=(outputs.extend,))
    enter = engine._admission.enter

    def enter_and_stop(requests):
        enter(requests)
        engine.stop()
        stopper.start()
        stopper.join(0.2)  # it may wait for the submit to end

    monkeypatch.setattr(engine._admission, "enter", enter_and_stop)
    request_id = engine.submit(Request([0, 1], SamplingParams(max_tokens=4)))
    stopper.join(10)
    assert [(o.request_id, o.finish_reason) for o in outputs] == [(request_id, "abort")]


# Seeded bugs: each replaces one function, which it is given first, by a broken one.

BUGS = []


def bug(owner, name):
    def register(broken):
        BUGS.append(pytest.param(owner, name, broken, id=broken.__name__))
        return broken

    return register


@bug(Lives, "end")
def cancelled_sequence_keeps_its_blocks(original, lives, sequence, reason):
    if reason == "abort":
        sequence.block_ids = []
    original(lives, sequence, reason)


@bug(Engine, "cancel")
def prefilling_request_cannot_be_cancelled(original, engine, request_id):
    if all(s.output_ids for s in engine._lives._open.get(request_id, ())):
        original(engine, request_id)


@bug(SequenceBlocks, "forget")
def blocks_are_released_twice(original, blocks, sequence):
    held = list(sequence.block_ids)
    original(blocks, sequence)
    blocks.pool.release([b for b in held if blocks.pool._ref[b]])


@bug(SequenceBlocks, "forget")
def preempted_sequence_keeps_its_count(original, blocks, sequence):
    n_cached = sequence.n_cached
    original(blocks, sequence)
    sequence.n_cached = n_cached


@bug(Pipeline, "_plan")
def preempted_sequence_goes_to_the_tail(original, pipeline, only):
    plan = original(pipeline, only)
    live = pipeline._lives.live
    for s in plan.preempted:
        live[s.id] = live.pop(s.id)
    return plan


@bug(SequenceBlocks, "publish")
def half_filled_block_is_published(original, blocks, sequence):
    original(blocks, sequence)
    if sequence.n_cached % 2:
        blocks.pool.publish(sequence.block_ids[-1], blocks.pool.match([])[1], bytes(8))


@bug(BlockPool, "publish")
def prefix_forgets_what_came_before(original, pool, block, parent, tokens):
    return original(pool, block, pool.match([])[1], tokens)


@bug(BlockPool, "match")
def matched_blocks_are_not_held(original, pool, tokens):
    blocks, prefix = original(pool, tokens)
    pool.release(blocks)
    return blocks, prefix


@bug(Pipeline, "_recover")
def old_cache_survives_a_reset(original, pipeline, *args):
    blocks = pipeline._placement.blocks
    original(pipeline, *args)
    pipeline._placement.blocks = blocks


@bug(Pipeline, "_take")
def token_is_delivered_twice(original, pipeline, batch, result, outputs):
    n = len(outputs)
    original(pipeline, batch, result, outputs)
    outputs += [o for o in outputs[n:] if not o.finish_reason][:1]


@bug(requests, "Sequence")
def one_token_too_many_is_generated(original, **fields):
    return original(**fields | {"max_tokens": fields["max_tokens"] + 1})


@bug(requests, "sample_seeds")
def samples_share_a_seed(original, engine_seed, request_id, params):
    return original(engine_seed, request_id, params)[:1] * params.n


@bug(placement, "schedule")
def one_block_too_few_is_taken(original, *args):
    plan = original(*args)
    chunks = [c._replace(n_blocks=max(c.n_blocks - 1, 0)) for c in plan.chunks]
    return plan._replace(chunks=chunks)


@bug(placement, "schedule")
def chunk_runs_past_the_known_tokens(original, *args):
    plan = original(*args)
    chunks = [c._replace(n_new=c.n_new + 1) if c.n_new > 1 else c for c in plan.chunks]
    return plan._replace(chunks=chunks)


@bug(placement, "pack")
def seed_is_the_row(original, *args):
    batch = original(*args)
    part = unpack(batch.packed, batch.shape)
    column = len(FLOAT_PARAMS) + INT_PARAMS.index("seed")
    part["sample_params"][:, column] = part["sample_rows"]
    return batch


@bug(_Draft, "_preempt_last")
def who_gives_way_keeps_its_chunk(original, draft):
    chunks = list(draft.chunks)
    original(draft)
    draft.chunks[:] = chunks


@bug(Lives, "in_turn")
def newcomers_stay_at_the_tail(original, lives):
    lives._has_newcomers = False
    return lives.live


@bug(HostTables, "extend")
def table_line_is_stale(original, tables, sequence, blocks):
    line = tables.block_tables[sequence.row].copy()
    original(tables, sequence, blocks)
    tables.block_tables[sequence.row] = line


@bug(HostTables, "leave")
def row_is_never_returned(original, tables, sequence):
    sequence.row = -1


@bug(Lives, "_follow")
def other_samples_are_forgotten(original, lives, request_id):
    lives._followers.pop(request_id, None)


@bug(Placement, "retire")
def retired_sequence_keeps_its_row(original, place, sequence):
    original(place, sequence)
    place.tables.free_rows.pop()


@bug(faults.Trials, "defendants")
def suspects_run_together(original, trials, live):
    return list(live.values())


@bug(faults.Trials, "accuse")
def guilty_are_tried_for_ever(original, trials, sequences):
    original(trials, sequences)
    return []


@bug(Pooled, "add")
def recomputed_chunks_count_twice(original, pooled, chunk_sum, start):
    original(pooled, chunk_sum, start or pooled._sum is not None)


@bug(Scoring, "due")
def recomputed_positions_are_scored_again(original, scoring, start, n_new):
    return range(start + 1, original(scoring, start, n_new).stop)


@bug(requests, "scoring")
def scores_begin_behind_what_was_cached(original, request):
    scoring = original(request)
    if scoring is not None:
        scoring.__class__ = type("Scoring", (Scoring,), {"n_cacheable": np.inf})
    return scoring


@bug(States, "add")
def states_lie_at_the_places_of_the_chunk(original, states, rows, start):
    original(states, rows, 0)


@bug(SequenceBlocks, "may_share")
def mean_misses_what_was_cached(original, blocks, sequence):
    return blocks.is_sharing


@bug(FakeRunner, "fetch")
def non_finite_row_is_ignored(original, runner, launched):
    result = original(runner, launched)
    return result._replace(is_finite=np.ones(len(result.is_finite), bool))


@pytest.mark.parametrize(("owner", "name", "broken"), BUGS)
def test_seeded_bug_is_found(monkeypatch, owner, name, broken):
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: broken(original, *args, **kwargs))
    with pytest.raises((AssertionError, LookupError, ValueError, StopIteration)):
        simulate_many()


def test_simulation_without_a_bug_is_silent():
    simulate_many()


def simulate_many() -> None:
    for seed in range(12):
        simulate(seed)
