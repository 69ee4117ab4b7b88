"""The GPU plan: every visible cell once, never beyond its capacity."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.gpu.plan import PlanSizes, make_plan

SIZES = PlanSizes(
    n_tokens=64, n_seqs=8, n_heads=8, n_kv_heads=2, head_size=64, max_context=4096, n_ctas=16
)


def arrays(contexts, sizes):
    """seq_lens, cu_q_lens and n_seqs of sequences (context, new tokens)."""
    seq_lens = np.zeros(sizes.n_seqs, np.int32)
    cu_q_lens = np.zeros(sizes.n_seqs + 1, np.int32)
    for s, (seq_len, n_new) in enumerate(contexts):
        seq_lens[s] = seq_len
        cu_q_lens[s + 1 :] += n_new
    return seq_lens, cu_q_lens, len(contexts)


def covered(plan, sizes) -> np.ndarray:
    """How often each (token, cell) is in an item: causally, whatever the window."""
    count = np.zeros((sizes.n_tokens, sizes.max_context), np.int32)
    for _, token, n_tokens, position, start, end, _, _ in np.concatenate(
        [plan.decode, plan.chunks]
    ):
        for i in range(n_tokens):
            count[token + i, start : min(end, position + i + 1)] += 1
    return count


@st.composite
def batches(draw):
    group_size, n_kv_heads = draw(st.sampled_from([(1, 4), (4, 2), (6, 1), (71, 1), (8, 8)]))
    sizes = PlanSizes(
        n_tokens=draw(st.integers(1, 200)),
        n_seqs=draw(st.integers(1, 24)),
        n_heads=group_size * n_kv_heads,
        n_kv_heads=n_kv_heads,
        head_size=draw(st.sampled_from([64, 256])),
        max_context=draw(st.sampled_from([64, 256, 1000, 20_000])),
        n_ctas=draw(st.sampled_from([8, 16, 264])),
        max_short=draw(st.sampled_from([1, 8, 1000])),
    )
    contexts, left = [], sizes.n_tokens
    for _ in range(draw(st.integers(0, sizes.n_seqs))):
        n_new = draw(st.one_of(st.integers(0, 2), st.integers(0, 200)))
        n_new = min(n_new, left, sizes.max_context)
        longest = st.just(sizes.max_context) if draw(st.booleans()) else st.nothing()
        seq_len = draw(st.one_of(longest, st.integers(n_new, sizes.max_context)))
        contexts.append((seq_len, n_new))
        left -= n_new
    return sizes, contexts, draw(st.sampled_from([None, 1, 100, 300, 5000]))


@settings(max_examples=200, deadline=None)
@given(batches())
def test_every_visible_cell_is_covered_once_within_capacity(batch):
    sizes, contexts, window = batch
    plan = make_plan(*arrays(contexts, sizes), sizes=sizes, window=window)
    assert {name: array.shape for name, array in plan._asdict().items()} == sizes.shapes
    assert all(array.dtype == np.int32 for array in plan)
    count = covered(plan, sizes)
    token = 0
    for seq_len, n_new in contexts:
        for position in range(seq_len - n_new, seq_len):
            first = 0 if window is None else max(0, position - window + 1)
            assert (count[token, first : position + 1] == 1).all()
            assert not count[token, position + 1 :].any()
            token += 1
    assert not count[token:].any()


@settings(max_examples=100, deadline=None)
@given(batches())
def test_merges_list_the_parts_of_each_split_tile_in_order(batch):
    sizes, contexts, window = batch
    plan = make_plan(*arrays(contexts, sizes), sizes=sizes, window=window)
    parts = {(item[1], item[7]): item for item in plan.decode if item[2] and item[6] >= 0}
    n_merged = 0
    for token, n_tokens, slot, n_slots in plan.merges:
        assert n_slots == 0 or n_slots >= 2
        for i in range(n_slots):
            assert parts[token, i][2] == n_tokens
            assert parts[token, i][6] == slot + i < sizes.n_slots
        n_merged += n_slots
    assert n_merged == len(parts)


def test_sequences_without_new_tokens_yield_no_items():
    plan = make_plan(*arrays([(0, 0), (900, 0)], SIZES), sizes=SIZES)
    assert not any(array.any() for array in plan)


def test_each_sequence_goes_to_one_kernel_by_its_new_tokens():
    plan = make_plan(*arrays([(50, 1), (20, 8), (30, 9)], SIZES), sizes=SIZES)
    assert {int(i[0]) for i in plan.decode if i[2]} == {0, 1}
    assert {int(i[0]) for i in plan.chunks if i[2]} == {2}


def test_one_long_context_is_split_for_all_processors():
    plan = make_plan(*arrays([(4096, 1)], SIZES), sizes=SIZES)
    lengths = plan.decode[:, 5] - plan.decode[:, 4]
    assert lengths[lengths > 0].tolist() == [512] * 8
    assert plan.merges[0].tolist() == [0, 1, 0, 8]


def test_most_expensive_items_come_first():
    contexts = [(10, 1), (300, 1), (100, 1), (40, 40)]
    plan = make_plan(*arrays(contexts, SIZES), sizes=SIZES)
    assert (np.diff(plan.decode[:, 5] - plan.decode[:, 4]) <= 0).all()
    assert plan.chunks[0, 1] > plan.chunks[1, 1]


def test_nothing_behind_the_window_is_planned():
    plan = make_plan(*arrays([(4000, 1), (3000, 30)], SIZES), sizes=SIZES, window=100)
    items = plan.decode[plan.decode[:, 2] > 0]
    assert (items[:, 4].min(), items[:, 5].max()) == (3840, 4000)
    assert plan.chunks[0, 4] >= 2816


def test_all_tokens_short_means_no_chunk_kernel():
    sizes = PlanSizes(
        n_tokens=16, n_seqs=16, n_heads=8, n_kv_heads=2, head_size=64, max_context=64, max_short=16
    )
    assert sizes.shapes["chunks"] == (0, 8)
    assert sizes.shapes["merges"] == (0, 4)


def served(n_tokens: int) -> PlanSizes:
    """Of a program for Llama-3-8B on a GPU of 132 multiprocessors."""
    heads = {"n_heads": 32, "n_kv_heads": 8, "head_size": 128}
    return PlanSizes.of(n_tokens=n_tokens, n_seqs=n_tokens, max_context=8192, **heads)


def test_small_programs_give_chunks_to_the_decode_kernel_and_large_ones_do_not():
    with_chunks = [n for n in (8, 32, 64, 128, 256, 512) if served(n).shapes["chunks"][0]]
    assert with_chunks == [256, 512]


def test_a_chunk_of_a_small_program_fits_its_decode_items():
    sizes = served(64)
    plan = make_plan(*arrays([(3000, 64)], sizes), sizes=sizes)
    assert (covered(plan, sizes).sum(axis=1) == np.arange(2937, 3001)).all()
