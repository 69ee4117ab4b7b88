"""What the TPU compiler makes of an attention kernel's inner loop: cycles and units, without a TPU.

    pip install libtpu                                        # the compiler; no TPU is needed
    python -m benchmarks.tpu_schedule                         # our kernels and jax's, v5e and v6e
    python -m benchmarks.tpu_schedule --kernels ours_decode --chips v6e --head-size 80
    python -m benchmarks.tpu_schedule --kernels ours_decode --tiles decode_blocks=4 --keep /tmp/d
    python -m benchmarks.tpu_schedule --tune                  # tile sizes for pallas_kernels
    python -m benchmarks.tpu_schedule --kernels rpa3_decode   # needs the package tpu-inference

libtpu dumps the schedule twice: "packed-bundles-post-ra", one bundle a cycle of its own latency
model, with the cycles in which nothing issues; and "final_bundles", the same without most of them.
`cycles` counts the first, `bundles` the second: the truth lies between and near the first. No DMA
is waited for in either: the DMA's time stands beside them and the larger one binds.

Columns, all of the innermost loops that use the MXU:
    cycles, bundles   per 128 KV cells of one KV head, for chunk kernels also per 128 query rows
                      (a row is one query head of one token), on the loop body's hot path
    all               cycles with the branches off that path (masks, flushes, first and last items)
                      both contain a share of the loop around it where that has several such loops
    MM PUSH XLU VALU EUP VLD VST   percent of cycles in which the unit issues/of its slots taken
    slots             the fullest unit: no schedule of these instructions takes fewer cycles
    MXU               cycles of the two matmuls at the chip's peak rate
    DMA               cycles to read those cells from HBM at the chip's bandwidth
    fill, spill       vector registers reloaded and stored per iteration, percent of its cycles
    roof              the larger of MXU and DMA, as percent of the larger of cycles and DMA
    bound             which of cycles and DMA is the larger: "DMA 1.6x" means hidden compute
"""

import argparse
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Chip(NamedTuple):
    """One TensorCore's rates. Assumptions: the vendor's bandwidth, halved where a chip has two
    cores, and the clock that gives the vendor's bfloat16 peak with `flops`, which is what the
    compiler takes for a large matmul: 128 x 128 sums on each of four matrix units, or four times
    that."""

    clock: float  # Hz
    bandwidth: float  # of HBM, bytes/s
    flops: int  # bfloat16, per cycle


CHIPS = {
    "v4": Chip(1.05e9, 1.2e12 / 2, 2**17),  # 275 Tflop/s in two cores
    "v5e": Chip(1.5e9, 0.82e12, 2**17),  # 197
    "v5p": Chip(1.75e9, 2.765e12 / 2, 2**17),  # 459 in two cores
    "v6e": Chip(1.75e9, 1.6e12, 2**19),  # 918
    "tpu7x": Chip(2.2e9, 7.4e12 / 2, 2**19),  # 2307 in two cores
}

# libtpu then describes TPUs without asking a cloud host.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "JAX_PLATFORMS": "cpu",
}
DUMP_FLAGS = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=true"

BLOCK = 128  # cells
ROWS = 128  # query rows that a chunk kernel's figures are normalised to


# The dump: bundles, loops, slots.


class Bundle(NamedTuple):
    """One VLIW instruction. `depth` counts the loops around it."""

    depth: int
    target: int | None  # of a branch in it
    issues: bool  # anything at all
    copies: int  # copies from HBM to VMEM that it starts


class Loop(NamedTuple):
    """Bundles start <= i < end of which the last ones branch back to `start`."""

    start: int
    end: int


class Slots(NamedTuple):
    """How many slots of each unit each bundle takes."""

    units: list[str]
    capacity: list[int]
    rows: list[list[int]]


