"""Milliseconds of attention per layer on this machine, for the batches of a serving engine.

    python -m benchmarks.pallas_kernels.attention    # as on CPU: 12 query heads, 4 KV heads of 64
    python -m benchmarks.pallas_kernels.attention --block-size 32 --layers 6 --backends cpu

Backends take turns, case by case. One program runs all layers on caches of their own, as a step
does, so that the context comes from memory. Other work on the machine only ever slows a run, so the
fastest one counts; the median is printed beside it.
"""

import argparse
import itertools
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels import AttentionSpec, RaggedMeta, cache_dtype, select

N_HEADS, N_KV_HEADS, HEAD_SIZE = 12, 4, 64
SPEC = AttentionSpec(scale=HEAD_SIZE**-0.5)
MAX_LENGTH = 2048


class Case(NamedTuple):
    """A batch: how many decodes of about what context, and (context, new tokens) of each chunk."""

    n_decodes: int
    context: int
    chunks: tuple[tuple[int, int], ...] = ()

    @property
    def sequences(self) -> list[tuple[int, int]]:
        lengths = np.random.default_rng(0).normal(self.context, 0.15 * self.context, self.n_decodes)
        return [(max(int(n), 1), 1) for n in lengths] + list(self.chunks)


CASES = {
    "a: 32 decodes, context 290": Case(32, 290),
    "b: 29 decodes, context 290, and two prompts of 240": Case(29, 290, ((250, 250), (233, 233))),
    "g: 16 decodes, context 290, and parts of three prompts": Case(
        16, 290, ((250, 120), (260, 260), (110, 110))
    ),
    "c: 32 decodes, context 1024": Case(32, 1024),
    "d: 256 decodes, context 290": Case(256, 290),
    "e: 500 tokens of a prompt of 1000, 12 decodes, context 1024": Case(12, 1024, ((1000, 500),)),
    "f: one decode, context 290": Case(1, 290),
}


def make_meta(case: Case, block_size: int) -> RaggedMeta:
    """The batch with its blocks in random order, as after some time of serving."""
    sequences = case.sequences
    seq_lens, n_new = np.array(sequences, np.int32).T
    n_blocks = -(-seq_lens // block_size)
    table = np.zeros((len(sequences), MAX_LENGTH // block_size), np.int32)
    ids = np.random.default_rng(0).permutation(np.arange(1, n_blocks.sum() + 1))
    table[np.arange(table.shape[1]) < n_blocks[:, None]] = ids
    row = np.repeat(np.arange(len(sequences)), n_new)
    cu_q_lens = np.concatenate([[0], np.cumsum(n_new)])
    positions = np.arange(n_new.sum()) - cu_q_lens[row] + (seq_lens - n_new)[row]
    slots = table[row, positions // block_size] * block_size + positions % block_size
    counts = len(sequences), case.n_decodes
    arrays = positions, slots, table, seq_lens, cu_q_lens, *counts
    return RaggedMeta(*(jnp.asarray(x, jnp.int32) for x in arrays))


def measure(
    backend: str, case: Case, *, dtype: str, block_size: int, n_layers: int, repeats: int
) -> tuple[float, float]:
    """The fastest and the median run, in milliseconds per layer."""
    meta, attend = make_meta(case, block_size), select(backend)
    shape = int(meta.block_tables.max()) + 1, N_KV_HEADS, 2, block_size, HEAD_SIZE
    stored = cache_dtype(dtype, jax.default_backend())
    caches = tuple(jnp.ones(shape, stored) for _ in range(n_layers))
    q = jnp.ones((len(meta.positions), N_HEADS, HEAD_SIZE), dtype)
    k = v = q[:, :N_KV_HEADS]

    def run(q, caches: tuple[Array, ...], meta: RaggedMeta):
        updated = []
        for cache in caches:
            q, cache = attend(q, k, v, cache, meta, spec=SPEC)
            updated.append(cache)
        return q, tuple(updated)

    run = jax.jit(run, donate_argnums=1)
    times = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        _, caches = jax.block_until_ready(run(q, caches, meta))
        times.append(1e3 * (time.perf_counter() - started) / n_layers)
    return min(times[2:]), statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--backends", nargs="+", default=["cpu", "xla"])
    args = parser.parse_args()
    columns = list(itertools.product(("float32", "bfloat16"), args.backends))
    print("ms per layer, best (median)".ljust(62), *(f"{d} {b}".rjust(16) for d, b in columns))
    for name, case in CASES.items():
        cells = []
        for dtype, backend in columns:
            best, median = measure(
                backend,
                case,
                dtype=dtype,
                block_size=args.block_size,
                n_layers=args.layers,
                repeats=args.repeats,
            )
            cells.append(f"{best:.2f} ({median:.2f})".rjust(16))
        print(name.ljust(62), *cells, flush=True)


if __name__ == "__main__":
    main()
