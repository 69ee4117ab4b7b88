"""Dynamic SplitFuse on counts: what a plan may hold, who goes first, who gives way."""

import ast
import dataclasses
import inspect
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen_jax.engine import scheduler
from fastgen_jax.engine.scheduler import MAX_BYPASSED, Limits, schedule, servable_tokens
from fastgen_jax.engine.types import Sequence
from tests.engine.sequences import make_sequence

ROOMY = Limits(max_batched_tokens=16, max_seqs=8, block_size=4)


def running(n_tokens, n_cached, row=0, block_size=4, **fields):
    """A sequence with a row and just the blocks that its cached tokens fill."""
    n_blocks = math.ceil(n_cached / block_size)
    return make_sequence(n_tokens, n_cached, row=row, block_ids=list(range(n_blocks)), **fields)


def waiting(n_tokens, **fields):
    return make_sequence(n_tokens, **fields)


def owed(s):
    return s.n_tokens - s.n_cached


def lengths(plan):
    return [chunk.n_new for chunk in plan.chunks]


def scheduled(plan):
    return [chunk.sequence for chunk in plan.chunks]


@st.composite
def states(draw):
    """Live sequences of an engine in mid-flight: (sequences, free blocks, limits)."""
    block_size, max_seqs = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    limits = Limits(draw(st.integers(max_seqs, 24)), max_seqs, block_size)
    n_blocks = draw(st.integers(1, 16))
    n_free, n_rows, sequences = n_blocks, 0, []
    for _ in range(draw(st.integers(0, 10))):
        n_tokens = draw(st.integers(1, n_blocks * block_size))
        n_cached = draw(st.sampled_from([0, 0, n_tokens - 1, n_tokens // 2]))
        n_held = math.ceil(n_cached / block_size)
        priority = draw(st.sampled_from([0, 0, 0, -1, 1]))
        if n_held <= n_free and n_rows < max_seqs and draw(st.booleans()):
            s = running(n_tokens, n_cached, n_rows, block_size, priority=priority)
            n_free, n_rows = n_free - n_held, n_rows + 1
        else:
            n_bypassed = draw(st.integers(0, MAX_BYPASSED))
            s = waiting(n_tokens, n_bypassed=n_bypassed, priority=priority)
        sequences.append(s)
    return sorted(sequences, key=lambda s: s.turn), n_free, limits


@given(states())
def test_plan_keeps_to_budget_rows_and_blocks(state):
    sequences, n_free, limits = state
    plan = schedule(*state)
    n_running = sum(s.row >= 0 for s in sequences)
    n_admitted = sum(s.row < 0 for s in scheduled(plan))
    assert sum(lengths(plan)) <= limits.max_batched_tokens
    assert n_running - len(plan.preempted) + n_admitted <= limits.max_seqs
    reclaimed = sum(len(s.block_ids) for s in plan.preempted)
    assert sum(chunk.n_blocks for chunk in plan.chunks) <= n_free + reclaimed


@given(states())
def test_chunk_pays_what_is_owed_with_exactly_the_blocks_it_needs(state):
    for s, n_new, n_blocks in schedule(*state).chunks:
        assert 1 <= n_new <= owed(s)
        assert len(s.block_ids) + n_blocks == math.ceil((s.n_cached + n_new) / state[2].block_size)


@given(states())
def test_no_sequence_is_in_a_plan_twice(state):
    plan = schedule(*state)
    ids = [s.id for s in scheduled(plan) + plan.preempted]
    assert len(set(ids)) == len(ids)


@given(states())
def test_chunks_of_one_token_come_first(state):
    is_long = [n > 1 for n in lengths(schedule(*state))]
    assert is_long == sorted(is_long)


@given(states())
def test_every_running_sequence_that_owes_one_runs_or_gives_way(state):
    plan = schedule(*state)
    for s in state[0]:
        if s.row >= 0 and owed(s) == 1:
            assert s in scheduled(plan) or s in plan.preempted


@given(states())
def test_chunk_is_cut_only_when_budget_or_blocks_are_used_up(state):
    plan = schedule(*state)
    _, n_free, limits = state
    n_free += sum(len(s.block_ids) for s in plan.preempted)
    is_full = sum(lengths(plan)) == limits.max_batched_tokens
    are_blocks_gone = sum(chunk.n_blocks for chunk in plan.chunks) == n_free
    cut = [chunk for chunk in plan.chunks if chunk.n_new < owed(chunk.sequence)]
    assert not cut or is_full or are_blocks_gone
    assert len(cut) <= 1 or are_blocks_gone


@given(states())
def test_something_runs_whenever_anything_is_live(state):
    assert bool(schedule(*state).chunks) == bool(state[0])


@given(states())
def test_the_last_in_turn_are_preempted_and_the_first_for_newcomers_only(state):
    plan = schedule(*state)
    alive = [s for s in state[0] if s.row >= 0]
    n = len(plan.preempted)
    assert plan.preempted == alive[::-1][:n]
    assert n < max(len(alive), 1) or any(s.row < 0 for s in scheduled(plan))


@given(states())
def test_nobody_enters_while_others_of_its_priority_or_a_better_one_give_way(state):
    plan = schedule(*state)
    newcomers = [s.priority for s in scheduled(plan) if s.row < 0]
    best = min((s.priority for s in plan.preempted), default=math.inf)
    assert max(newcomers, default=-math.inf) < best


@given(states())
def test_waiting_sequences_are_passed_over_knowingly_and_not_for_ever(state):
    plan = schedule(*state)
    admitted = [s for s in scheduled(plan) if s.row < 0]
    last = max((s.turn for s in admitted), default=(-math.inf, 0))
    passed = [s for s in state[0] if s.row < 0 and s.turn < last and s not in admitted]
    assert plan.bypassed == passed
    assert all(s.n_bypassed < MAX_BYPASSED for s in passed)


@given(states())
def test_schedule_changes_nothing_and_repeats_itself(state):
    sequences = state[0]
    before = [dataclasses.replace(s, block_ids=list(s.block_ids)) for s in sequences]
    order = list(sequences)
    plan = schedule(*state)
    assert sequences == order
    for s, old in zip(sequences, before, strict=True):
        fields = [f.name for f in dataclasses.fields(Sequence) if f.name != "prompt_ids"]
        assert all(getattr(s, name) == getattr(old, name) for name in fields)
    assert schedule(*state) == plan


def test_last_chunk_meets_the_budget_exactly():
    decodes = [running(9, 8, row=0), running(6, 5, row=1)]
    prompts = [waiting(5), waiting(30), waiting(3)]
    plan = schedule(decodes + prompts, 100, ROOMY)
    assert lengths(plan) == [1, 1, 5, 9]
    assert scheduled(plan) == [*decodes, *prompts[:2]]


def test_prompt_continues_where_it_was_cut():
    half = running(30, 9, row=0)
    plan = schedule([half, waiting(30)], 100, ROOMY)
    assert [(s is half, n) for s, n, _ in plan.chunks] == [(True, 16)]


def test_decodes_run_beside_a_long_prompt():
    prompt, decode = running(1000, 16, row=0), running(6, 5, row=1)
    plan = schedule([prompt, decode], 1000, ROOMY)
    assert scheduled(plan) == [decode, prompt]
    assert lengths(plan) == [1, 15]


def test_waiting_sequences_are_admitted_in_arrival_order_up_to_the_rows():
    sequences = [waiting(1) for _ in range(12)]
    assert scheduled(schedule(sequences, 100, ROOMY)) == sequences[:8]


def test_preempted_sequence_re_enters_before_later_arrivals():
    preempted, later = waiting(16), waiting(16)
    assert scheduled(schedule([preempted, later], 100, ROOMY)) == [preempted]


def test_youngest_gives_way_when_a_decode_needs_a_block():
    old, middle, young = (running(5, 4, row=i) for i in range(3))
    plan = schedule([old, middle, young], 1, ROOMY)
    assert plan.preempted == [young]
    assert scheduled(plan) == [old, middle]


def test_no_more_give_way_than_must():
    sequences = [running(9, 8, row=i) for i in range(5)]  # each holds two blocks and needs one
    plan = schedule(sequences, 1, ROOMY)
    assert plan.preempted == sequences[:2:-1]
    assert scheduled(plan) == sequences[:3]


def test_sequence_that_frees_nothing_does_not_suffice():
    sequences = [running(5, 4, row=i) for i in range(3)]
    plan = schedule(sequences, 0, ROOMY, lambda s: 0 if s is sequences[2] else 1)
    assert plan.preempted == [sequences[2], sequences[1]]
    assert scheduled(plan) == sequences[:1]


def test_prompt_without_room_waits_for_running_decodes():
    prompt, decode = running(20, 8, row=0), running(6, 5, row=1)
    plan = schedule([prompt, decode], 0, ROOMY)
    assert scheduled(plan) == [decode]
    assert plan.preempted == []


def test_oldest_prompt_takes_the_blocks_of_younger_ones_when_nothing_else_runs():
    old, young = running(20, 8, row=0), running(20, 8, row=1)
    plan = schedule([old, young], 0, ROOMY)
    assert plan.preempted == [young]
    assert [(s is old, n, blocks) for s, n, blocks in plan.chunks] == [(True, 8, 2)]


def test_better_priority_enters_first():
    late, urgent = waiting(16), waiting(16, priority=-1)
    assert scheduled(schedule([urgent, late], 100, ROOMY)) == [urgent]


def test_prompt_that_waits_goes_before_a_running_one_of_worse_priority():
    urgent, equal = waiting(9), waiting(10, priority=1)
    better, worse = running(9, 4, row=0), running(30, 4, row=1, priority=1)
    plan = schedule([better, urgent, worse, equal], 100, ROOMY)
    assert scheduled(plan) == [better, urgent, worse]
    assert lengths(plan) == [5, 9, 2]


def test_decodes_of_worse_priority_run_beside_better_prompts():
    urgent, decodes = waiting(100), [running(6, 5, row=i, priority=i) for i in range(3)]
    plan = schedule([urgent, *decodes], 100, ROOMY)
    assert scheduled(plan) == [*decodes, urgent]
    assert lengths(plan) == [1, 1, 1, 13]


def test_row_is_taken_from_the_last_in_turn_by_better_priority_only():
    decodes = [running(6, 5, row=i) for i in range(8)]
    assert schedule([*decodes, waiting(2)], 100, ROOMY).preempted == []
    plan = schedule([urgent := waiting(16, priority=-1), *decodes], 100, ROOMY)
    assert plan.preempted == decodes[7:]
    assert scheduled(plan) == [*decodes[:7], urgent]
    assert lengths(plan) == [1] * 7 + [9]  # with the token of whom it replaced


def test_blocks_are_taken_from_no_more_than_must_give_way():
    decodes = [running(9, 8, row=i, priority=i) for i in range(4)]  # each holds two, and needs one
    plan = schedule([urgent := waiting(8, priority=-1), *decodes], 6, ROOMY)
    assert plan.preempted == [decodes[3]]
    assert scheduled(plan) == [*decodes[:3], urgent]


def test_nobody_gives_way_to_one_that_does_not_fit_even_so():
    equal, worse = running(33, 32, row=0), running(5, 4, row=1, priority=1)
    plan = schedule([equal, waiting(40), worse], 2, ROOMY)
    assert scheduled(plan) == [equal, worse]
    assert plan.preempted == []


def test_waiting_sequence_of_no_better_priority_than_a_victim_stays_out():
    decodes = [running(6, 5, row=i, priority=1) for i in range(8)]
    urgent, later = waiting(2), waiting(1, priority=1)
    plan = schedule([urgent, *decodes, later], 100, ROOMY)
    assert plan.preempted == decodes[7:]
    assert later not in scheduled(plan)


def test_admission_leaves_a_block_for_each_running_sequence():
    decode, prompt = running(6, 5, row=0), waiting(8)
    assert scheduled(schedule([decode, prompt], 2, ROOMY)) == [decode]
    assert scheduled(schedule([decode, prompt], 3, ROOMY)) == [decode, prompt]


def test_large_request_is_bypassed_at_most_so_often():
    decode, large = running(6, 5, row=0), waiting(40)
    for n in range(MAX_BYPASSED + 5):
        small = waiting(1)
        plan = schedule([decode, large, small], 5, ROOMY)
        assert (small in scheduled(plan)) == (n < MAX_BYPASSED)
        large.n_bypassed += len(plan.bypassed)
    assert large.n_bypassed == MAX_BYPASSED


def test_request_as_large_as_the_pool_is_admitted_alone():
    large = waiting(40, n_bypassed=MAX_BYPASSED)
    plan = schedule([large, waiting(1)], 10, ROOMY)
    assert scheduled(plan) == [large]


@pytest.mark.parametrize(
    ("max_model_len", "n_blocks", "bound"), [(100, 10, 40), (30, 10, 30), (40, 10, 40)]
)
def test_servable_tokens_are_bound_by_context_and_pool(max_model_len, n_blocks, bound):
    assert servable_tokens(max_model_len, n_blocks, block_size=4) == bound


def test_scheduler_sees_no_arrays():
    tree = ast.parse(inspect.getsource(scheduler))
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not {"numpy", "jax"} & {name.split(".")[0] for name in names}


def test_scheduler_imports_without_jax():
    code = "import sys, fastgen_jax.engine.scheduler; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_prompt_cut_for_want_of_blocks_takes_those_of_a_worse_priority():
    first, last = running(12, 4, row=0, priority=-1), running(9, 8, row=1, priority=1)
    plan = schedule([first, last], 1, ROOMY)
    assert plan.preempted == [last]
    assert plan.chunks == [(first, 8, 2)]


def test_prompt_cut_for_want_of_blocks_takes_none_of_its_own_priority():
    first, last = running(12, 4, row=0), running(9, 8, row=1)
    plan = schedule([first, last], 2, ROOMY)
    assert not plan.preempted
    assert plan.chunks == [(last, 1, 1), (first, 4, 1)]