_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(?:[A-Z]{2})? *: +(>*) *\{")
_BRANCH = re.compile(r"sbr\.rel\b[^}]*?target bundleno = (\d+)")
_COPY = re.compile(r"\bdma\.hbm_to_vmem\b")
MAX_BRANCH_DELAY = 8  # bundles that still execute after a branch, on any chip


def parse_bundles(text: str) -> list[Bundle]:
    """The bundles of a packed-bundles dump. An empty one shows no depth: it has its follower's."""
    found: list[tuple[int, str]] = []  # depth, text: a comment may hold line breaks
    for line in text.splitlines():
        if match := _BUNDLE.match(line):
            found.append((len(match[1]), line[match.end() :]))
        elif found:
            found[-1] = found[-1][0], found[-1][1] + line
    bundles: list[Bundle] = []
    depth = 0
    for marks, body in reversed(found):
        issues = not body.lstrip().startswith("}")
        depth = marks if issues else depth
        branch = _BRANCH.search(body)
        target = int(branch[1]) if branch else None
        bundles.append(Bundle(depth, target, issues, len(_COPY.findall(body))))
    return bundles[::-1]


def parse_slots(text: str) -> Slots:
    """A static-per-bundle-utilization dump."""
    lines = [line for line in text.splitlines() if line.strip()]
    header = next(i for i, line in enumerate(lines) if line.startswith("MATMUL"))
    rows = [[int(n) for n in line.split()] for line in lines[header + 3 :]]
    units = [name.strip() for name in lines[header].split(",")]
    return Slots(units, [int(n) for n in lines[header + 1].split()], rows)


def find_loops(bundles: list[Bundle]) -> list[Loop]:
    """Every backward branch closes a loop, which ends with the branch's delay slots."""
    ends: dict[int, int] = {}
    for i, bundle in enumerate(bundles):
        if bundle.target is not None and bundle.target <= i:
            ends[bundle.target] = max(ends.get(bundle.target, 0), _loop_end(bundles, i))
    return [Loop(start, end) for start, end in sorted(ends.items())]


def _loop_end(bundles: list[Bundle], branch: int) -> int:
    end = branch + 1
    limit = min(len(bundles), branch + 1 + MAX_BRANCH_DELAY)
    while end < limit and bundles[end].depth >= bundles[branch].depth:
        end += 1
    return end


def mxu_loops(loops: list[Loop], mxu: list[int]) -> list[Loop]:
    """The innermost loops that use the MXU; most work for it first, then the shorter."""
    with_mxu = [loop for loop in loops if any(mxu[loop.start : loop.end])]
    inner = [x for x in with_mxu if not any(_is_inside(y, x) for y in with_mxu)]
    return sorted(inner, key=lambda x: (-sum(mxu[x.start : x.end]), x.end - x.start))


def _is_inside(inner: Loop, outer: Loop) -> bool:
    return inner != outer and outer.start <= inner.start and inner.end <= outer.end


RARE = 0.3  # a branch that skips less of an iteration's MXU work than this is usually taken


def hot_path(bundles: list[Bundle], loop: Loop, mxu: list[int]) -> list[int]:
    """The bundles of an iteration that does the MXU's work, starts all copies in, and no more.

    mxu: its slots per bundle of the kernel. Of all ways through the body's forward branches, the
    one with the most such work; of those the one with the fewest bundles. What a branch skips that
    has little of that work (moving one token's cell takes some) is not part of it. A taken branch's
    delay slots are left out, an error of a few bundles; a loop inside counts as one iteration.
    """
    worth = _regular_work(bundles, loop, mxu)
    best: dict[int, tuple[int, int, int]] = {loop.end: (0, 0, 0)}
    following: dict[int, int] = {}
    for i in reversed(range(loop.start, loop.end)):
        target, ways = bundles[i].target, [i + 1]
        if target is not None and i < target:
            ways.append(min(target, loop.end))
        following[i] = max(ways, key=lambda j: best[j])
        work, copies, fewer = best[following[i]]
        best[i] = work + worth[i], copies + bundles[i].copies, fewer - 1
    path, i = [], loop.start
    while i < loop.end:
        path.append(i)
        i = following[i]
    return path


def _regular_work(bundles: list[Bundle], loop: Loop, mxu: list[int]) -> list[int]:
    worth, limit = list(mxu), RARE * sum(mxu[loop.start : loop.end])
    for i in range(loop.start, loop.end):
        target = bundles[i].target
        if target is not None and i < target <= loop.end and sum(mxu[i + 1 : target]) < limit:
            worth[i + 1 : target] = [0] * (target - i - 1)
    return worth


class Body(NamedTuple):
    """What the schedule says about one iteration of a loop, on its hot path unless `all_`."""

    cycles: int
    bundles: int  # in which anything issues
    all_cycles: int
    around: int  # cycles of the next loop around it, outside of such loops
    busy: dict[str, float]  # share of cycles in which the unit issues
    used: dict[str, float]  # share of the unit's slots that are taken
    n_fills: int
    n_spills: int


def read_bodies(dump: Path, kernel: str) -> list[Body]:
    """Of the innermost loops of `kernel` that use the MXU; the one with most work for it comes
    first, of equals (as with masks and without) the shorter.

    Raises:
        FileNotFoundError: the dump has no such kernel.
    """
    bundles = parse_bundles(_dumped(dump, kernel, "packed-bundles-post-ra"))
    slots = parse_slots(_dumped(dump, kernel, "pre-delay_hlo-static-per-bundle-utilization"))
    assert len(bundles) == len(slots.rows), (len(bundles), len(slots.rows))
    columns = slots.units.index("MATMUL"), slots.units.index("MATPUSH")
    mxu = [sum(row[i] for i in columns) for row in slots.rows]
    loops = find_loops(bundles)
    inner = mxu_loops(loops, mxu)
    paths = [hot_path(bundles, loop, mxu) for loop in inner]
    around = [_around(bundles, loops, loop, mxu) for loop in inner]
    return [read_body(bundles, slots, *found) for found in zip(inner, paths, around, strict=True)]


def _around(bundles: list[Bundle], loops: list[Loop], inner: Loop, mxu: list[int]) -> int:
    outer = [loop for loop in loops if _is_inside(inner, loop)]
    if not outer:
        return 0
    within = min(outer, key=lambda loop: loop.end - loop.start)
    counted = {i for loop in mxu_loops(loops, mxu) for i in range(loop.start, loop.end)}
    return len(set(hot_path(bundles, within, mxu)) - counted)


def read_body(
    bundles: list[Bundle], slots: Slots, loop: Loop, path: list[int], around: int
) -> Body:
    """Sums over the bundles of `path`."""
    columns = list(zip(*(slots.rows[i] for i in path), strict=True))
    taken = {unit: sum(column) for unit, column in zip(slots.units, columns, strict=True)}
    return Body(
        cycles=len(path),
        bundles=sum(bundles[i].issues for i in path),
        all_cycles=loop.end - loop.start,
        around=around,
        busy={u: sum(map(bool, c)) / len(path) for u, c in zip(slots.units, columns, strict=True)},
        used={
            unit: taken[unit] / n / len(path)
            for unit, n in zip(slots.units, slots.capacity, strict=True)
        },
        n_fills=taken["VLOAD:FILL"],
        n_spills=taken["VSTORE:SPILL"],
    )


def _dumped(dump: Path, kernel: str, name: str) -> str:
    pattern = re.compile(rf"\d+-{re.escape(kernel)}[-\w]*?(\.\d+)?-\d+-{re.escape(name)}\.txt")
    files = sorted(path for path in dump.iterdir() if pattern.fullmatch(path.name))
    if not files:
        raise FileNotFoundError(f"no {name} of a kernel {kernel} in {dump}")
    return files[-1].read_text()


# The kernels: each is compiled in a process of its own, for libtpu reads its flags once.


class Case(NamedTuple):
    """What to compile, and for which chip."""

    chip: str
    head_size: int
    n_kv_heads: int
    group: int
    dtype: str
    tiles: dict[str, int]


Program = tuple[Callable, list[Any], tuple[int, ...]]  # function, shapes, which are donated


class Work(NamedTuple):
    """What one iteration of a kernel's inner loop does, in units: 128 cells of one KV head, for
    chunk kernels met by 128 query rows."""

    units: float
    bytes_per_unit: float  # that HBM must deliver
    flops_per_unit: float
    n_inner: int = 1  # iterations of the inner loop in one of the loop around it


class Subject(NamedTuple):
    """A kernel: how to call it, how its name in the dump begins, what an iteration does."""

    kernel: str
    program: Callable[[Case], Program]
    work: Callable[[Case], Work]


def _shape(dims: tuple[int, ...], dtype: str = "int32") -> Any:
    import jax
    import jax.numpy as jnp

    return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))


