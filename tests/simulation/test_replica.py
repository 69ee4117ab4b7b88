"""A simulated engine plans as the real one does, loses nothing, and is the same each time."""

import random
from unittest import mock

import numpy as np
import pytest

from benchmarks.engine.host import NullRunner
from benchmarks.policies import POLICIES
from benchmarks.simulation.replica import Job, Replica, sizes
from fastgen_jax.engine import startup
from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.types import Request
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.sampling_params import SamplingParams

MODEL = ModelConfig(
    family="null", vocab_size=32000, hidden_size=2, n_layers=1, n_heads=1, n_kv_heads=1,
    head_dim=2, ffn_size=2, max_position=256,
)  # fmt: skip


class Recorded:
    """A policy that remembers what it said: of each call the plan, by arrival."""

    def __init__(self, policy):
        self.policy, self.plans = policy, []

    def __call__(self, *args):
        plan = self.policy(*args)
        chunks = [(s.id, n_new, n_blocks) for s, n_new, n_blocks in plan.chunks]
        self.plans.append((chunks, [s.id for s in plan.preempted], [s.id for s in plan.bypassed]))
        return plan


def work(seed: int, n: int) -> list[Job]:
    """Requests that come while the first one is answered; some prompts begin alike."""
    rng, ids = random.Random(seed), np.random.default_rng(seed)
    documents = [ids.integers(0, 32000, 24) for _ in range(2)]
    jobs = [Job(0.0, 20, 120, ids.integers(0, 32000, 20).astype(np.int32))]
    for time in sorted(rng.uniform(0, 90) for _ in range(n - 1)):
        own = ids.integers(0, 32000, rng.randint(1, 40))
        prompt = np.concatenate([*rng.choices([documents[:1], [own[:0]]])[0], own])
        jobs.append(Job(time, len(prompt), rng.randint(1, 40), prompt.astype(np.int32)))
    return jobs


def simulated(jobs, config, policy) -> tuple[list, Replica]:
    """Plans, of steps that take a second each."""
    recorded = Recorded(policy)
    replica = Replica("0", config, lambda work: 1.0, policy=recorded)
    waiting, now = list(jobs), 0.0
    while waiting or replica.jobs:
        while waiting and waiting[0].time <= now:
            replica.add(waiting.pop(0))
        due = replica.turn(now)
        assert due is not None, "idle while the first request is answered"
        now = due
        replica.commit()
    return recorded.plans, replica


def engine_with(config, policy) -> Engine:
    started = startup.Started(config, MODEL, {}, NullRunner(config))  # type: ignore
    with mock.patch.object(startup, "start", return_value=started):
        return Engine(config, policy=policy)


def real(jobs, config, policy) -> tuple[list, Engine]:
    """Plans of the real engine. Its call number k + 2 begins when step k has ended."""
    recorded = Recorded(policy)
    engine = engine_with(config, recorded)
    waiting, n_calls = list(jobs), 0
    while waiting or engine.has_work:
        n_calls += 1
        while waiting and waiting[0].time <= max(n_calls - 2, 0):
            job = waiting.pop(0)
            params = SamplingParams(max_tokens=job.n_output, ignore_eos=True)
            engine.submit(Request(job.prompt_ids.tolist(), params))
        engine.step()
    return recorded.plans, engine


def config_of(n_blocks: int, *, is_sharing: bool, max_seqs: int = 8):
    return sizes(
        budget=160, max_seqs=max_seqs, n_blocks=n_blocks, block_size=8, max_model_len=160,
        is_sharing=is_sharing,
    )  # fmt: skip


@pytest.mark.parametrize("is_sharing", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_it_plans_as_the_engine_does(name, is_sharing):
    n_preempted = n_reused = 0
    for seed in range(4):
        config = config_of(30, is_sharing=is_sharing)
        plans, replica = simulated(work(seed, 40), config, POLICIES[name])
        expected, engine = real(work(seed, 40), config, POLICIES[name])
        assert [plan for plan in plans if any(plan)] == [plan for plan in expected if any(plan)]
        assert replica.placement.n_preemptions == engine.stats().n_preemptions
        n_preempted += replica.placement.n_preemptions
        n_reused += engine.stats().n_prefix_hits
    assert (n_preempted > 0) == (name not in ("static", "orca"))
    assert (n_reused > 0) == is_sharing


@pytest.mark.parametrize("name", POLICIES)
def test_every_token_comes_once_and_nothing_is_held(name):
    jobs = work(7, 60)
    _, replica = simulated(jobs, config_of(30, is_sharing=False), POLICIES[name])
    assert [len(job.times) for job in jobs] == [job.n_output for job in jobs]
    assert all(job.times == sorted(set(job.times)) for job in jobs)
    assert all(job.times[0] > job.time for job in jobs)
    pool = replica.placement.blocks.pool
    pool.check()
    assert pool.n_free == pool.n_usable
    assert replica.n_outstanding == 0
    computed = sum(job.n_tokens - 1 for job in jobs)
    again = replica.n_step_tokens - computed
    assert (again > 0) == (replica.placement.n_preemptions > 0)


def test_a_step_begins_when_the_one_before_has_ended():
    config = config_of(100, is_sharing=False)
    ahead = Replica("0", config, lambda work: work.n_tokens / 100)
    job = Job(0.0, 50, 3)
    ahead.add(job)
    now: float | None = 0.0
    while (now := ahead.turn(now)) is not None:
        ahead.commit()
    assert job.times == pytest.approx([0.5, 0.51, 0.52])
    assert ahead.busy == pytest.approx(0.52)


def test_who_comes_during_a_step_waits_for_the_one_that_was_planned_ahead():
    config = config_of(100, is_sharing=False)
    firsts = []
    for is_ahead in (True, False):
        replica = Replica("0", config, lambda work: 1.0, is_ahead=is_ahead)
        replica.add(Job(0.0, 10, 50))
        now = replica.turn(0.0)
        late = Job(0.5, 10, 2)
        replica.add(late)
        while not late.times:
            replica.commit()
            now = replica.turn(now)
        firsts.append(late.times[0])
    assert firsts == [3.0, 2.0]
