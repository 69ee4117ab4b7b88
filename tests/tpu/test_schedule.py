"""Reading the TPU compiler's schedule, on samples of its dumps, and tiles chosen by it. Nothing is
compiled."""

import ast
import importlib.metadata
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from benchmarks.tpu import schedule
from benchmarks.tpu.dump import (
    Loop,
    find_loops,
    hot_path,
    mxu_loops,
    parse_bundles,
    parse_slots,
    read_bodies,
)
from benchmarks.tpu.schedule import (
    CHIPS,
    Choice,
    CompileError,
    Figures,
    awaited_dma,
    best_tiles,
    cost,
    figures,
    last_error,
    parse_tiles,
    table_source,
)
from benchmarks.tpu.subjects import Case, Work, chunk_work, decode_work, our_chunk_work
from pallas_kernels.tpu import tile_table, tiles
from pallas_kernels.tpu.tiles import DEFAULT, Tiles, nearest, tiles_for

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


@pytest.mark.parametrize(("group", "n_together"), [(1, 1), (4, 4), (7, 7), (16, 8), (71, 1)])
def test_chunk_iteration_has_the_rows_of_the_heads_that_it_takes_together(group, n_together):
    case = CASE._replace(group=group, tiles={"chunk_queries": 256, "chunk_blocks": 4})
    work = our_chunk_work(case)
    assert work.units == pytest.approx(4 * 256 * n_together / 128)
    assert work.n_inner == 8 * group / n_together
    assert work.bytes_per_unit == pytest.approx(65536 * 128 / (256 * group))


def test_few_bytes_under_way_leave_bandwidth_unused():
    f, chip = Figures(50, 40, 80, 24, mxu=1, dma=70), CHIPS["v5e"]  # 1.23 MB in 1.5 us
    assert awaited_dma(f, Work(32, 65536, 0), chip) == 70  # 4.2 MB
    assert awaited_dma(f, Work(4, 65536, 0), chip) == pytest.approx(70 * 1.23e6 / 2**19)


def choose(name: str, case: Case) -> Choice:
    """A compiler that has no memory for eight blocks, and likes four best."""
    n_blocks = case.tiles.get("decode_blocks") or case.tiles["chunk_blocks"]
    if n_blocks == 8:
        raise CompileError("RESOURCE_EXHAUSTED: vmem")
    return Choice(100 / n_blocks, sum(case.tiles.values()), case.tiles)


def test_cheapest_tiles_that_compile_are_chosen_and_of_near_equals_the_smallest(
    monkeypatch, capsys
):
    monkeypatch.setattr(schedule, "try_tiles", choose)
    best = best_tiles("ours_decode", "fake chip", *CASE[1:-1])
    assert best == {"decode_blocks": 4, "decode_streams": 1}
    assert "RESOURCE_EXHAUSTED" in capsys.readouterr().err


def test_table_is_python_source_with_the_command_that_made_it(monkeypatch):
    monkeypatch.setattr(schedule, "try_tiles", choose)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"version of {name}")
    monkeypatch.setattr("sys.argv", ["", "--tune", "table.py"])
    cases = [CASE._replace(chip="tpu0x"), CASE._replace(chip="tpu0x", dtype="int8")]
    head, assignment = ast.parse(table_source(cases)).body
    assert "benchmarks.tpu.schedule --tune table.py" in ast.unparse(head)
    assert "version of libtpu" in ast.unparse(head)
    assert isinstance(assignment, ast.Assign)
    entry = 4, 1, 128, 4
    assert ast.literal_eval(assignment.value) == {"0x": {(128, 4, 2): entry, (128, 4, 1): entry}}


def test_table_names_chips_as_jax_does():
    assert set(tile_table.TILES) <= {str(version) for version in pltpu.ChipVersion}
    assert {"v5e", "v6e", "7x"} == set(tile_table.TILES)


def test_entry_of_the_nearest_sizes_is_taken():
    table = {(64, 1, 2): (1, 1, 128, 1), (128, 4, 2): (2, 1, 128, 1), (128, 4, 1): (3, 1, 128, 1)}
    sizes = [(64, 1, 4), (80, 2, 2), (96, 8, 2), (256, 71, 1)]
    assert [nearest(table, x)[0] for x in sizes] == [1, 1, 2, 3]


def chip_tiles(monkeypatch, chip: str, shape: tuple[int, ...], *, vmem: int = 128, n_heads: int):
    """tiles_for a bfloat16 cache of one block on a chip with so many MiB of VMEM."""
    found = SimpleNamespace(chip_version=chip, vmem_capacity_bytes=vmem << 20, num_cores=1)
    monkeypatch.setattr(tiles.pltpu, "get_tpu_info", lambda: found)
    cache = jax.ShapeDtypeStruct((1, *shape, 128), jnp.bfloat16)
    return tiles_for(512, n_heads, cache, interpret=False)


TABLE = {"v6e": {(128, 4, 2): (8, 1, 256, 2)}}


def test_tiles_are_those_of_the_table_and_of_other_chips_the_default(monkeypatch):
    monkeypatch.setattr("pallas_kernels.tpu.tiles.TILES", TABLE)
    of_table = chip_tiles(monkeypatch, "v6e", (8, 2, 128), n_heads=32)
    assert of_table == Tiles(8, 1, 256, 2, vmem_bytes=96 << 20)
    other = chip_tiles(monkeypatch, "v4", (8, 2, 128), n_heads=32)
    assert (other.decode_blocks, other.decode_streams) == DEFAULT[128, 4, 2][:2]


def test_few_kv_heads_have_more_streams_and_blocks(monkeypatch):
    monkeypatch.setattr("pallas_kernels.tpu.tiles.TILES", {"v6e": {(128, 4, 2): (4, 1, 256, 2)}})
    found = [chip_tiles(monkeypatch, "v6e", (k, 2, 128), n_heads=4 * k) for k in (1, 4, 8, 32)]
    assert [tiles.decode_streams for tiles in found] == [4, 2, 1, 1]
    assert [tiles.decode_blocks for tiles in found] == [8, 8, 4, 4]


def test_many_kv_heads_have_fewer_blocks(monkeypatch):
    monkeypatch.setattr("pallas_kernels.tpu.tiles.TILES", TABLE)
    found = [chip_tiles(monkeypatch, "v6e", (k, 2, 64), n_heads=4 * k) for k in (8, 16, 32)]
    assert [tiles.decode_blocks for tiles in found] == [8, 4, 4]


def test_tiles_fit_a_small_memory(monkeypatch):
    monkeypatch.setattr("pallas_kernels.tpu.tiles.TILES", TABLE)
    tiles = chip_tiles(monkeypatch, "v6e", (8, 2, 128), vmem=16, n_heads=32)  # blocks of 512 KiB
    assert tiles == Tiles(2, 1, 128, 1, vmem_bytes=12 << 20)


def test_compiler_error_is_told_by_its_own_line():
    text = "Traceback\n  File x\njaxlib._jax.XlaRuntimeError: RESOURCE_EXHAUSTED: vmem\nmore\n"
    assert last_error(text).startswith("jaxlib._jax.XlaRuntimeError: RESOURCE_EXHAUSTED")
    assert last_error("") == "the compiler died without a word"


def test_tiles_are_given_by_name():
    assert parse_tiles("decode_blocks=4,decode_streams=2") == {
        "decode_blocks": 4,
        "decode_streams": 2,
    }
