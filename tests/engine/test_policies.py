"""Other systems' policies keep what any plan must, do as their systems do, and change no token."""

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.policies import POLICIES, chunked, orca, static, vllm_2023
from fastgen_jax.built_in import DEMO
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.scheduler import Limits
from tests.engine.sequences import make_sequence
from tests.engine.simulation import Simulation, fake_engine
from tests.engine.test_scheduler import lengths, owed, running, scheduled, states, waiting
from tests.engine.test_simulation import random_params
from tests.tiny import one_program, random_requests, run, tokens

OTHERS = {name: policy for name, policy in POLICIES.items() if name != "splitfuse"}
ROOMY = Limits(max_batched_tokens=16, max_seqs=8, block_size=4)
policies = st.sampled_from(list(OTHERS.values()))


@st.composite
def bounded(draw):
    """As `states`, of sequences that can reach their longest alone in the pool."""
    sequences, n_free, limits = draw(states())
    n_blocks = n_free + sum(len(s.block_ids) for s in sequences)
    bound = n_blocks * limits.block_size
    for s in sequences:
        s.max_tokens = draw(st.integers(min(s.n_tokens + 1, bound), bound))
        s.prompt_ids = s.prompt_ids[: draw(st.integers(1, s.n_tokens))]
    return sequences, n_free, limits


@given(policies, bounded())
def test_plan_keeps_to_budget_rows_and_blocks(policy, state):
    sequences, n_free, limits = state
    plan = policy(*state)
    n_running = sum(s.row >= 0 for s in sequences)
    n_admitted = sum(s.row < 0 for s in scheduled(plan))
    assert sum(lengths(plan)) <= limits.max_batched_tokens
    assert n_running - len(plan.preempted) + n_admitted <= limits.max_seqs
    reclaimed = sum(len(s.block_ids) for s in plan.preempted)
    assert sum(chunk.n_blocks for chunk in plan.chunks) <= n_free + reclaimed


