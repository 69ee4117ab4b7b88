"""What the GPU compilers make of the attention kernels: registers, instructions, floors; no GPU.

    pip install jax-cuda12-plugin jax-cuda12-pjrt     # of jax's version: the compiler
    pip install nvidia-cuda-nvcc-cu12 nvidia-cuda-nvdisasm
    python -m benchmarks.gpu.schedule --csv FILE      # one row for each kernel, as Markdown and CSV
    python -m benchmarks.gpu.schedule --chips a100 --head-size 80 --dtype int8

The kernels are those of pallas_gpu, and of mosaic_gpu, which has its own for chunks, where it takes
the case. Columns:
    registers, spilled   of a thread, and bytes that it stores and loads for want of registers
    shared               bytes of a program
    CTAs (warps)         programs and warps that a multiprocessor holds at once
    interior, edge       instructions of a warp for 64 cells of one KV head, in the loop without
                         masks and the one with them; of a merge, all there are
    matrix ... integer   the interior ones by kind
    bytes, unit, issue   cycles that a multiprocessor needs at least for those 64 cells in one
                         program: to read them at its share of the bandwidth, to multiply at the
                         peak of its matrix units, to issue all warps' interior instructions
    binds                the largest of the three, and how many times the next one
Chunks have no bytes: programs that run at once read the same cells, which L2 holds.
Then whole steps, as benchmarks/gpu/launches.py counts them.
"""

import argparse
import csv
import importlib.util
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.sass import (
    ALL_KINDS,
    PACKAGES,
    Kernel,
    find_tool,
    read_kernels,
    read_mosaic_kernel,
)

CELLS = 64  # what the figures are given for
SCHEDULERS = 4  # of a multiprocessor, each issues one instruction a cycle


class Chip(NamedTuple):
    """One multiprocessor's rates; a cycle at the clock that long products run at."""

    clock: float  # Hz
    flops: int  # of bfloat16 products, per cycle
    shared_size: int  # bytes
    bandwidth: float  # of memory, bytes per cycle


CHIPS = {
    "h100": Chip(1.755e9, 4096, 233_472, 3.35e12 / 132 / 1.755e9),
    "h200": Chip(1.755e9, 4096, 233_472, 4.8e12 / 132 / 1.755e9),
    "a100": Chip(1.41e9, 2048, 167_936, 2.039e12 / 108 / 1.41e9),
}


@dataclass(frozen=True)
class Case:
    """What is compiled."""

    chip: str
    head_size: int
    dtype: str  # of the cache
    group: int = 4  # query heads per KV head

    @property
    def has_mosaic(self) -> bool:
        """Whether mosaic_gpu takes it."""
        from convert.chips import GPUS
        from pallas_kernels.contract import check_heads

        try:
            check_heads(
                "mosaic_gpu", head_size=self.head_size, group_size=self.group, dtype=self.dtype
            )
        except ValueError:
            return False
        return GPUS[self.chip]["major"] == 9


class Figures(NamedTuple):
    """Of one kernel; the names are the columns' except for the floors."""

    registers: int
    spilled: int
    shared: int
    n_ctas: int
    n_warps: int
    interior: float
    edge: float
    kinds: dict[str, float]
    floors: dict[str, float]  # empty for a kernel without products

    @property
    def binds(self) -> str:
        if not self.floors:
            return ""
        second, first = sorted(self.floors, key=self.floors.__getitem__)[-2:]
        return f"{first} {self.floors[first] / self.floors[second]:.1f}x"


class Tile(NamedTuple):
    """What one iteration of a kernel's loop does."""

    rows: int
    cells: int
    head_size: int
    cell_size: int  # bytes from memory, of a key and a value with their scales
    n_copying: int = 0  # warps that do nothing else

    def floors(self, chip: Chip, n_issued: float) -> dict[str, float]:
        """Cycles for CELLS cells.

        n_issued: instructions of all warps for them.
        """
        return {
            "bytes": CELLS * self.cell_size / chip.bandwidth,
            "unit": 4 * self.rows * CELLS * self.head_size / chip.flops,
            "issue": n_issued / SCHEDULERS,
        }