N_TOKENS, N_SEQS, N_POOL, N_TABLE = 512, 64, 1024, 32
QUANTIZED = "int8", "float8_e4m3fn"


class OurArguments(NamedTuple):
    """Shapes that the programs of pallas_kernels.tpu take."""

    q: Any
    new: tuple[Any, ...]  # the step's cells "T K 2 H", and their scales "T K 2"
    cache: tuple[Any, ...]
    meta: Any


def our_arguments(case: Case) -> OurArguments:
    """A batch of N_TOKENS tokens in N_SEQS sequences."""
    from pallas_kernels.contract import RaggedMeta

    n_kv, size = case.n_kv_heads, case.head_size
    cache = [_shape((N_POOL, n_kv, 2, size, BLOCK), case.dtype)]
    new = [_shape((N_TOKENS, n_kv, 2, size), case.dtype)]
    if case.dtype in QUANTIZED:
        cache.append(_shape((N_POOL, n_kv, 2, BLOCK), "float32"))
        new.append(_shape((N_TOKENS, n_kv, 2), "float32"))
    meta = RaggedMeta(
        *map(_shape, [(N_TOKENS,), (N_TOKENS,), (N_SEQS, N_TABLE), (N_SEQS,), (N_SEQS + 1,)]),
        n_seqs=_shape(()),
        n_single=_shape(()),
    )
    dtype = "bfloat16" if case.dtype in QUANTIZED else case.dtype
    q = _shape((N_TOKENS, n_kv * case.group, size), dtype)
    return OurArguments(q, tuple(new), tuple(cache), meta)