@given(policies, bounded())
def test_chunk_pays_what_is_owed_with_exactly_the_blocks_it_needs(policy, state):
    for s, n_new, n_blocks in policy(*state).chunks:
        assert 1 <= n_new <= owed(s)
        assert len(s.block_ids) + n_blocks == -(-(s.n_cached + n_new) // state[2].block_size)


@given(policies, bounded())
def test_no_sequence_is_in_a_plan_twice_and_those_of_one_token_come_first(policy, state):
    plan = policy(*state)
    ids = [s.id for s in scheduled(plan) + plan.preempted]
    assert len(set(ids)) == len(ids)
    is_long = [n > 1 for n in lengths(plan)]
    assert is_long == sorted(is_long)


@given(policies, bounded())
def test_something_runs_or_gives_way_whenever_anything_is_live(policy, state):
    plan = policy(*state)
    assert bool(plan.chunks or plan.preempted) == bool(state[0])


@given(policies, bounded())
def test_the_last_in_turn_are_preempted_and_nobody_enters_then(policy, state):
    plan = policy(*state)
    alive = [s for s in state[0] if s.row >= 0]
    assert plan.preempted == alive[::-1][: len(plan.preempted)]
    if plan.preempted:
        assert all(s.row >= 0 for s in scheduled(plan))


@given(policies, bounded())
def test_a_policy_changes_nothing_and_repeats_itself(policy, state):
    before = [dataclasses.replace(s, block_ids=list(s.block_ids)) for s in state[0]]
    plan = policy(*state)
    for s, old in zip(state[0], before, strict=True):
        fields = [f.name for f in dataclasses.fields(s) if f.name != "prompt_ids"]
        assert all(getattr(s, name) == getattr(old, name) for name in fields)
    assert policy(*state) == plan


@given(st.sampled_from([static, orca, vllm_2023]), bounded())
def test_a_prompt_is_whole_unless_no_step_could_hold_it(policy, state):
    for s, n_new, _ in policy(*state).chunks:
        if s.row < 0:
            assert n_new == owed(s) or owed(s) > state[2].max_batched_tokens


@given(bounded())
def test_vllm_2023_never_runs_prompts_beside_decodes(state):
    chunks = vllm_2023(*state).chunks
    assert len({owed(s) == 1 for s, _, _ in chunks if s.row >= 0} or {0}) == 1
    entering = [s for s, _, _ in chunks if s.row < 0]
    assert not entering or all(s.row < 0 or owed(s) > 1 for s, _, _ in chunks)


@given(st.sampled_from([static, orca]), bounded())
def test_who_enters_could_reach_the_longest_that_all_may_become(policy, state):
    sequences, n_free, limits = state
    plan = policy(*state)
    entering = [s for s in scheduled(plan) if s.row < 0]
    alive = [s for s in sequences if s.row >= 0 and s not in plan.preempted] + entering
    reclaimed = sum(len(s.block_ids) for s in plan.preempted)
    most = sum(max(-(-s.max_tokens // limits.block_size) - len(s.block_ids), 0) for s in alive)
    assert not entering or most <= n_free + reclaimed


def decoding(row, **fields):
    return running(6, 5, row, max_tokens=8, **fields)


def prompt(n, **fields):
    return waiting(n, max_tokens=n + 4, **fields)


def test_prompts_first_lets_decodes_wait_as_long_as_prompts_can_enter():
    plan = vllm_2023([decoding(0), prompt(9), prompt(7), prompt(5)], 100, ROOMY)
    assert lengths(plan) == [9]  # two of nine, padded, are more than a step holds


def test_prompts_of_very_different_lengths_do_not_share_a_step():
    wide = Limits(max_batched_tokens=4096, max_seqs=8, block_size=16)
    assert lengths(vllm_2023([prompt(1000), prompt(800)], 1000, wide)) == [1000, 800]
    assert lengths(vllm_2023([prompt(1000), prompt(700)], 1000, wide)) == [1000]


def test_iteration_level_batching_runs_whole_prompts_beside_decodes():
    plan = orca([decoding(0), prompt(9), prompt(7), prompt(3)], 100, ROOMY)
    assert lengths(plan) == [1, 9]  # the one of seven does not fit, and nobody overtakes it


def test_a_batch_is_formed_and_then_nobody_enters_until_all_have_ended():
    entered = make_sequence(6, 5, row=0, prompt_ids=range(5), block_ids=[1, 2], max_tokens=9)
    assert lengths(static([entered, prompt(9)], 100, ROOMY)) == [9]
    answering = make_sequence(7, 6, row=0, prompt_ids=range(5), block_ids=[1, 2], max_tokens=9)
    assert lengths(static([answering, prompt(9)], 100, ROOMY)) == [1]


def test_a_prompt_enters_in_chunks_as_soon_as_there_are_blocks_for_one():
    assert lengths(chunked([decoding(0), prompt(90)], 4, ROOMY)) == [1, 15]
    assert lengths(POLICIES["splitfuse"]([decoding(0), prompt(90)], 4, ROOMY)) == [1]


@pytest.mark.parametrize("name", OTHERS)
def test_random_work_under_another_policy_delivers_what_it_must(name):
    n_preempted = 0
    for seed in range(4):
        rng = random.Random(seed)
        simulation = Simulation(fake_engine(policy=OTHERS[name], num_kv_blocks=12))
        for _ in range(60):
            if rng.random() < 0.4:
                words = [rng.randint(0, 1) for _ in range(rng.randint(1, 12))]
                simulation.submit(words, random_params(rng))
            else:
                simulation.step()
        simulation.drain()
        n_preempted += simulation.engine.stats().n_preemptions
    assert (n_preempted > 0) == (name in ("vllm-2023", "chunked"))


def answers(policy=None):
    """What the demo says to stories of 20 to 120 tokens, in a pool that holds a few of them."""
    sizes = {"max_model_len": 160, "block_size": 16, "num_kv_blocks": 40, "max_num_seqs": 8}
    config = EngineConfig(model=str(DEMO), max_num_batched_tokens=160, **sizes)
    requests = random_requests(5, 24, longest=120, max_tokens=32)
    with one_program(config, policy=policy) as engine:
        return [tokens(outputs) for outputs in run(engine, requests)], engine.stats()


@pytest.fixture(scope="module")
def expected():
    return answers()[0]


@pytest.mark.parametrize("name", OTHERS)
def test_the_demo_says_the_same_under_another_policy(name, expected):
    said, stats = answers(OTHERS[name])
    assert said == expected
    assert stats.n_steps > 50
