"""Plan -> Batch: the host tables, one row per running sequence, and the packed int32 array that a
step uploads.

Everything a step needs from the host travels in one array, whose layout `fields` defines for both
sides: `pack` writes through it on the host, `unpack` reads through it on the device. Block 0 is
scratch, so zero padding is valid.
"""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from fastgen_jax.engine.processors import ArgumentTables, Processor
from fastgen_jax.engine.types import Chunk, Sequence
from fastgen_jax.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from pallas_kernels import PlanSizes

UNKNOWN = -1  # a token id that only the device knows yet
MAX_EOS = 16
SMALLEST_MASKED = 16  # rows
MAX_BANNED = MAX_STOP_TOKEN_IDS + MAX_EOS

# One line per row: float32 parameters as their bits.
FLOAT_PARAMS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
INT_PARAMS = ("top_k", "seed", "n_logprobs", "n_prompt", "min_total", "has_bias", "processors")
N_PARAMS = len(FLOAT_PARAMS) + len(INT_PARAMS)
# The line of a row that is not there: greedy, nothing filtered, so that it makes no work.
NO_PARAMS = np.zeros(N_PARAMS, np.int32)
NO_PARAMS[: len(FLOAT_PARAMS)] = np.array([0, 1, 0, 1, 0, 0], np.float32).view(np.int32)