def our_options(case: Case) -> dict[str, Any]:
    """A plain causal layer's, with the case's tiles."""
    from pallas_kernels.contract import AttentionSpec

    spec = AttentionSpec(scale=case.head_size**-0.5)
    features = {"spec": spec, "alibi_slopes": None, "sinks": None}
    return features | {"tiles": _our_tiles(case), "interpret": False}


def our_decode(case: Case) -> Program:
    """pallas_kernels.tpu's program for single tokens."""
    from pallas_kernels.tpu_decode import paged_decode

    options = our_options(case)
    return (lambda *args: paged_decode(*args, **options)), [*our_arguments(case)], (2,)


def our_chunk(case: Case) -> Program:
    """... for sequences with more new tokens, which are in the cache already."""
    from pallas_kernels.tpu_chunk import paged_chunk

    options, arguments = our_options(case), our_arguments(case)
    args = [arguments.q, arguments.cache, arguments.meta]
    return (lambda *args: paged_chunk(*args, **options)), args, ()


def _our_tiles(case: Case) -> Any:
    from pallas_kernels import tpu_tiles

    return tpu_tiles.Tiles(**case.tiles)


def our_decode_work(case: Case) -> Work:
    """An iteration: `decode_blocks` blocks of each of `decode_streams` sequences, all KV heads."""
    tiles = _our_tiles(case)
    return decode_work(case, tiles.decode_blocks * tiles.decode_streams * case.n_kv_heads)


MAX_UNROLLED_GROUP = 8  # paged_chunk loops over larger groups


