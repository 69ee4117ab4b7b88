"""What is special to the GPU kernels, interpreted: split contexts, tiles, plans, dtypes.

Which features work together is tested with the other implementations in test_attention.
"""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.gpu import attention as gpu_attention
from pallas_kernels.gpu.attention import ragged_paged_attention
from pallas_kernels.gpu.plan import MERGE_N_SLOTS, PlanSizes, make_plan
from tests.pallas_kernels.attention_cases import Batch, Case, Implementation, check, make_batch

PLAIN = Case()
SPLIT = Case(n_tokens=16, longest=1200, n_cells=64)
LONG = [(1111, 1), (1000, 7), (3, 2)]
ALL_FEATURES = {"soft_cap": 2.0, "alibi": True, "sinks": True}
interpreted = functools.partial(ragged_paged_attention, interpret=True)
compiled = functools.partial(
    jax.jit, static_argnames="spec", donate_argnames=("kv_cache", "kv_scales")
)
attention = compiled(interpreted)


def plan(meta, case: Case, *, knows_window=True, **sizes):
    """A plan for a GPU of few processors, so that contexts of some hundred cells are split."""
    plan_sizes = PlanSizes(
        n_tokens=case.n_tokens,
        n_seqs=case.n_rows,
        n_heads=case.heads[0],
        n_kv_heads=case.heads[1],
        head_size=case.head_size,
        max_context=case.blocks_per_row * case.n_cells,
        **{"n_ctas": 16} | sizes,
    )
    window = case.window if knows_window else None
    return make_plan(
        meta.seq_lens, meta.cu_q_lens, int(meta.n_seqs), sizes=plan_sizes, window=window
    )


def attend(case: Case, batch: Batch, **options) -> np.ndarray:
    """The output, after checking it and the cache against the oracle."""
    make = functools.partial(plan, **options)
    result = Implementation("pallas_gpu", attention, plan=make)(case, batch)
    check(case, batch, result)
    return result.out


def n_merged(case: Case, batch: Batch, **options) -> int:
    return int((plan(batch.meta, case, **options).merges[:, 3] > 0).sum())


@pytest.mark.parametrize("features", [{}, ALL_FEATURES, ALL_FEATURES | {"window": 300}])
@pytest.mark.parametrize("knows_window", [True, False])
def test_split_contexts_match(features, knows_window):
    case = dataclasses.replace(SPLIT, **features)
    batch = make_batch(case, LONG)
    options = {"knows_window": knows_window, "n_ctas": 64}
    assert n_merged(case, batch, **options) >= 2
    attend(case, batch, **options)


def test_more_parts_than_are_merged_at_once_match(monkeypatch):
    monkeypatch.setattr(gpu_attention, "MERGE_PARTS", 2)
    batch, make = make_batch(SPLIT, LONG), functools.partial(plan, n_ctas=64)
    assert make(batch.meta, SPLIT).merges[:, MERGE_N_SLOTS].max() > 2
    check(SPLIT, batch, Implementation("pallas_gpu", interpreted, plan=make)(SPLIT, batch))


def test_split_contexts_of_a_quantised_cache_and_a_large_group_match():
    case = dataclasses.replace(SPLIT, heads=(40, 1), dtypes=("bfloat16", "float8_e4m3fn"))
    batch = make_batch(case, LONG)
    assert n_merged(case, batch) >= 2
    attend(case, batch)


@pytest.mark.parametrize("window", [None, 1, 130, 700])
@pytest.mark.parametrize("n_cells", [16, 64])
def test_chunks_of_many_tiles_match(n_cells, window):
    case = Case(n_tokens=256, longest=1024, n_cells=n_cells, window=window)
    attend(case, make_batch(case, [(3, 1), (1000, 150), (90, 90)]))


@pytest.mark.parametrize(
    ("n_cells", "longest", "features"),
    [
        (16, 1024, {}),
        (64, 1024, {"window": 130}),
        (64, 1080, ALL_FEATURES),
        (128, 1024, {"head_size": 80}),
        (256, 1024, {"window": 700}),
    ],
)
def test_chunks_match_in_the_tiles_of_a_hopper_gpu(n_cells, longest, features):
    sizes = {"dtypes": ("bfloat16", "bfloat16"), "n_cells": n_cells, "longest": longest}
    case = Case(n_tokens=256, heads=(8, 2), **sizes | features)
    hopper = compiled(functools.partial(interpreted, compute_capability=90))
    batch = make_batch(case, [(3, 1), (1000, 150), (90, 90)])
    check(case, batch, Implementation("pallas_gpu", hopper, plan=plan)(case, batch))