class Shape(NamedTuple):
    """One compiled program's sizes: tokens, sequences, block-table width; of the kernels' plan, if
    they want one.
    """

    n_tokens: int
    n_seqs: int
    n_blocks: int
    plan: PlanSizes | None = None

    @property
    def n_hidden(self) -> int:
        """Hidden states that a step leaves: of few sizes, for each is a program that draws."""
        size = SMALLEST_MASKED
        while size < self.n_seqs:
            size *= 4
        return size

    @property
    def fields(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parts of a batch's packed array, in order."""
        t, s, p, plan = self
        plan_fields = {} if plan is None else {f"plan_{k}": v for k, v in plan.shapes.items()}
        return plan_fields | {
            "token_ids": (t,),  # UNKNOWN: read the device's table
            "positions": (t,),
            "token_rows": (t,),
            "slots": (t,),
            "block_tables": (s, p),
            "seq_lens": (s,),
            "cu_q_lens": (s + 1,),
            "sample_tokens": (s,),  # which token's hidden state each sample comes from
            "sample_rows": (s,),
            "pooled_from": (
                s,
            ),  # each chunk's first token whose hidden state is summed, or its end
            "sample_params": (s, N_PARAMS),
            "scored_tokens": (t,),  # whose hidden states score the tokens that follow them
            "scored_ids": (t,),  # those that follow
            "counts": (5,),  # n_seqs, n_single, n_samples: none if masks come first,
            # n_scored, most tops that a score wants
        }


class MaskedShape(NamedTuple):
    """Sizes of a program that draws the tokens of constrained batches."""

    n_hidden: int
    mask_width: int

    @property
    def fields(self) -> dict[str, tuple[int, ...]]:
        """As of Shape."""
        s, w = self
        return {
            "rows": (s,),
            "n_tokens": (s,),
            "params": (s, N_PARAMS),
            "masks": (s, w),
            "n_samples": (1,),
        }


class Batch(NamedTuple):
    """One step's upload, and whose chunks and samples it holds."""

    shape: Shape
    packed: np.ndarray  # i32, laid out by shape
    sequences: list[Sequence]  # one per chunk
    sampled: list[Sequence]  # in the order of the result's rows
    scored: list[tuple[Sequence, range]]  # whose positions are, in the order of the scores
    is_pooled: bool  # sums of hidden states are to be read
    has_states: bool  # hidden states of chosen layers are

    @property
    def is_constrained(self) -> bool:
        """Whether masks must be made before its tokens can be drawn."""
        return any(sequence.constraint is not None for sequence in self.sampled)

    def starts(self) -> list[int]:
        """The position of each sequence's first token in the step."""
        part = unpack(self.packed, self.shape)
        firsts = part["cu_q_lens"][: len(self.sequences)]
        return part["positions"][firsts].tolist()

    def tokens(self) -> list[slice]:
        """Where in the step each sequence's tokens are."""
        ends = unpack(self.packed, self.shape)["cu_q_lens"][: len(self.sequences) + 1].tolist()
        return list(itertools.starmap(slice, itertools.pairwise(ends)))

    def reached(self) -> list[tuple[Sequence, int]]:
        """Each sequence, with the tokens that it has in the cache after the step."""
        lengths = unpack(self.packed, self.shape)["seq_lens"].tolist()
        return list(zip(self.sequences, lengths, strict=False))

    def summary(self) -> str:
        """For the log."""
        n_tokens = unpack(self.packed, self.shape)["cu_q_lens"][-1]
        requests = sorted({sequence.request_id for sequence in self.sequences})
        return (
            f"{n_tokens} tokens of {len(self.sequences)} sequences padded to "
            f"{self.shape.n_tokens}, requests {requests!s:.200}"
        )


def packed_size(shape: Shape | MaskedShape) -> int:
    return sum(math.prod(part) for part in shape.fields.values())


def unpack(packed, shape: Shape | MaskedShape) -> dict:
    """Views of the packed array by name; works on numpy (writable views) and on traced arrays."""
    parts, start = {}, 0
    for name, part in shape.fields.items():
        size = math.prod(part)
        parts[name] = packed[start : start + size].reshape(part)
        start += size
    return parts


def work_plan(part: dict, shape: Shape) -> Any:
    """The kernels' plan in an unpacked array; None if they want none."""
    plan = shape.plan
    return plan and plan.gather({name: part[f"plan_{name}"] for name in plan.shapes})


class HostTables:
    """What the host knows of each running sequence, one line per row; row n_rows is never a
    sequence's.

    token_ids "R M" holds prompts and recomputed tokens, UNKNOWN where only the device knows the
    value. What is `of_device` reaches it only when `is_dirty`:
    few requests bring any.
    """

    def __init__(
        self,
        n_rows: int,
        max_tokens: int,
        n_blocks: int,
        processors: tuple[Processor, ...] = (),
    ):
        self.n_rows = n_rows
        self.free_rows = list(range(n_rows - 1, -1, -1))
        self.token_ids = np.full((n_rows, max_tokens), UNKNOWN, np.int32)
        self.block_tables = np.zeros((n_rows, n_blocks), np.int32)
        self.params = np.zeros((n_rows, N_PARAMS), np.int32)
        self.bias_ids = np.full((n_rows, MAX_LOGIT_BIAS), UNKNOWN, np.int32)
        self.bias = np.zeros((n_rows, MAX_LOGIT_BIAS), np.float32)
        self.banned_ids = np.full((n_rows, MAX_BANNED), UNKNOWN, np.int32)
        self.arguments = ArgumentTables(processors, n_rows)
        self.is_dirty = True

    @property
    def of_device(self) -> tuple[Any, ...]:
        """What the device has copies of."""
        return self.bias_ids, self.bias, self.banned_ids, self.arguments.lines

    def enter(self, sequence: Sequence) -> None:
        """Gives a waiting sequence a row and writes what is known of it there."""
        row = sequence.row = self.free_rows.pop()
        known = sequence.n_prompt + len(sequence.output_ids)
        assert known == sequence.n_tokens, (known, sequence.n_tokens)
        self.token_ids[row, : sequence.n_prompt] = sequence.prompt_ids
        self.token_ids[row, sequence.n_prompt : known] = sequence.output_ids
        self.token_ids[row, known:] = UNKNOWN
        self.block_tables[row] = 0
        self.block_tables[row, : len(sequence.block_ids)] = sequence.block_ids
        self._enter_params(sequence)

    def leave(self, sequence: Sequence) -> None:
        self.free_rows.append(sequence.row)
        sequence.row = -1

    def extend(self, sequence: Sequence, blocks: list[int]) -> None:
        """Appends blocks to a sequence and to its line of the block table."""
        held = len(sequence.block_ids)
        sequence.block_ids += blocks
        self.block_tables[sequence.row, held : held + len(blocks)] = blocks

    def drop(self, sequence: Sequence) -> None:
        """Forgets the leading blocks that a sequence has given back."""
        self.block_tables[sequence.row, : sequence.n_dropped] = 0

    def _enter_params(self, sequence: Sequence) -> None:
        row, p = sequence.row, sequence.params
        line = self.params[row]
        line[: len(FLOAT_PARAMS)] = np.array(
            [getattr(p, name) for name in FLOAT_PARAMS], np.float32
        ).view(np.int32)
        processors = self.arguments.enter(row, p)
        line[len(FLOAT_PARAMS) :] = (
            max(p.top_k, 0),
            np.uint32(sequence.seed).view(np.int32),
            0 if p.logprobs is None else p.logprobs,
            sequence.n_prompt,
            sequence.n_prompt + p.min_tokens,
            bool(p.logit_bias),
            processors,
        )
        self.is_dirty |= processors != 0
        if p.logit_bias:
            self.bias_ids[row] = UNKNOWN
            self.bias_ids[row, : len(p.logit_bias)] = list(p.logit_bias)
            self.bias[row, : len(p.logit_bias)] = list(p.logit_bias.values())
            self.is_dirty = True
        if p.min_tokens:
            self.banned_ids[row] = UNKNOWN
            self.banned_ids[row, : len(sequence.ending_ids)] = list(sequence.ending_ids)
            self.is_dirty = True


def pack(chunks: list[Chunk], tables: HostTables, shape: Shape, block_size: int) -> Batch:
    """One step's arrays: vectorised over tokens, for chunks of which those of one token come first.

    Must be called before the counts of the sequences advance, after their blocks are in the tables.
    """
    packed = np.zeros(packed_size(shape), np.int32)
    part = unpack(packed, shape)
    n = len(chunks)
    rows = np.array([c.sequence.row for c in chunks], np.int32)
    starts = np.array([c.sequence.n_cached for c in chunks], np.int32)
    lengths = np.array([c.n_new for c in chunks], np.int32)
    ends = np.cumsum(lengths, dtype=np.int32)
    total = int(ends[-1])

    owner = np.repeat(np.arange(n, dtype=np.int32), lengths)
    positions = np.arange(total, dtype=np.int32) - (ends - lengths - starts)[owner]
    token_rows = rows[owner]
    part["positions"][:total] = positions
    part["token_rows"][:total] = token_rows
    part["token_rows"][total:] = tables.n_rows
    part["token_ids"][:total] = tables.token_ids[token_rows, positions]
    blocks = tables.block_tables[token_rows, positions // block_size]
    part["slots"][:total] = blocks * block_size + positions % block_size

    part["block_tables"][:n] = tables.block_tables[rows]
    part["seq_lens"][:n] = starts + lengths
    part["cu_q_lens"][1 : n + 1] = ends
    part["cu_q_lens"][n + 1 :] = total
    part["pooled_from"][:] = part["cu_q_lens"][1:]
    scored: list[tuple[Sequence, range]] = []
    n_scored = n_tops = 0
    is_pooled = has_states = False
    for i, (sequence, n_new, _) in enumerate(chunks):
        if sequence.states is not None:
            has_states = True
        if sequence.pooled is not None:
            is_pooled = True
            part["pooled_from"][i] += sequence.pooled.n_left_out(n_new) - n_new
        if sequence.scoring is not None and (due := sequence.scoring.due(int(starts[i]), n_new)):
            scored.append((sequence, due))
            lines = slice(n_scored, n_scored + len(due))
            n_scored, n_tops = lines.stop, max(n_tops, sequence.scoring.n_top)
            before = np.arange(due.start - 1, due.stop - 1)  # positions
            part["scored_tokens"][lines] = before - starts[i] + ends[i] - n_new
            part["scored_ids"][lines] = sequence.prompt_ids[due.start : due.stop]
    if shape.plan is not None:
        plan = shape.plan.make(part["seq_lens"], part["cu_q_lens"], n)
        for name, lines in plan._asdict().items():
            part[f"plan_{name}"][:] = lines

    known = np.array([c.sequence.n_tokens for c in chunks], np.int32)
    sampled = np.flatnonzero(starts + lengths == known)
    m = len(sampled)
    part["sample_tokens"][:m] = ends[sampled] - 1
    part["sample_rows"][:m] = rows[sampled]
    part["sample_rows"][m:] = tables.n_rows
    part["sample_params"][:m] = tables.params[rows[sampled]]
    part["sample_params"][m:] = NO_PARAMS
    sequences = [chunk.sequence for chunk in chunks]
    batch = Batch(
        shape, packed, sequences, [sequences[i] for i in sampled], scored, is_pooled, has_states
    )
    n_samples = 0 if batch.is_constrained else m
    part["counts"][:] = n, int((lengths == 1).sum()), n_samples, n_scored, n_tops
    return batch


def pack_masked(batch: Batch, masks: np.ndarray, n_rows: int) -> np.ndarray:
    """What draws the tokens of a constrained batch.

    Args:
        masks: i32[n_hidden, W].
        n_rows: of the host tables; padding draws for that row, which is scratch.
    """
    part = unpack(batch.packed, batch.shape)
    shape = MaskedShape(*masks.shape)
    packed = np.empty(packed_size(shape), np.int32)
    drawn = unpack(packed, shape)
    n = len(batch.sampled)
    drawn["rows"][:n] = part["sample_rows"][:n]
    drawn["rows"][n:] = n_rows
    drawn["n_tokens"][:n] = part["positions"][part["sample_tokens"][:n]] + 1
    drawn["n_tokens"][n:] = 0
    drawn["params"][:n] = part["sample_params"][:n]
    drawn["params"][n:] = NO_PARAMS
    drawn["masks"][:] = masks
    drawn["n_samples"][:] = n
    return packed