def our_chunk_work(case: Case) -> Work:
    """An iteration: `chunk_blocks` blocks of one KV head, `chunk_queries` tokens of its group."""
    tiles = _our_tiles(case)
    rows, blocks, n_inner = tiles.chunk_queries * case.group, tiles.chunk_blocks, case.n_kv_heads
    work = chunk_work(case, blocks, rows)._replace(n_inner=n_inner)
    if case.group <= MAX_UNROLLED_GROUP:
        return work
    return work._replace(units=work.units / case.group, n_inner=n_inner * case.group)


def decode_work(case: Case, n_tiles: int) -> Work:
    """n_tiles: blocks times KV heads."""
    return Work(n_tiles, block_bytes(case), 4 * BLOCK * case.head_size * case.group)


def chunk_work(case: Case, n_tiles: int, rows: int) -> Work:
    """rows: of queries that meet a block while it is in VMEM."""
    flops = 4 * BLOCK * case.head_size * ROWS
    return Work(n_tiles * rows / ROWS, block_bytes(case) * ROWS / rows, flops)


def block_bytes(case: Case) -> float:
    """Keys and values of 128 cells of one KV head, with their scales if quantised."""
    size = {"float32": 4, "bfloat16": 2}.get(case.dtype, 1)
    return 2 * BLOCK * (case.head_size * size + (4 if size == 1 else 0))


JAX_TILES = {"pages": 4, "queries": 32}


def jax_program(case: Case) -> Program:
    """jax's own kernel: blocks of 128 cells, `pages` blocks and `queries` tokens per iteration."""
    from jax.experimental.pallas.ops.tpu import ragged_paged_attention as rpa

    if case.head_size % 128:
        raise ValueError(f"jax_rpa has head sizes of 128 or its multiples, not {case.head_size}")
    tiles = JAX_TILES | case.tiles
    q = _shape((N_TOKENS, case.n_kv_heads * case.group, case.head_size), "bfloat16")
    cache = _shape((N_POOL, BLOCK, 2 * case.n_kv_heads, case.head_size), case.dtype)
    metadata = map(_shape, [(N_SEQS,), (N_SEQS, N_TABLE), (N_SEQS + 1,), (1,)])

    def run(*args):
        return rpa.ragged_paged_attention(
            *args,
            sm_scale=0.1,
            num_kv_pages_per_block=tiles["pages"],
            num_queries_per_block=tiles["queries"],
            vmem_limit_bytes=64 << 20,
        )

    return run, [q, cache, *metadata], ()


def jax_chunk_work(case: Case) -> Work:
    """An iteration: `pages` blocks, `queries` tokens, all heads."""
    tiles = JAX_TILES | case.tiles
    return chunk_work(case, tiles["pages"] * case.n_kv_heads, tiles["queries"] * case.group)


def jax_decode_work(case: Case) -> Work:
    """The same code serves one token, in a tile of `queries`."""
    return decode_work(case, (JAX_TILES | case.tiles)["pages"] * case.n_kv_heads)


RPA3_TILES = {"cells": 512, "queries": 32}