@pytest.mark.parametrize(
    ("chip", "features", "block_n"),
    [
        ("9.0", {}, 128),
        ("8.0", {}, 64),
        ("10.0", {}, 64),
        (None, {}, 64),
        ("9.0", {"soft_cap": 2.0}, 64),
        ("9.0", {"dtypes": ("bfloat16", "int8")}, 64),
        ("9.0", {"head_size": 160}, 32),
    ],
)
def test_chunks_have_large_tiles_on_a_hopper_gpu_alone(monkeypatch, chip, features, block_n):
    found = []
    monkeypatch.setattr(gpu_attention, "_chunk_kernel", lambda *_, layout: found.append(layout))
    device = types.SimpleNamespace(compute_capability=chip)
    chosen = functools.partial(pallas_kernels.select("pallas_gpu", device), interpret=True)
    case = Case(**{"dtypes": ("bfloat16", "bfloat16")} | features)
    Implementation("pallas_gpu", chosen, plan=plan)(case, make_batch(case))
    assert found[0].block_n == block_n


@pytest.mark.parametrize("n_cells", [1, 8, 32, 256])
def test_every_block_size_matches(n_cells):
    case = dataclasses.replace(PLAIN, n_cells=n_cells)
    attend(case, make_batch(case, [(300, 1), (31, 1), (290, 5), (133, 11)]))


@pytest.mark.parametrize(
    "dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "float16")]
)
def test_queries_and_cache_of_different_dtypes_match(dtypes):
    case = dataclasses.replace(PLAIN, dtypes=dtypes)
    attend(case, make_batch(case))


@pytest.mark.parametrize("head_size", [16, 48, 112])
def test_other_head_sizes_match(head_size):
    case = dataclasses.replace(PLAIN, head_size=head_size)
    attend(case, make_batch(case))


def test_without_a_chunk_kernel_long_sequences_still_match():
    batch = make_batch(PLAIN)
    assert plan(batch.meta, PLAIN, max_short=48).chunks.shape == (0, 8)
    attend(PLAIN, batch, max_short=48)


@pytest.mark.parametrize(
    ("n_tokens", "n_rows", "contexts"),
    [(2, 8, [(40, 1), (7, 1)]), (1, 8, [(5, 1)]), (48, 1, [(48, 48)]), (16, 4, [])],
)
def test_small_shapes_work(n_tokens, n_rows, contexts):
    case = dataclasses.replace(PLAIN, n_tokens=n_tokens, n_rows=n_rows)
    attend(case, make_batch(case, contexts))


def test_cells_behind_the_window_may_be_gone():
    case = dataclasses.replace(PLAIN, window=40)
    batch = make_batch(case)
    out = attend(case, batch)
    cache, meta = batch.cache.copy(), batch.meta
    for s in range(int(meta.n_seqs)):
        n_new = meta.cu_q_lens[s + 1] - meta.cu_q_lens[s]
        position = np.arange(max(0, meta.seq_lens[s] - n_new - 40 + 1))
        block = meta.block_tables[s, position // case.n_cells]
        cache[block, :, :, position % case.n_cells] = np.nan
    implementation = Implementation("pallas_gpu", attention, plan=plan)
    np.testing.assert_array_equal(implementation(case, batch._replace(cache=cache)).out, out)


@pytest.mark.parametrize("size", [1e-30, 1e6])
def test_bfloat16_queries_beyond_float16_match_with_a_quantised_cache(size):
    case = dataclasses.replace(PLAIN, dtypes=("bfloat16", "int8"), soft_cap=2.0)
    batch = make_batch(case)
    attend(case, batch._replace(q=(batch.q.astype(np.float32) * size).astype(batch.q.dtype)))


class Negative(Case):
    """Scores turned round."""

    @property
    def spec(self):
        spec = super().spec
        return dataclasses.replace(spec, scale=-spec.scale)


def test_negative_scale_matches():
    attend(Negative(), make_batch(Negative()))


def test_meta_without_a_plan_is_refused():
    with pytest.raises(ValueError, match=r"needs meta\.plan"):
        Implementation("pallas_gpu", attention)(PLAIN, make_batch(PLAIN))


def test_head_sizes_and_groups_that_do_not_fit_are_refused():
    for fault in ({"head_size": 72}, {"heads": (129, 1)}):
        case = dataclasses.replace(PLAIN, **fault)
        with pytest.raises(ValueError, match="that 16 divides and at most 128 query heads"):
            Implementation("pallas_gpu", attention, plan=plan)(case, make_batch(case))
