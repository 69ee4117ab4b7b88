"""Attention cases, their batches, and the float64 oracle that every implementation must match.

The oracle is written from the contract's definitions, one sequence and head after the other, in
numpy; of the implementations it shares only the rule by which values are quantised.

TPU kernels and the Mosaic GPU one run in jax's simulators, whose complaints about races,
semaphores and barriers are faults too.

Every case of one implementation, also on its own hardware:
    python -m tests.pallas_kernels.attention_cases pallas_gpu [--compiled] [--cases REGEX]
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import itertools
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

import pallas_kernels
from pallas_kernels import AttentionSpec, RaggedMeta, cache_dtype, quantize
from pallas_kernels.contract import QUANTIZED

CONTEXTS = {  # C cells per block -> (context with its new tokens, new tokens), singles first
    "decodes": lambda c: [(1, 1), (c - 1, 1), (c, 1), (c + 1, 1), (300, 1)],
    "chunks": lambda c: [(20, 20), (c + 3, 8), (133, 11)],
    "mixed": lambda c: [(1, 1), (c, 1), (c + 1, 1), (299, 1), (20, 20), (133, 11)],
    "multi-token decodes": lambda c: [(5, 1), (300, 2), (c + 1, 3), (c, 4), (17, 2)],
    "with empty": lambda c: [(30, 1), (40, 0), (c + 2, 9), (c, 0), (12, 12), (70, 0)],
}


@dataclass(frozen=True)
class Case:
    """What one call of attention is made of; all of it is static but the contexts."""

    dtypes: tuple[str, str] = ("float32", "float32")  # of q and of the KV cache
    heads: tuple[int, int] = (4, 2)  # query heads, KV heads
    head_size: int = 64
    window: int | None = None
    soft_cap: float | None = None
    alibi: bool = False
    sinks: bool = False
    kind: str = "mixed"  # of CONTEXTS
    n_cells: int = 16
    n_tokens: int = 48
    n_rows: int = 8
    longest: int = 400  # context that a block table can hold

    def __str__(self) -> str:
        flags = [name for name in ("alibi", "sinks") if getattr(self, name)]
        flags += ["cap"] * (self.soft_cap is not None) + [f"w{self.window}"] * bool(self.window)
        sizes = f"{self.heads[0]}x{self.heads[1]}x{self.head_size}", f"c{self.n_cells}"
        return "-".join([*self.dtypes, *sizes, *flags, self.kind.replace(" ", "_")])

    @property
    def blocks_per_row(self) -> int:
        return -(-self.longest // self.n_cells)

    @property
    def n_blocks(self) -> int:
        return self.n_rows * self.blocks_per_row + 1

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(2 / math.sqrt(self.head_size), self.window, self.soft_cap)

    @property
    def contexts(self) -> list[tuple[int, int]]:
        return CONTEXTS[self.kind](self.n_cells)

    def extras(self) -> dict[str, np.ndarray]:
        """The optional arguments per query head."""
        head = np.arange(self.heads[0], dtype=np.float32)
        slopes = np.exp2(-1 - 7 * head / len(head)).astype(np.float32)
        sinks = np.linspace(-2, 5, len(head), dtype=np.float32)
        return ({"alibi_slopes": slopes} if self.alibi else {}) | (
            {"sinks": sinks} if self.sinks else {}
        )


FEATURES = {
    "dtypes": (
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("bfloat16", "int8"),
        ("bfloat16", "float8_e4m3fn"),
        ("float32", "int8"),
    ),
    "heads": ((4, 4), (8, 2), (6, 2), (8, 1), (71, 1)),
    "head_size": (64, 80, 96, 128, 160, 192, 256),
    "window": (None, 1, 40, 200),
    "soft_cap": (None, 2.0),
    "alibi": (False, True),
    "sinks": (False, True),
    "kind": tuple(CONTEXTS),
    "n_cells": (16, 64, 128),
}


def _pairs(values: Iterable[tuple[str, Any]]) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset(pair) for pair in itertools.combinations(values, 2)}


def pairwise(features: dict[str, tuple], *, seed: int = 0) -> list[dict[str, Any]]:
    """Few choices of one value per feature in which each pair of values occurs at least once."""
    rng = random.Random(seed)
    singles = [(name, value) for name, values in features.items() for value in values]
    missing = {pair for pair in _pairs(singles) if len(dict(pair)) == 2}
    order = sorted(missing, key=lambda pair: sorted(map(str, pair)))
    rows = []
    while missing:
        wanted = dict(next(pair for pair in order if pair in missing))
        candidates = [
            {name: rng.choice(values) for name, values in features.items()} | wanted
            for _ in range(60)
        ]
        best = max(candidates, key=lambda row: len(_pairs(row.items()) & missing))
        missing -= _pairs(best.items())
        rows.append(best)
    return rows


def covering(cases: list[Case]) -> list[Case]:
    """Few of the cases in which each value of each feature occurs."""
    missing = {(name, value) for name, values in FEATURES.items() for value in values}
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(missing & set(vars(case).items())))
        missing -= set(vars(best).items())
        chosen.append(best)
    return chosen


CASES = [Case(**row) for row in pairwise(FEATURES)]
FEW_CASES = covering(CASES)


class Batch(NamedTuple):
    """The arguments of one call, in numpy; `expected` and implementations leave them unchanged."""

    q: np.ndarray  # T N H
    k: np.ndarray  # T K H
    v: np.ndarray  # T K H
    cache: np.ndarray  # B K 2 C H
    scales: np.ndarray | None  # B K 2 C
    meta: Any  # RaggedMeta


class Result(NamedTuple):
    out: np.ndarray
    cache: np.ndarray
    scales: np.ndarray | None


def make_meta(case: Case, contexts: list[tuple[int, int]], rng) -> Any:
    """RaggedMeta in numpy, of sequences (cached + new tokens, new tokens) in random blocks."""
    tables = np.zeros((case.n_rows, case.blocks_per_row), np.int32)
    seq_lens = np.zeros(case.n_rows, np.int32)
    cu_q_lens = np.zeros(case.n_rows + 1, np.int32)
    positions, slots = np.zeros((2, case.n_tokens), np.int32)
    free = list(rng.permutation(np.arange(1, case.n_blocks)))
    start = 0
    for s, (seq_len, n_new) in enumerate(contexts):
        n_own = -(-seq_len // case.n_cells)
        tables[s, :n_own] = [free.pop() for _ in range(n_own)]
        position = np.arange(seq_len - n_new, seq_len)
        block = tables[s, position // case.n_cells]
        positions[start : start + n_new] = position
        slots[start : start + n_new] = block * case.n_cells + position % case.n_cells
        start += n_new
        seq_lens[s], cu_q_lens[s + 1 :] = seq_len, start
    n_single = next((s for s, (_, n_new) in enumerate(contexts) if n_new != 1), len(contexts))
    arrays: Any = positions, slots, tables, seq_lens, cu_q_lens
    return RaggedMeta(*arrays, *map(np.int32, (len(contexts), n_single)))


def make_batch(case: Case, contexts=None, *, seed: int = 0, unused: float = np.nan) -> Batch:
    """The case's arguments; every cell and scale that no sequence has cached holds `unused`.

    contexts: (context length with the new tokens, new tokens) of each sequence, those with one new
        token first; the case's own if None. One key in twenty is zeros.
    """
    rng = np.random.default_rng(seed)
    contexts = case.contexts if contexts is None else contexts
    meta = make_meta(case, contexts, rng)
    (n_heads, n_kv_heads), head_size = case.heads, case.head_size
    q_dtype, kv_dtype = map(jnp.dtype, case.dtypes)
    shape = case.n_blocks, n_kv_heads, 2, case.n_cells
    is_quantized = kv_dtype in QUANTIZED
    noise = rng.integers(-128, 128, (*shape, head_size)).astype(np.float32)
    cache = noise if kv_dtype == np.int8 else np.full_like(noise, unused)  # int8 has no NaN
    scales = np.full(shape, unused, np.float32) if is_quantized else None
    for s, (seq_len, n_new) in enumerate(contexts):
        position = np.arange(seq_len - n_new)
        block, cell = meta.block_tables[s, position // case.n_cells], position % case.n_cells
        kv = rng.standard_normal((len(position), n_kv_heads, 2, head_size), np.float32)
        if scales is not None:
            # Scales of all sizes: with equal ones a scale of another token would do.
            kv *= np.exp(rng.uniform(-1, 1, kv.shape[:-1]))[..., None].astype(np.float32)
            kv, scales[block, :, :, cell] = stored(kv, kv_dtype)
        cache[block, :, :, cell] = kv.astype(np.float32)
    q = rng.standard_normal((case.n_tokens, n_heads, head_size))
    k, v = rng.standard_normal((2, case.n_tokens, n_kv_heads, head_size))
    k[3::20] = 0
    q, k, v = (x.astype(q_dtype) for x in (q, k, v))
    return Batch(q, k, v, cache.astype(kv_dtype), scales, meta)


_quantize = jax.jit(quantize, static_argnames="dtype")


def stored(x: np.ndarray, dtype) -> tuple[np.ndarray, np.ndarray | None]:
    """Cells, and scales if quantised, that keys or values "... H" become in a cache of `dtype`."""
    if dtype not in QUANTIZED:
        return x.astype(dtype), None
    cells, scales = _quantize(jnp.asarray(x), dtype)
    return np.array(cells), np.array(scales)


def expected(case: Case, batch: Batch) -> Result:
    """By definition, in float64: what is written, then what each token sees."""
    cache = batch.cache.copy()
    scales = None if batch.scales is None else batch.scales.copy()
    new_k, new_v = stored(batch.k, cache.dtype), stored(batch.v, cache.dtype)
    out, meta = np.zeros(batch.q.shape), batch.meta
    slopes, sinks = (case.extras().get(name) for name in ("alibi_slopes", "sinks"))
    group = batch.q.shape[1] // batch.k.shape[1]
    for s in range(int(meta.n_seqs)):
        seq_len, table = int(meta.seq_lens[s]), meta.block_tables[s]
        tokens = np.arange(meta.cu_q_lens[s], meta.cu_q_lens[s + 1])
        cells = [(table[p // case.n_cells], p % case.n_cells) for p in range(seq_len)]
        own = cells[seq_len - len(tokens) :]
        for token, (block, cell) in zip(tokens, own, strict=True):
            for i, (rows, row_scales) in enumerate((new_k, new_v)):
                cache[block, :, i, cell] = rows[token]
                if scales is not None and row_scales is not None:
                    scales[block, :, i, cell] = row_scales[token]
        for head in range(batch.k.shape[1]):
            keys, values = (
                np.stack([_value(cache, scales, (b, head, i, c)) for b, c in cells]) for i in (0, 1)
            )
            for n, i in itertools.product(range(head * group, (head + 1) * group), range(len(own))):
                query = batch.q[tokens[i], n].astype(np.float64)
                slope = 0.0 if slopes is None else float(slopes[n])
                sink = None if sinks is None else float(sinks[n])
                position = seq_len - len(own) + i
                row = _attention(case.spec, position, query, keys, values, slope, sink)
                out[tokens[i], n] = row
    return Result(out, cache, scales)


def _value(cache: np.ndarray, scales: np.ndarray | None, index: tuple) -> np.ndarray:
    value = cache[index].astype(np.float64)
    return value if scales is None else value * float(scales[index])


@functools.cache
def prepared(case: Case) -> tuple[Batch, Result]:
    """The case's own batch and what is expected of it; shared, not to be changed."""
    batch = make_batch(case)
    return batch, expected(case, batch)


