"""What the TPU compiler makes of an attention kernel's inner loop: cycles and units, without a TPU.

    pip install libtpu                                        # the compiler; no TPU is needed
    python -m benchmarks.tpu.schedule                         # our kernels and jax's, v5e and v6e
    python -m benchmarks.tpu.schedule --kernels ours_decode --chips v6e --head-size 80
    python -m benchmarks.tpu.schedule --kernels ours_decode --tiles decode_blocks=4 --keep /tmp/d
    python -m benchmarks.tpu.schedule --tune pallas_kernels/tpu/tile_table.py    # half an hour
    python -m benchmarks.tpu.schedule --kernels rpa3_decode   # needs the package tpu-inference

`cycles` counts bundles of the schedule with the cycles in which nothing issues, `bundles` those in
which something does: the truth lies between and near the first. No DMA is waited for in either: the
DMA's time stands beside them and the larger one binds.

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
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.tpu.dump import FLAGS, READ_FLAG, Body, read_bodies
from benchmarks.tpu.subjects import DEFAULT_KERNELS, DEFAULT_TILES, SUBJECTS, Case, Work, item_size
from convert.chips import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]


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

# Compilation: each in a process of its own, for libtpu reads its flags once.


class CompileError(Exception):
    """The compiler, or tracing, refused; with its last line."""


def measure(name: str, case: Case, keep: Path | None = None) -> list[Body]:
    """Compiles the subject and reads its loops.

    Args:
        keep: a directory for all that the compiler dumps.

    Raises:
        CompileError: it does not compile, or its loops use no MXU.
        FileNotFoundError: the dump has no such kernel.
    """
    with tempfile.TemporaryDirectory() as scratch:
        dump = keep / f"{name}-{case.chip}" if keep else Path(scratch)
        dump.mkdir(parents=True, exist_ok=True)
        flags = FLAGS.format(dump) if keep else f"{FLAGS.format(dump)} {READ_FLAG}"
        compile_subject(name, case, flags)
        bodies = read_bodies(dump, SUBJECTS[name].kernel)
    if not bodies:
        raise CompileError(f"{SUBJECTS[name].kernel} has no loop that uses the MXU")
    return bodies


def compile_subject(name: str, case: Case, flags: str) -> None:
    """Compiles in a process of its own, with libtpu's flags.

    Raises:
        CompileError: it failed.
    """
    flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}"
    environment = os.environ | ENVIRONMENT
    environment |= {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags.strip()}
    command = [sys.executable, "-m", "benchmarks.tpu.schedule", "--child", name]
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
    "ours_decode": [
        {"decode_blocks": blocks, "decode_streams": streams}
        for blocks, streams in ((2, 1), (4, 1), (8, 1), (4, 2))
    ],
    "ours_chunk": [
        {"chunk_queries": queries, "chunk_blocks": blocks}
        for queries, blocks in ((128, 4), (256, 2), (256, 4))
    ],
}
TUNED_CASES = {"chips": "v5e,v6e,tpu7x", "head_size": "64,128,256", "group": "1,4"}
TUNED_CASES |= {"dtype": "bfloat16,int8"}
CONTEXTS = 3, 8, 32  # blocks
LATENCY = 1.5e-6  # seconds from a copy's start to its end: an assumption
NEAR = 1.03  # costs that differ by less are the same
N_AHEAD = 2  # iterations by which copies are ahead of the products


def cost(f: Figures, n_blocks: int) -> float:
    """Cycles per block that contexts need in tiles of n_blocks, each with its first and last one.

    Compute has whole tiles and once what is off the hot path; the DMA has the context's blocks.
    """
    rare = (f.all_cycles - f.cycles) * n_blocks
    compute = [-(-c // n_blocks) * n_blocks * f.cycles + rare for c in CONTEXTS]
    times = [max(x, c * f.dma) / c for x, c in zip(compute, CONTEXTS, strict=True)]
    return sum(times) / len(times)


def awaited_dma(f: Figures, work: Work, chip: Chip) -> float:
    """The DMA's cycles where an iteration's copies start N_AHEAD iterations before it.

    Little's law: bytes under way = latency x bandwidth; with fewer, bandwidth is left unused.
    """
    n_bytes = N_AHEAD * work.units * work.bytes_per_unit
    return f.dma * max(1.0, LATENCY * chip.bandwidth / n_bytes)


class Choice(NamedTuple):
    """Tile sizes and what they cost."""

    cost: float  # cycles per block
    size: int  # grows with the memory that they take
    tiles: dict[str, int]


def try_tiles(name: str, case: Case) -> Choice:
    """The cost of the case's tiles.

    Raises:
        CompileError, FileNotFoundError: as `measure` does; too little memory is one reason.
    """
    body, work = measure(name, case)[0], SUBJECTS[name].work(case)
    print(f"{table_row(name, case, body, work)}  {case}", file=sys.stderr, flush=True)
    f = figures(body, work, case)
    if name == "ours_decode":
        f = f._replace(dma=awaited_dma(f, work, CHIPS[case.chip]))
    n_blocks = next(size for field, size in case.tiles.items() if field.endswith("_blocks"))
    return Choice(cost(f, n_blocks), math.prod(case.tiles.values()), case.tiles)


@functools.cache
def best_tiles(name: str, *sizes: Any) -> dict[str, int]:
    """The cheapest candidate that compiles, of near equals the smallest.

    sizes: a Case without its tiles.
    """
    choices: list[Choice] = []
    chip, head_size, n_kv_heads, group, dtype = sizes
    for tiles in CANDIDATES[name]:
        case = Case(chip, head_size, n_kv_heads, group, dtype, tiles)
        try:
            choices.append(try_tiles(name, case))
        except (CompileError, FileNotFoundError) as error:
            print(f"{name} {case}: {error}", file=sys.stderr, flush=True)
    assert choices, f"nothing compiles for {sizes}"
    least = min(choice.cost for choice in choices)
    near = [choice for choice in choices if choice.cost <= NEAR * least]
    return min(near, key=lambda choice: choice.size).tiles


def tune(case: Case) -> tuple[int, ...]:
    """The best tile sizes of both kernels, in the order of TABLE_HEAD.

    A decode kernel's rows are whole registers of 8: its schedule is the same for smaller groups. A
    chunk kernel makes a block's cells bfloat16 before it uses them: the cache's dtype changed its
    cycles by 5 % at most on a v5e.
    """
    *whole, _ = case._replace(group=-(-case.group // 8) * 8)
    *wide, _ = case._replace(dtype="bfloat16")
    return *best_tiles("ours_decode", *whole).values(), *best_tiles("ours_chunk", *wide).values()


TABLE_HEAD = """\
\"\"\"Sizes of tiles for tiles.py, chosen by the TPU compiler's schedules. Made, with jax {jax}
and libtpu {libtpu}, by

    python -m benchmarks.tpu.schedule {arguments}
\"\"\"

# Chip -> (head size, query heads per KV head, bytes of a cell's element)
#      -> (decode_blocks, decode_streams, chunk_queries, chunk_blocks)
TILES = {{
"""


def table_source(cases: list[Case]) -> str:
    """pallas_kernels/tpu/tile_table.py with the best tiles of each case."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    lines = [TABLE_HEAD.format(arguments=" ".join(sys.argv[1:]), **versions)]
    for chip, group in itertools.groupby(cases, key=lambda case: case.chip):
        lines.append(f'    "{chip.removeprefix("tpu")}": {{\n')
        for case in group:
            key = case.head_size, case.group, item_size(case)
            lines.append(f"        {key}: {tune(case)},\n")
        lines.append("    },\n")
    return "".join([*lines, "}\n"])


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
    parser.add_argument("--tune", type=Path, help="a file for a table of the best tile sizes")
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
    if args.tune:
        parser.set_defaults(**TUNED_CASES)
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
        args.tune.write_text(table_source(cases))
        return
    print(HEADER)
    for case in cases:
        for name in names:
            tiles = DEFAULT_TILES.get(name, {}) | case.tiles
            report(name, case._replace(tiles=tiles), args.keep)


if __name__ == "__main__":
    main()
