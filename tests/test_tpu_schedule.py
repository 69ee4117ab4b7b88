"""Reading the TPU compiler's schedule, on samples of its dumps. Nothing is compiled."""

from pathlib import Path

import pytest

from benchmarks.tpu_schedule import (
    CHIPS,
    Case,
    Figures,
    Loop,
    chunk_work,
    cost,
    decode_work,
    figures,
    find_loops,
    hot_path,
    last_error,
    mxu_loops,
    parse_bundles,
    parse_slots,
    parse_tiles,
    read_bodies,
)

# Two nested loops; the inner one has a branch over the bundles of a flush.
BUNDLES = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s16_s30 = smov.u32 [#allocation8] /* a comment with
 a line break and sbr */  ;;  %s0 = inlined_call_operand.hbm [shape: s32[64]] }
   0x1 LB: > { %s1 = sphi %s30, %s4  ;;  %s2 = sadd.s32 1, %s1 }
   0x2 LB: >> { %v1 = vld [vmem:[%s2] sm:$0xff] }
   0x3   : >> { %5 = sbr.rel (%p1) target bundleno = 7 (0x7), region = 24 }
   0x4   :  {}
   0x5   : >> { %6 = dma.vmem_to_hbm [thread:$0]  /*vmem=*/%s3, /*size_in_granules=*/1024 }
   0x6   : >> { %v7 = vadd.f32 %v1, %v1 }
   0x7 PF: >> { %8 = dma.hbm_to_vmem [thread:$0]  (%p3), /*hbm=*/%s2, /*vmem=*/%s3 }
   0x8   : >> { %9 = vmatmul.bf16.gmra.mxu0 %v1  ;;  %3 = sbr.rel (!%p7) target bundleno = 2 (0x2) }
   0x9   :  {}
   0xa   : >> { %10 = vst [vmem:[%s3] sm:$0xff] %v1 }
   0xb PF: > { %12 = sbr.rel (!%p8) target bundleno = 1 (0x1), region = 3 }
   0xc   :  {}
   0xd   :  { %99 = shalt.err (%p15) }