def measure(case: Case) -> dict[str, Figures]:
    """Compiles the attention of one step and reads its kernels, by their names.

    Raises:
        FileNotFoundError: a tool is not installed.
    """
    from tests import targets
    from tests.gpu.serving import compile_attention

    serving = _serving(case)
    with tempfile.TemporaryDirectory() as dump:
        compile_attention(targets.gpu_target(case.chip), serving, dump=Path(dump))
        kernels = read_kernels(Path(dump), "attention_")
    tiles = make_tiles(case, serving.dtype)
    return {x.name: figures(x, CHIPS[case.chip], tiles.get(x.name)) for x in kernels}


def measure_mosaic(case: Case) -> dict[str, Figures]:
    """As `measure`, the kernel of mosaic_gpu.

    Raises:
        FileNotFoundError: a tool is not installed.
    """
    import pallas_kernels
    from pallas_kernels.mosaic_gpu.chunk import CELLS as N_CELLS
    from pallas_kernels.mosaic_gpu.chunk import ROWS, make_tiles
    from tests import targets
    from tests.gpu.serving import compile_attention

    serving, name = _serving(case), "chunks_mosaic"
    tiles = make_tiles(*serving.heads, case.head_size, serving.n_cells, case.dtype)
    with tempfile.TemporaryDirectory() as dump:
        attention = pallas_kernels.select("mosaic_gpu")
        target = targets.gpu_target(case.chip)
        compile_attention(target, serving, attention, dump=Path(dump))
        kernel = read_mosaic_kernel(Path(dump), name, tiles.shared_size)
    tile = Tile(2 * ROWS, N_CELLS, case.head_size, 0, n_copying=4)
    return {name: figures(kernel, CHIPS[case.chip], tile)}


def _serving(case: Case):
    from tests.gpu.serving import Serving

    heads = 8 * case.group, 8
    return Serving(heads=heads, head_size=case.head_size, cache_dtype=case.dtype)


def make_tiles(case: Case, q_dtype: str) -> dict[str, Tile]:
    """Of the kernels that loop over cells, by the kernels' names."""
    import jax.numpy as jnp

    from convert.chips import GPUS
    from pallas_kernels.contract import QUANTIZED, AttentionSpec
    from pallas_kernels.gpu import layout, plan

    cell = jnp.dtype(case.dtype)
    base = layout.Layout(
        n_heads=case.group,
        n_kv_heads=1,
        head_size=case.head_size,
        n_cells=CELLS,
        table_width=1,
        dtype=layout.operand_dtype(jnp.dtype(q_dtype), cell),
        cache_dtype=cell,
        spec=AttentionSpec(1.0),
        compute_capability=10 * GPUS[case.chip]["major"],
    )
    rows = {
        "attention_decode": plan.decode_rows(case.group),
        "attention_chunks": plan.chunk_rows(case.group, case.head_size),
    }
    size = 2 * (case.head_size * cell.itemsize + 4 * (cell in QUANTIZED))
    sizes = {"attention_decode": size, "attention_chunks": 0}
    tiled = {name: layout.tiled(base, n_rows) for name, n_rows in rows.items()}
    return {
        name: Tile(x.block_m, x.block_n, case.head_size, sizes[name]) for name, x in tiled.items()
    }


def figures(kernel: Kernel, chip: Chip, tile: Tile | None) -> Figures:
    """tile: None for a kernel without a loop over cells."""
    n_warps = kernel.n_threads // 32
    n_ctas = occupancy(kernel, chip)
    bodies = kernel.tile_loops if tile else [kernel.whole]
    scale = CELLS / tile.cells if tile else 1.0
    interior, edge = (scale * bodies[i].total() for i in (0, -1))
    return Figures(
        registers=kernel.n_registers,
        spilled=kernel.spilled_size,
        shared=kernel.shared_size,
        n_ctas=n_ctas,
        n_warps=n_ctas * n_warps,
        interior=interior,
        edge=edge,
        kinds={kind: scale * bodies[0][kind] for kind in ALL_KINDS},
        floors=tile.floors(chip, (n_warps - tile.n_copying) * interior) if tile else {},
    )


