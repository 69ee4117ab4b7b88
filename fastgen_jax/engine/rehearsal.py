"""Rehearsal: steps of made-up sequences, before anybody asks for any, to see how long they take.

It uses the programs that will serve and their cache, and leaves nothing there: the runner is reset.
"""

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fastgen_jax.engine.batch import Batch, HostTables, Shape, pack
from fastgen_jax.engine.runner import Runner
from fastgen_jax.engine.surface import Surface, Work, fit
from fastgen_jax.engine.types import Chunk, Sequence, one_token

N_TIMES = 3  # each step is timed, after one that does not count
ENOUGH = 1.0  # seconds of a step, from which on larger ones are not tried

Scene = list[tuple[int, int]]  # of each chunk: its new tokens, and those in the cache after them


class Stage(NamedTuple):
    """What there is to make up sequences from: limits of the engine that is to be."""

    max_seqs: int
    max_model_len: int
    block_size: int
    n_blocks: int
    vocab_size: int

    @property
    def n_cells(self) -> int:
        return (self.n_blocks - 1) * self.block_size


def rehearse(runner: Runner, stage: Stage) -> Surface:
    """Compiles programs, the smallest first, and times them, until a step takes ENOUGH."""
    works: list[Work] = []
    seconds: list[float] = []
    is_more = True
    while is_more and (not seconds or seconds[-1] <= ENOUGH):
        n_ready = len(runner.shapes)
        is_more = runner.programs.compile_next()
        if len(runner.shapes) > n_ready:
            for scene in scenes(runner.shapes[-1].n_tokens, stage):
                taken = list(times(runner, scene, stage))
                works += [Work.of(scene)] * len(taken)
                seconds += taken
    runner.reset()
    return fit(works, seconds, tuple(shape.n_tokens for shape in runner.shapes))


def scenes(n_tokens: int, stage: Stage) -> Iterator[Scene]:
    """Steps of so many tokens: decodes of long and of short contexts, a prompt's end, whole
    prompts. The last takes all that others of its size do not, and comes last.
    """
    longest = min(stage.max_model_len, stage.n_cells)
    if n_tokens <= stage.max_seqs:
        per_sequence = stage.n_cells // n_tokens // stage.block_size * stage.block_size
        yield [(1, max(min(longest, per_sequence), 1))] * n_tokens
        yield [(1, 1)] * n_tokens
    if n_tokens <= longest // 2:
        yield [(n_tokens, longest)]
    size = math.ceil(n_tokens / math.ceil(n_tokens / longest))
    wholes = [min(size, n_tokens - start) for start in range(0, n_tokens, size)]
    if n_tokens <= stage.n_cells and len(wholes) <= stage.max_seqs:
        yield [(q, q) for q in wholes]


def times(runner: Runner, scene: Scene, stage: Stage) -> Iterator[float]:
    """Seconds from handing a step over until its tokens are there, N_TIMES."""
    shape = runner.shapes[-1]
    tables = HostTables(
        stage.max_seqs, stage.max_model_len, shape.n_blocks, runner.program.processors
    )
    batch = make_batch(scene, tables, shape, stage)
    for i in range(N_TIMES + 1):
        start = time.perf_counter()
        runner.fetch(runner.dispatch(batch, tables))
        if i:
            yield time.perf_counter() - start


def make_batch(scene: Scene, tables: HostTables, shape: Shape, stage: Stage) -> Batch:
    """Of sequences that have blocks of their own as long as there are any."""
    rng, chunks, n_taken = np.random.default_rng(0), [], 0
    for i, (q, c) in enumerate(scene):
        ids = rng.integers(0, stage.vocab_size, c).astype(np.int32)
        sequence = Sequence(
            i, i, 0, ids, one_token(), 0, stage.max_model_len, frozenset(), c, n_cached=c - q
        )
        tables.enter(sequence)
        n = math.ceil(c / stage.block_size)
        blocks = 1 + (n_taken + np.arange(n)) % (stage.n_blocks - 1)
        tables.extend(sequence, blocks.tolist())
        n_taken += n
        chunks.append(Chunk(sequence, q, n))
    return pack(sorted(chunks, key=lambda chunk: chunk.n_new > 1), tables, shape, stage.block_size)