def _attention(spec: AttentionSpec, position, query, keys, values, slope, sink) -> np.ndarray:
    """Of one head's query "H" to the keys and values "M H" of its sequence's positions 0..M-1."""
    first = 0 if spec.window is None else max(0, position - spec.window + 1)
    seen = np.arange(first, position + 1)
    scores = spec.scale * (keys[seen] @ query)
    if spec.soft_cap is not None:
        scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
    weights = np.exp(scores + slope * (seen - position))
    total = weights.sum() + (0.0 if sink is None else np.exp(sink))
    return weights @ values[seen] / total


class Mismatch(AssertionError):
    """An implementation's result is not the expected one."""


class Complaint(AssertionError):
    """A simulator saw a race, or TPU's a semaphore that does not end at zero."""


def check(case: Case, batch: Batch, got: Result, want: Result | None = None) -> None:
    """Raises Mismatch unless the output is close and the cache is the same, bit for bit.

    float32 outputs: every element within 2e-5, absolute plus relative. 16-bit outputs: every
    token's row "N H" within 1e-2 of its norm. What scratch block 0 and cells behind the end of a
    context hold is not looked at.
    """
    want = expected(case, batch) if want is None else want
    out, n_real = got.out.astype(np.float64), int(batch.meta.cu_q_lens[-1])
    if got.out.dtype != batch.q.dtype or got.out.shape != batch.q.shape:
        raise Mismatch(f"out is {got.out.dtype}{got.out.shape}, q {batch.q.dtype}{batch.q.shape}")
    if not np.isfinite(out).all():
        raise Mismatch(f"tokens {_first(~np.isfinite(out).all((1, 2)))} are not finite")
    if out[n_real:].any():
        raise Mismatch(f"padding tokens {_first(out.any((1, 2)), n_real)} are not zeros")
    error = np.abs(out - want.out)
    if case.dtypes[0] == "float32":
        share = (error / (2e-5 * (1 + np.abs(want.out)))).max((1, 2))
    else:
        norms = np.linalg.norm(want.out, axis=(1, 2))
        share = np.linalg.norm(error, axis=(1, 2)) / (1e-2 * np.where(norms == 0, 1, norms))
    if (share > 1).any():
        raise Mismatch(f"tokens {_first(share > 1)} are wrong: {share.max():.3g} x the tolerance")
    is_kept = kept_cells(case, batch.meta)
    for name in ("cache", "scales"):
        _check_bits(name, getattr(got, name), getattr(want, name), is_kept)