def occupancy(kernel: Kernel, chip: Chip) -> int:
    """Programs that a multiprocessor has room for: 65,536 registers, which a warp takes 256 of at
    a time, shared memory, 1 KiB of which each program costs, and 64 warps.
    """
    n_warps = kernel.n_threads // 32
    per_warp = -(-32 * kernel.n_registers // 256) * 256
    return min(
        65_536 // per_warp // n_warps,
        chip.shared_size // (kernel.shared_size + 1024),
        64 // n_warps,
    )


FLOORS = "bytes", "unit", "issue"
HEADER = (
    *("kernel", "chip", "head", "KV", "registers", "spilled", "shared", "CTAs (warps)"),
    *("interior", "edge", *ALL_KINDS, *FLOORS, "binds"),
)


def table_row(name: str, case: Case, f: Figures) -> list[str]:
    """One line under HEADER."""
    counts = [f.interior, f.edge, *f.kinds.values()]
    floors = [f"{f.floors[name]:.0f}" if f.floors else "" for name in FLOORS]
    return [
        *(name.removeprefix("attention_"), case.chip, str(case.head_size), case.dtype),
        *(str(f.registers), str(f.spilled), str(f.shared), f"{f.n_ctas} ({f.n_warps})"),
        *(f"{n:.0f}" for n in counts),
        *floors,
        f.binds,
    ]


def rows(cases: list[Case]) -> Iterator[list[str]]:
    """Of all kernels of all cases, printed as they come."""
    print(markdown(HEADER), markdown(["---"] * len(HEADER)), sep="\n")
    for case in cases:
        mosaic = measure_mosaic(case) if case.has_mosaic else {}
        for name, found in (measure(case) | mosaic).items():
            row = table_row(name, case, found)
            print(markdown(row), flush=True)
            yield row


def markdown(row: Sequence[str]) -> str:
    return f"| {' | '.join(row)} |"


def make_parser() -> argparse.ArgumentParser:
    """The command line; lists are separated by commas."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--chips", default="h100,a100", help=f"of {', '.join(CHIPS)}")
    parser.add_argument("--head-size", default="64,128", help="one or more")
    parser.add_argument("--group", type=int, default=4, help="query heads per KV head")
    parser.add_argument("--dtype", default="bfloat16,float8_e4m3fn,int8", help="of the cache")
    parser.add_argument("--steps", default="8,32,512", help="tokens of whole steps, or nothing")
    parser.add_argument("--csv", type=Path, help="a file for the same table")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    chips, sizes = args.chips.split(","), map(int, args.head_size.split(","))
    if unknown := set(chips) - set(CHIPS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; see --help")
    try:
        for tool in PACKAGES:
            find_tool(tool)
    except FileNotFoundError as error:
        parser.error(str(error))
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        parser.error("no jax_cuda12_plugin here to compile with; see this file's first lines")
    os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    combinations = itertools.product(chips, sizes, args.dtype.split(","))
    table = list(rows([Case(*combination, args.group) for combination in combinations]))
    if args.csv:
        with args.csv.open("w", newline="") as file:
            csv.writer(file).writerows([HEADER, *table])
    print_steps(chips, [int(n) for n in args.steps.split(",") if n])


def print_steps(chips: list[str], sizes: list[int]) -> None:
    """The table of benchmarks/gpu/launches.py."""
    from benchmarks.gpu import launches  # it imports jax

    table = launches.rows(list(launches.MODELS), chips, sizes) if sizes else ()
    for i, row in enumerate(table):
        print(f"\n{markdown(row)}\n{markdown(['---'] * len(row))}" if i == 0 else markdown(row))


if __name__ == "__main__":
    main()
