"""What benchmarks/gpu/check.py measures: rows, the sizes of its workloads, and the Markdown table.

Imports neither jax nor the engine, so that the process that only starts others stays light.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

BLOCK = 64  # cells of the KV cache, as the engine has them on a GPU


class Row(NamedTuple):
    """One measurement, or one verdict (no seconds). Rates and shares follow from its numbers."""

    what: str
    seconds: float = 0.0
    n_bytes: float = 0.0  # that must move in that time
    n_flops: float = 0.0
    n_tokens: float = 0.0
    min_share: float = 0.0  # of the measured ceiling; the target
    min_tflops: float = 0.0  # the target
    note: str = ""
    is_ok: bool = True  # it ran, and its numbers are right


class Ceilings(NamedTuple):
    """What the device was measured to do, per second; zeros if it was not."""

    n_bytes: float = 0.0
    n_flops: float = 0.0


def ceilings(rows: list[Row]) -> Ceilings:
    """The best rates of some rows."""
    best_bytes = max((row.n_bytes / row.seconds for row in rows if row.seconds), default=0.0)
    best_flops = max((row.n_flops / row.seconds for row in rows if row.seconds), default=0.0)
    return Ceilings(best_bytes, best_flops)


COLUMNS = ("section", "what", "time", "rate", "share", "target", "note")


def table(rows: list[tuple[str, Row]], measured: Ceilings) -> str:
    """Rows with their sections' names, in Markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    lines += [_cells(section, row, measured) for section, row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(section: str, row: Row, measured: Ceilings) -> tuple[str, ...]:
    share = _share(row, measured)
    note = row.note.replace("|", "/").replace("\n", " ")
    if not row.is_ok:
        note = f"**FAILED** {note}"
    percent = f"{100 * share:.0f} %" if share else ""
    return section, row.what, duration(row.seconds), _rates(row), percent, _target(row, share), note


def _share(row: Row, measured: Ceilings) -> float:
    """Of the device's speed: the shortest possible time of what binds, over the time taken."""
    if not row.seconds:
        return 0.0
    pairs = (row.n_bytes, measured.n_bytes), (row.n_flops, measured.n_flops)
    return max((amount / rate / row.seconds for amount, rate in pairs if rate), default=0.0)


def duration(seconds: float) -> str:
    """In the unit that fits."""
    if not seconds:
        return ""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.1f} us"


def _rates(row: Row) -> str:
    if not row.seconds:
        return ""
    amounts = {"GB/s": row.n_bytes / 1e9, "TFLOP/s": row.n_flops / 1e12, "tok/s": row.n_tokens}
    rates = {unit: amount / row.seconds for unit, amount in amounts.items() if amount}
    return ", ".join(
        f"{x:.0f} {unit}" if x >= 10 else f"{x:.2g} {unit}" for unit, x in rates.items()
    )


def _target(row: Row, share: float) -> str:
    if not row.seconds:
        return ""
    if row.min_tflops:
        is_met = row.n_flops / row.seconds >= 1e12 * row.min_tflops
        return f"{row.min_tflops:.0f} TFLOP/s: {'met' if is_met else 'missed'}"
    if not row.min_share:
        return ""
    verdict = "met" if share >= row.min_share else "missed"
    return f"{100 * row.min_share:.0f} %: {verdict if share else 'no ceiling'}"


class Decode(NamedTuple):
    """Sequences of one new token each."""

    n_seqs: int
    context: int  # on average, with the new token
    dtype: str = "bfloat16"  # of the cache


class Prompts(NamedTuple):
    """Sequences of n_new new tokens each, which end a context."""

    n_seqs: int
    context: int
    n_new: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of all workloads, on a GPU and, to try the script, on CPU."""

    is_toy: bool
    heads: tuple[int, int]  # query heads, KV heads
    head_size: int
    n_layers: int  # of attention in one program
    decodes: tuple[Decode, ...]
    prompts: tuple[Prompts, ...]
    decode_share: float  # targets: of the measured copy bandwidth; 0 for none
    step_share: float
    chunk_tflops: float
    pool_size: int  # elements of a large cache
    n_cases: int  # of numerics
    n_threads: int  # that compile
    copy_size: int  # bytes
    matmul_size: int
    graph_decode: Decode
    graph_layers: int
    repeats: int
    repeat_seconds: float
    step_seqs: tuple[int, ...]  # of whole decode steps
    step_context: int
    n_steps: int
    offline_seqs: int
    offline_lengths: tuple[int, int]  # of prompts and of outputs


FULL = Sizes(
    is_toy=False,
    heads=(32, 8),  # Llama 3 8B
    head_size=128,
    n_layers=4,
    decodes=(
        *(Decode(16, 4608), Decode(32, 2304), Decode(64, 1152), Decode(128, 1024)),
        *(Decode(256, 1024), Decode(1, 32768)),
        *(Decode(64, 1152, "float8_e4m3fn"), Decode(256, 1024, "float8_e4m3fn")),
        *(Decode(1, 32768, "float8_e4m3fn"), Decode(256, 1024, "int8")),
    ),
    prompts=(
        *(Prompts(8, 2048, 2048), Prompts(4, 4096, 4096), Prompts(2, 8192, 8192)),
        Prompts(1, 8192, 768),  # one step's part of a prompt
    ),
    decode_share=0.75,
    step_share=0.7,
    chunk_tflops=350.0,
    pool_size=2**31 - 1,
    n_cases=1000,
    n_threads=12,
    copy_size=2**31,
    matmul_size=8192,
    graph_decode=Decode(32, 256),
    graph_layers=32,
    repeats=5,
    repeat_seconds=0.1,
    step_seqs=(1, 32, 128, 256),
    step_context=1024,
    n_steps=40,
    offline_seqs=256,
    offline_lengths=(100, 1024),
)
TOY = replace(
    FULL,
    is_toy=True,
    heads=(4, 2),
    head_size=16,
    n_layers=1,
    decodes=(Decode(1, 300), Decode(2, 40, "int8")),
    prompts=(Prompts(1, 24, 24),),
    decode_share=0.0,
    step_share=0.0,
    chunk_tflops=0.0,
    pool_size=2**18,
    n_cases=1,
    n_threads=1,
    copy_size=2**20,
    matmul_size=64,
    graph_decode=Decode(2, 20),
    graph_layers=1,
    repeats=1,
    repeat_seconds=0.0,
    step_seqs=(1, 2),
    step_context=24,
    n_steps=2,
    offline_seqs=3,
    offline_lengths=(4, 12),
)