"""

SLOTS = """== CAPACTIY:
MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
0 0 0 0 0 0 0 0 0 0 2
0 0 0 0 0 0 0 0 0 0 2
0 0 0 0 0 0 1 1 0 0 0
0 0 0 0 0 0 0 0 0 0 1
0 0 0 0 0 0 0 0 0 0 0
0 0 0 0 0 0 0 0 0 0 1
0 0 0 3 0 0 0 0 0 0 0
0 0 0 0 0 0 0 0 0 0 0
4 0 0 2 0 0 0 0 0 0 1
2 0 0 0 0 0 0 0 0 0 0
0 0 0 0 0 0 0 0 1 1 0
0 0 0 0 0 0 0 0 0 0 1
0 0 0 0 0 0 0 0 0 0 0
0 0 0 0 0 0 0 0 0 0 1
"""

INNER = Loop(2, 11)
MXU = [row[0] for row in parse_slots(SLOTS).rows]


def test_bundle_shows_depth_target_and_copies():
    bundles = parse_bundles(BUNDLES)
    assert len(bundles) == 14
    assert [b.depth for b in bundles] == [0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 0, 0]
    assert {i: b.target for i, b in enumerate(bundles) if b.target is not None} == {
        3: 7,
        8: 2,
        11: 1,
    }
    assert [i for i, b in enumerate(bundles) if not b.issues] == [4, 9, 12]
    assert [i for i, b in enumerate(bundles) if b.copies] == [7]


def test_slots_come_with_their_units_and_capacities():
    slots = parse_slots(SLOTS)
    assert len(slots.rows) == 14
    assert dict(zip(slots.units, slots.capacity, strict=True))["VLOAD:FILL"] == 3
    assert slots.rows[8][slots.units.index("MATMUL")] == 4


def test_loop_ends_after_the_delay_slots_of_its_branch():
    assert find_loops(parse_bundles(BUNDLES)) == [Loop(1, 12), INNER]


def test_innermost_loop_with_mxu_work_is_the_one_reported():
    loops = find_loops(parse_bundles(BUNDLES))
    assert mxu_loops(loops, MXU) == [INNER]
    assert mxu_loops(loops, [0] * 14) == []


def test_hot_path_leaves_out_what_a_branch_may_skip():
    assert hot_path(parse_bundles(BUNDLES), INNER, MXU) == [2, 3, 7, 8, 9, 10]


@pytest.mark.parametrize(("work", "length"), [(4, 6), (40, 9)])
def test_skippable_mxu_work_is_on_the_hot_path_unless_it_is_little(work, length):
    mxu = [4 * n for n in MXU]
    mxu[6] = work
    assert len(hot_path(parse_bundles(BUNDLES), INNER, mxu)) == length


def test_dump_of_a_kernel_is_read_by_its_name(tmp_path: Path):
    stem = "1795240892661038176-paged_decode.1"
    (tmp_path / f"{stem}-65-packed-bundles-post-ra.txt").write_text(BUNDLES)
    slots = tmp_path / f"{stem}-68-pre-delay_hlo-static-per-bundle-utilization.txt"
    slots.write_text(SLOTS)
    (body,) = read_bodies(tmp_path, "paged_decode")
    assert (body.cycles, body.bundles, body.all_cycles) == (6, 5, 9)
    assert (body.n_fills, body.n_spills) == (1, 1)
    assert body.around == 2
    assert body.busy["MATMUL"] == pytest.approx(2 / 6)
    assert body.used["MATMUL"] == pytest.approx(6 / 24)
    with pytest.raises(FileNotFoundError, match="paged_chunk"):
        read_bodies(tmp_path, "paged_chunk")


CASE = Case("v5e", head_size=128, n_kv_heads=8, group=4, dtype="bfloat16", tiles={})


def make_body(tmp_path: Path, cycles: int):
    test_dump_of_a_kernel_is_read_by_its_name(tmp_path)
    return read_bodies(tmp_path, "paged_decode")[0]._replace(cycles=cycles)


def test_decode_is_bound_by_the_longer_of_copies_and_compute(tmp_path: Path):
    work = decode_work(CASE, 32)
    slow, fast = (figures(make_body(tmp_path, n), work, CASE) for n in (32 * 240, 32 * 60))
    assert slow.dma == pytest.approx(65536 / CHIPS["v5e"].bandwidth * CHIPS["v5e"].clock)
    assert (slow.cycles, slow.bound, fast.bound) == (240, "compute 2.0x", "DMA 2.0x")


def test_chunk_figures_are_per_128_rows(tmp_path: Path):
    f = figures(make_body(tmp_path, 3200), chunk_work(CASE, 8, rows=512), CASE)
    assert f.cycles == 100
    assert f.roof == pytest.approx(0.64)
    assert f.mxu == pytest.approx(64)  # 2 products of 128 x 128 x 128, four units
    assert f.dma == pytest.approx(119.9 / 4, rel=0.01)


def test_inner_iteration_bears_its_share_of_the_loop_around_it(tmp_path: Path):
    body, work = make_body(tmp_path, 3200)._replace(around=800), chunk_work(CASE, 8, rows=512)
    assert figures(body, work._replace(n_inner=8), CASE).cycles == (3200 + 800 / 8) / 32


def test_large_tiles_cost_short_contexts_more():
    f = Figures(cycles=50, bundles=40, all_cycles=80, slots=24, mxu=1, dma=70)
    assert cost(f, 4) == pytest.approx((320 / 3 + 70 + 70) / 3)
    assert cost(f, 8) > cost(f, 4)


def test_compiler_error_is_told_by_its_own_line():
    text = "Traceback\n  File x\njaxlib._jax.XlaRuntimeError: RESOURCE_EXHAUSTED: vmem\nmore\n"
    assert last_error(text).startswith("jaxlib._jax.XlaRuntimeError: RESOURCE_EXHAUSTED")
    assert last_error("") == "the compiler died without a word"


def test_tiles_are_given_by_name():
    assert parse_tiles("decode_blocks=4,decode_streams=2") == {
        "decode_blocks": 4,
        "decode_streams": 2,
    }