def kept_cells(case: Case, meta: Any) -> np.ndarray:
    """Which cells "B C" must be as expected: not those behind the end of a sequence's context.

    Whoever writes a block back whole may clean them.
    """
    is_kept = np.ones((case.n_blocks, case.n_cells), bool)
    for s in range(int(meta.n_seqs)):
        end = int(meta.seq_lens[s])
        if end % case.n_cells:
            is_kept[meta.block_tables[s, end // case.n_cells], end % case.n_cells :] = False
    return is_kept


def _check_bits(name: str, got: Any, want: Any, is_kept: np.ndarray) -> None:
    if got is None or want is None:
        if got is not want:
            raise Mismatch(f"{name} returned: {got is not None}, expected: {want is not None}")
        return
    if (got.dtype, got.shape) != (want.dtype, want.shape):
        raise Mismatch(f"{name} is {got.dtype}{got.shape}, not {want.dtype}{want.shape}")
    bits = f"u{got.dtype.itemsize}"
    both_nan = np.isnan(got.astype(np.float32)) & np.isnan(want.astype(np.float32))
    is_kept = np.expand_dims(is_kept, (1, 2, 4)[: got.ndim - 2])
    is_wrong = (got.view(bits) != want.view(bits)) & ~both_nan & is_kept
    if is_wrong[1:].any():
        block, *rest = np.argwhere(is_wrong[1:])[0]
        raise Mismatch(f"{name}[{block + 1}, {', '.join(map(str, rest))}] differs, of "
                       f"{is_wrong[1:].sum()} elements")  # fmt: skip


def _first(is_wrong: Any, start: int = 0) -> str:
    tokens = start + np.flatnonzero(is_wrong[start:])
    return ", ".join(map(str, tokens[:8])) + ("..." if len(tokens) > 8 else "")


@contextlib.contextmanager
def clock_entries_in_turn() -> Iterator[list[int]]:
    """Inside, copies of TPU's simulator take the entries of its vector clocks in turn.

    By itself it draws each copy's entry from NumPy's global generator, which nobody seeds. A copy
    that ends marks its entry as known to whoever waited for it; so a race with a copy under way is
    missed where another one drew its entry. In turn, none is missed unless as many copies as there
    are entries begin meanwhile. Yields the entries taken.
    """
    turn, taken = itertools.count(), []

    def take(low: int, high: int) -> int:
        entry = low + next(turn) % (high - low)
        taken.append(entry)
        return entry

    with mock.patch.object(np.random, "randint", take):
        yield taken


@dataclass(frozen=True)
class Implementation:
    """One way to compute attention, and how its arguments differ from the harness's.

    function: (q, k, v, kv_cache, meta, *, spec, alibi_slopes, sinks, kv_scales) -> results.
    """

    name: str
    function: Callable[..., tuple]
    is_on_cpu: bool = False  # caches are given as the CPU stores them
    plan: Callable[[Any, Case], Any] | None = None
    is_for_tpu: bool = False  # the cache is "B K 2 H C" with C = 128; no float16
    is_for_hopper: bool = False  # see pallas_kernels/mosaic_gpu/attention.py

    def fit(self, case: Case) -> Case:
        """The nearest case that the implementation takes."""
        if self.is_for_hopper:
            return fit_hopper(case)
        if not self.is_for_tpu:
            return case
        dtypes = tuple("bfloat16" if dtype == "float16" else dtype for dtype in case.dtypes)
        return dataclasses.replace(case, dtypes=dtypes, n_cells=128)

    def __call__(self, case: Case, batch: Batch) -> Result:
        cache, meta = batch.cache, batch.meta
        if self.is_on_cpu:
            cache = cache.view(cache_dtype(cache.dtype.name, "cpu"))
        if self.is_for_tpu:
            cache = cache.swapaxes(-1, -2)
        if self.plan is not None:
            meta = meta._replace(plan=self.plan(meta, case))
        arguments = jax.tree.map(jnp.array, (*batch[:3], cache, meta))
        scales = {} if batch.scales is None else {"kv_scales": jnp.array(batch.scales)}
        extras = {name: jnp.asarray(x) for name, x in case.extras().items()}
        with contextlib.redirect_stdout(io.StringIO()) as printed, clock_entries_in_turn():
            results = self.function(*arguments, spec=case.spec, **extras, **scales)
            out, cache, *rest = map(np.asarray, results)
        if printed.getvalue():  # the simulators print nothing else
            raise Complaint(printed.getvalue())
        if self.is_for_tpu:
            cache = cache.swapaxes(-1, -2)
        if self.is_on_cpu and cache.dtype == cache_dtype(batch.cache.dtype.name, "cpu"):
            cache = cache.view(batch.cache.dtype)
        return Result(out, np.ascontiguousarray(cache), *(rest or [None]))


def fit_hopper(case: Case) -> Case:
    """Matrix units' dtypes, one for all, groups of a power of two and two head sizes."""
    dtype = "float16" if "float16" in case.dtypes else "bfloat16"
    n_heads, n_kv_heads = case.heads
    group_size = min(1 << (n_heads // n_kv_heads - 1).bit_length(), 16)
    return dataclasses.replace(
        case,
        dtypes=(dtype, dtype),
        heads=(group_size * n_kv_heads, n_kv_heads),
        head_size=64 if case.head_size <= 64 else 128,
    )


def implementation(
    name: str,
    function: Callable,
    *,
    interpret: bool = True,
    is_cut_small: bool = True,
    is_eager: bool = False,
    is_joined: bool = True,
    **tiles: int,
) -> Implementation:
    """Of the `ragged_paged_attention` of a module of pallas_kernels, or of a mutant of it.

    interpret: Pallas kernels are interpreted, not compiled for this machine.
    is_cut_small: those that take tiles get small ones, of which short contexts have several.
    is_eager: TPU's simulator copies at once, not at the latest when somebody waits for it.
    is_joined: all of it is compiled as one program, even if the function compiles parts.
    tiles: sizes of TPU's small tiles, by name.
    """
    match name:
        case "pallas_gpu":
            function = functools.partial(function, interpret=interpret)
            return Implementation(name, _jit(function), plan=gpu_plan)
        case "mosaic_gpu":
            simulator = plgpu.InterpretGPUParams(detect_races=True) if interpret else False
            function = functools.partial(function, interpret=simulator)
            return Implementation(name, _jit(function), plan=hopper_plan, is_for_hopper=True)
        case "pallas_tpu":
            simulator = pltpu.InterpretParams(
                detect_races=True,
                dma_execution_mode="eager" if is_eager else "on_wait",
                num_cores_or_threads=tiles.get("n_cores", 1),
                out_of_bounds_reads="raise",
                uninitialized_memory="nan",
                vector_clock_size=128,  # see clock_entries_in_turn
            )
            function = functools.partial(function, interpret=simulator if interpret else False)
            if is_cut_small:
                function = functools.partial(function, tiles=small_tpu_tiles(**tiles))
            return Implementation(name, _jit(function) if is_joined else function, is_for_tpu=True)
        case "xla" | "invariant" | "cpu":
            return Implementation(name, _jit(function), is_on_cpu=True)
    return Implementation(name, _jit(function))


def _jit(function: Callable) -> Callable:
    donated = "kv_cache", "kv_scales"
    return jax.jit(function, static_argnames=("spec",), donate_argnames=donated)


def small_tpu_tiles(**sizes: int):
    from pallas_kernels.tpu.tiles import Tiles

    small = Tiles(decode_blocks=2, decode_streams=2, chunk_queries=32, chunk_blocks=2)
    return dataclasses.replace(small, **sizes)


def hopper_plan(meta: Any, case: Case):
    """Chunks of two tokens already, and where there are none, of one."""
    return gpu_plan(meta, case, max_short=0 if case.kind == "decodes" else 1)


def gpu_plan(meta: Any, case: Case, **sizes_of: int):
    from pallas_kernels.gpu.plan import PlanSizes, make_plan

    sizes = PlanSizes(
        n_tokens=case.n_tokens,
        n_seqs=case.n_rows,
        n_heads=case.heads[0],
        n_kv_heads=case.heads[1],
        head_size=case.head_size,
        max_context=case.blocks_per_row * case.n_cells,
        **sizes_of,
    )
    batch = meta.seq_lens, meta.cu_q_lens, int(meta.n_seqs)
    return make_plan(*batch, sizes=sizes, window=case.window)


MODULES = {
    "reference": "pallas_kernels.reference",
    "xla": "pallas_kernels.xla",
    "invariant": "pallas_kernels.invariant",
    "cpu": "pallas_kernels.cpu.attention",
    "pallas_gpu": "pallas_kernels.gpu.attention",
    "pallas_tpu": "pallas_kernels.tpu.attention",
    "mosaic_gpu": "pallas_kernels.mosaic_gpu.attention",
}
HAS_SIMULATOR = hasattr(plgpu, "InterpretGPUParams")  # of Mosaic GPU kernels; jax 0.10 has none


@functools.cache
def load(name: str, **options: Any) -> Implementation:
    """The implementation of that name; for options see `implementation`."""
    return implementation(name, pallas_kernels.select(name), **options)


def run(name: str, case: Case, **options: bool) -> None:
    """One case of one implementation against the oracle."""
    tested = load(name, **options)
    case = tested.fit(case)
    batch, want = prepared(case)
    check(case, batch, tested(case, batch), want)


def main() -> None:
    # Each warpgroup that the simulator of Mosaic GPU has waiting takes one of XLA's threads, of
    # which there are as many as processors or devices.
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    parser = argparse.ArgumentParser(description="Runs every attention case of an implementation.")
    parser.add_argument("name", choices=MODULES)
    parser.add_argument("--compiled", action="store_true", help="on this machine's accelerator")
    parser.add_argument("--cases", default="", help="only cases whose name this regex matches")
    arguments = parser.parse_args()
    cases = [case for case in CASES if re.search(arguments.cases, str(case))]
    n_wrong, is_interpreted = 0, not arguments.compiled
    for case in cases:
        start = time.perf_counter()
        try:
            run(arguments.name, case, interpret=is_interpreted, is_cut_small=is_interpreted)
            verdict = "ok"
        except Exception as error:  # the other cases are to be seen as well
            n_wrong += 1
            verdict = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        print(f"{time.perf_counter() - start:6.2f} s  {case}: {verdict}", flush=True)
    print(f"{len(cases) - n_wrong} of {len(cases)} cases match the oracle")
    raise SystemExit(bool(n_wrong))


if __name__ == "__main__":
    main()