def rpa3_program(case: Case) -> Program:
    """tpu-inference's RPA v3, which pads heads to 128 lanes; one call holds all its kernels."""
    from tpu_inference.kernels.ragged_paged_attention.v3.kernel import (  # pyright: ignore
        ragged_paged_attention,
    )

    tiles, padded = RPA3_TILES | case.tiles, _padded(case).head_size
    dtype = "bfloat16" if case.dtype in QUANTIZED else case.dtype
    packing = {"float32": 1, "bfloat16": 2}.get(case.dtype, 4)
    q = _shape((N_TOKENS, case.n_kv_heads * case.group, case.head_size), dtype)
    kv = _shape((N_TOKENS, case.n_kv_heads, case.head_size), case.dtype)
    cache = _shape(
        (N_POOL, BLOCK, 2 * case.n_kv_heads // packing, packing, padded),
        case.dtype,
    )
    metadata = map(_shape, [(N_SEQS,), (N_SEQS * N_TABLE,), (N_SEQS + 1,), (3,)])
    decode = (1, tiles["cells"], 1, tiles["cells"])
    chunk = (tiles["queries"], tiles["cells"]) * 2

    def run(*args):
        return ragged_paged_attention(
            *args,
            sm_scale=0.1,
            d_block_sizes=decode,
            p_block_sizes=chunk,
            m_block_sizes=chunk,
            vmem_limit_bytes=64 << 20,
        )

    return run, [q, kv, kv, cache, *metadata], (0, 1, 2, 3)


def _padded(case: Case) -> Case:
    return case._replace(head_size=-(-case.head_size // 128) * 128)


def rpa3_decode_work(case: Case) -> Work:
    """An iteration: `cells` of one sequence, all KV heads."""
    n_blocks = (RPA3_TILES | case.tiles)["cells"] / BLOCK
    return decode_work(_padded(case), int(n_blocks * case.n_kv_heads))


def rpa3_chunk_work(case: Case) -> Work:
    """An iteration: `cells`, `queries` tokens, all heads."""
    tiles = RPA3_TILES | case.tiles
    n_tiles = tiles["cells"] // BLOCK * case.n_kv_heads
    return chunk_work(_padded(case), n_tiles, tiles["queries"] * case.group)


SUBJECTS = {
    "ours_decode": Subject("paged_decode", our_decode, our_decode_work),
    "ours_chunk": Subject("paged_chunk", our_chunk, our_chunk_work),
    "jax_decode": Subject("ragged_paged_attention_kernel", jax_program, jax_decode_work),
    "jax_chunk": Subject("ragged_paged_attention_kernel", jax_program, jax_chunk_work),
    "rpa3_decode": Subject("RPAd", rpa3_program, rpa3_decode_work),
    "rpa3_chunk": Subject("RPAm", rpa3_program, rpa3_chunk_work),
}
DEFAULT_KERNELS = "ours_decode,jax_decode,ours_chunk,jax_chunk"
DEFAULT_TILES = {"jax_decode": {"pages": 4, "queries": 8}}


class CompileError(Exception):
    """The compiler, or tracing, refused; with its last line."""


def compile_subject(name: str, case: Case, dump: Path) -> None:
    """Compiles in a process of its own that dumps its schedule.

    Raises:
        CompileError: it failed.
    """
    flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {DUMP_FLAGS.format(dump)}"
    environment = os.environ | ENVIRONMENT | {"LIBTPU_INIT_ARGS": flags.strip()}
    command = [sys.executable, "-m", "benchmarks.tpu_schedule", "--child", name]
    command.append(json.dumps(case._asdict()))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(last_error(done.stderr))


def last_error(stderr: str) -> str:
    """The exception's own line of a traceback, or the last one."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [x for x in lines if re.match(r"[\w.]*(Error|Exception|NotImplemented)\w*:", x)]
    return (errors or lines or ["the compiler died without a word"])[-1][:300]


def compile_here(name: str, case: Case) -> None:
    """In the child: lowers for the described chip and runs libtpu's compiler."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc(topology_name=f"{case.chip}:2x2x1", platform="tpu")
    mesh = Mesh(np.array(topology.devices[:1]), ("tensor",))
    sharding = NamedSharding(mesh, PartitionSpec())
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run, args, donated = SUBJECTS[name].program(case)
        args = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args
        )
        traced = jax.jit(run, donate_argnums=donated).trace(*args)
        traced.lower(lowering_platforms=("tpu",)).compile()


# The figures.


class Figures(NamedTuple):
    """Of one loop, per 128 cells of one KV head (and 128 query rows): see the module's columns."""

    cycles: float
    bundles: float
    all_cycles: float
    slots: float
    mxu: float
    dma: float

    @property
    def bound(self) -> str:
        """DMA or compute, and how much longer it takes than the other."""
        ratio = self.dma / self.cycles
        return f"DMA {ratio:.1f}x" if ratio > 1 else f"compute {1 / ratio:.1f}x"

    @property
    def time(self) -> float:
        """Cycles when copies and compute overlap."""
        return max(self.cycles, self.dma)

    @property
    def roof(self) -> float:
        """Share of the chip's possible speed."""
        return max(self.mxu, self.dma) / self.time


def figures(body: Body, work: Work, case: Case) -> Figures:
    """The body's cycles for a unit of work, and what the chip needs at least."""
    chip = CHIPS[case.chip]
    around = body.around / work.n_inner if work.n_inner > 1 else 0
    return Figures(
        cycles=(body.cycles + around) / work.units,
        bundles=body.bundles / work.units,
        all_cycles=(body.all_cycles + around) / work.units,
        slots=max(body.used.values()) * body.cycles / work.units,
        mxu=work.flops_per_unit / chip.flops,
        dma=work.bytes_per_unit / chip.bandwidth * chip.clock,
    )


UNITS = {
    "MM": "MATMUL",
    "PUSH": "MATPUSH",
    "XLU": "XLU",
    "VALU": "VALU",
    "EUP": "EUP",
    "VLD": "VLOAD",
    "VST": "VSTORE",
}
HEADER = " ".join(
    ["kernel".ljust(12), "chip ", "cycles bundles    all"]
    + [unit.rjust(6) for unit in UNITS]
    + [" slots    MXU    DMA  fill spill roof  bound"]
)


def table_row(label: str, case: Case, body: Body, work: Work) -> str:
    """One line under HEADER."""
    f = figures(body, work, case)
    units = [
        f"{100 * body.busy[unit]:.0f}/{100 * body.used[unit]:.0f}".rjust(6)
        for unit in UNITS.values()
    ]
    return " ".join(
        [label.ljust(12), case.chip.ljust(5)]
        + [f"{f.cycles:6.1f} {f.bundles:7.1f} {f.all_cycles:6.1f}", *units]
        + [f"{f.slots:6.1f} {f.mxu:6.1f} {f.dma:6.1f}"]
        + [f"{100 * n / body.cycles:4.0f}%" for n in (body.n_fills, body.n_spills)]
        + [f"{100 * f.roof:3.0f}%  {f.bound}"]
    )


def measure(name: str, case: Case, keep: Path | None) -> list[Body]:
    """Compiles and reads the subject's loops.

    Raises:
        CompileError: it does not compile, or its loops use no MXU.
    """
    with tempfile.TemporaryDirectory() as scratch:
        dump = keep / f"{name}-{case.chip}" if keep else Path(scratch)
        dump.mkdir(parents=True, exist_ok=True)
        compile_subject(name, case, dump)
        bodies = read_bodies(dump, SUBJECTS[name].kernel)
    if not bodies:
        raise CompileError(f"{SUBJECTS[name].kernel} has no loop that uses the MXU")
    return bodies


def report(name: str, case: Case, keep: Path | None) -> None:
    """Prints the subject's rows; those of further loops for the same work, with a mark."""
    try:
        bodies = measure(name, case, keep)
        work = SUBJECTS[name].work(case)
    except (CompileError, FileNotFoundError) as error:
        print(f"{name:12} {case.chip:5} {error}", flush=True)
        return
    for i, body in enumerate(bodies):
        print(table_row(name if i == 0 else f"  loop {i + 1}", case, body, work), flush=True)


# Tile sizes: for each kernel of pallas_kernels those of Tiles' fields that it uses.

CANDIDATES = {
    "ours_decode": {"decode_blocks": (1, 2, 4, 8), "decode_streams": (1, 2, 4)},
    "ours_chunk": {"chunk_queries": (128, 256), "chunk_blocks": (1, 2, 4)},
}


def candidates(name: str) -> Iterator[dict[str, int]]:
    """All combinations of the kernel's tile sizes."""
    names, sizes = CANDIDATES[name].keys(), CANDIDATES[name].values()
    for combination in itertools.product(*sizes):
        yield dict(zip(names, combination, strict=True))


CONTEXTS = 3, 8, 32  # blocks


def cost(f: Figures, n_blocks: int) -> float:
    """Cycles per block that contexts need in tiles of n_blocks, each with its first and last one.

    Compute has whole tiles and once what is off the hot path; the DMA has the context's blocks.
    """
    rare = (f.all_cycles - f.cycles) * n_blocks
    compute = [-(-c // n_blocks) * n_blocks * f.cycles + rare for c in CONTEXTS]
    times = [max(x, c * f.dma) / c for x, c in zip(compute, CONTEXTS, strict=True)]
    return sum(times) / len(times)


def tune(case: Case) -> dict[str, int]:
    """The cheapest tile sizes of both kernels; prints every candidate."""
    best: dict[str, int] = {}
    for name in CANDIDATES:
        costs: list[tuple[float, dict[str, int]]] = []
        for tiles in candidates(name):
            tried = case._replace(tiles=case.tiles | tiles)
            try:
                body, work = measure(name, tried, None)[0], SUBJECTS[name].work(tried)
            except (CompileError, FileNotFoundError) as error:
                print(f"# {tiles}: {error}", flush=True)
                continue
            n_blocks = next(size for field, size in tiles.items() if field.endswith("_blocks"))
            costs.append((cost(figures(body, work, tried), n_blocks), tiles))
            row = table_row(name, tried, body, work)
            print(f"# {row}  cost {costs[-1][0]:.1f} {tiles}", flush=True)
        if costs:
            best |= min(costs, key=lambda pair: pair[0])[1]
    return best


def print_table(cases: list[Case]) -> None:
    """A literal for pallas_kernels/tpu_tiles.py: (chip, head size, group, dtype) -> Tiles."""
    print(f"# {HEADER}")
    lines = []
    for case in cases:
        fields = ", ".join(f"{name}={size}" for name, size in tune(case).items())
        key = case.chip, case.head_size, case.group, case.dtype
        lines.append(f"    {key!r}: Tiles({fields}),".replace("'", '"'))
    print("\n".join(["TILES = {", *lines, "}"]))


def parse_tiles(text: str) -> dict[str, int]:
    """'decode_blocks=4,decode_streams=2' -> the sizes by name."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    return {name.strip(): int(size) for name, _, size in pairs}


def make_parser() -> argparse.ArgumentParser:
    """The command line; lists are separated by commas."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--chips", default="v5e,v6e", help=f"of {', '.join(CHIPS)}")
    parser.add_argument("--kernels", default=DEFAULT_KERNELS, help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument("--head-size", default="128", help="one or more")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", default="4", help="query heads per KV head, one or more")
    parser.add_argument("--dtype", default="bfloat16", help="of the cache, one or more")
    parser.add_argument("--tiles", type=parse_tiles, default={}, help="as decode_blocks=4,...")
    parser.add_argument("--keep", type=Path, help="a directory for the compiler's dumps")
    parser.add_argument("--tune", action="store_true", help="sweep tile sizes, print a table")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser


def make_cases(args: argparse.Namespace) -> list[Case]:
    """Every combination of the flags' lists."""
    lists = args.chips.split(","), args.head_size.split(","), args.group.split(",")
    combinations = itertools.product(*lists, args.dtype.split(","))
    return [
        Case(chip, int(size), args.kv_heads, int(group), dtype, args.tiles)
        for chip, size, group, dtype in combinations
    ]


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if args.child:
        compile_here(args.child[0], Case(**json.loads(args.child[1])))
        return
    cases: list[Case] = make_cases(args)
    names: list[str] = args.kernels.split(",")
    unknown = {case.chip for case in cases} - set(CHIPS) | set(names) - set(SUBJECTS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; see --help")
    if importlib.util.find_spec("libtpu") is None:
        parser.error("no libtpu here to compile with; pip install libtpu")
    if args.tune:
        print_table(cases)
        return
    print(HEADER)
    for case in cases:
        for name in names:
            tiles = DEFAULT_TILES.get(name, {}) | case.tiles
            report(name, case._replace(tiles=tiles), args.keep)


if __name__ == "__main__":
    main()
