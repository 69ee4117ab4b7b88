"""The host's division of one step's attention into work items for the GPU kernels, in numpy.

Made once per step and shared by all layers. Every array has a fixed capacity that follows from
PlanSizes alone, so it travels in the step's packed upload; unused lines are zeros, items of no
tokens. Two kernels share the work, and each sequence belongs to one of them:
- decode: sequences of at most `max_short` new tokens. An item is a few queries of one sequence and
  a range of its context; long contexts are split so that all processors have work, and the parts
  of a split query tile are merged afterwards, as `merges` lists them.
- chunks: sequences of more new tokens. An item is a tile of queries with all that they see.
Items come with the most expensive first, so that the last ones to start are short.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

KEY_ALIGN = 128  # kernels' tiles of keys divide it, so that no tile has cells of two items
MIN_SPLIT = KEY_ALIGN  # cells: a part is two tiles of keys at least

# Columns of an item, 32 bytes: one cache sector.
SEQ, TOKEN, N_TOKENS, POSITION, KV_START, KV_END, SLOT, SPLIT = range(8)
# Columns of a merge.
MERGE_TOKEN, MERGE_N_TOKENS, MERGE_SLOT, MERGE_N_SLOTS = range(4)


class WorkPlan(NamedTuple):
    """Work items. An item attends with `n_tokens` queries from batch token `token`, the first one
    at `position` of sequence `seq`, to the cells kv_start <= cell < kv_end that each may see.

    An item with slot >= 0 is part `split` of its query tile's context and leaves its softmax in
    that slot; the others (slot -1) are whole. A merge makes the output of `n_tokens` tokens of the
    softmaxes of `n_slots` successive slots.
    """

    decode: Int[np.ndarray, "W 8"]
    chunks: Int[np.ndarray, "X 8"]
    merges: Int[np.ndarray, "Y 4"]


@dataclass(frozen=True, kw_only=True)
class PlanSizes:
    """What a plan's capacities follow from. Heads are those of one device.

    Decode work is split for n_ctas programs, over all KV heads: two for each of the GPU's
    multiprocessors fill it. max_short >= n_tokens gives everything to the decode kernel, and plans
    without chunk items, for which no chunk kernel is launched.
    """

    n_tokens: int
    n_seqs: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    max_context: int  # the block table's width in cells
    n_ctas: int = 264
    max_short: int = 8

    @classmethod
    def of(cls, **sizes: int) -> "PlanSizes":
        """Without a chunk kernel where the decode kernel's tiles of all the tokens run at once.

        A chunk of so few tokens is no more than one or two tiles of the chunk kernel, which leave
        most of the GPU idle; and steps that only decode launch no kernel in vain.
        """
        made = cls(**sizes)
        n_tiles = -(-made.n_tokens // decode_queries(made.group_size))
        is_small = n_tiles * made.n_kv_heads <= made.n_ctas
        return replace(made, max_short=made.n_tokens) if is_small else made

    @property
    def group_size(self) -> int:
        return self.n_heads // self.n_kv_heads

    @property
    def n_query_tiles(self) -> int:
        """The most query tiles of the decode kernel."""
        n, n_seqs = decode_queries(self.group_size), min(self.n_seqs, self.n_tokens)
        per_seq = -(-min(self.max_short, self.n_tokens) // n)
        return min((self.n_tokens + n_seqs * (n - 1)) // n, n_seqs * per_seq)

    @property
    def n_slots(self) -> int:
        """The most parts of split query tiles.

        A tile of x > 1 splits' length has ceil(x) < 2 x parts; all lengths sum to at most
        n_ctas / n_kv_heads splits.
        """
        per_tile = -(-self.max_context // MIN_SPLIT)
        if per_tile < 2:
            return 0
        return min(2 * self.n_ctas // self.n_kv_heads, self.n_query_tiles * per_tile)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of the plan's arrays, by their names in WorkPlan."""
        n_chunked = min(self.n_seqs, self.n_tokens // (self.max_short + 1))
        n = chunk_queries(self.group_size, self.head_size)
        n_chunks = (self.n_tokens + n_chunked * (n - 1)) // n if n_chunked else 0
        n_whole, n_parts = self.n_query_tiles, self.n_slots
        return {
            "decode": (n_whole + n_parts, 8),
            "chunks": (n_chunks, 8),
            "merges": (n_parts // 2, 4),
        }

    def make(self, seq_lens, cu_q_lens, n_seqs: int) -> "WorkPlan":
        """The plan of a batch, on the host; see `make_plan`."""
        return make_plan(seq_lens, cu_q_lens, n_seqs, sizes=self)

    def gather(self, arrays: Mapping[str, Any]) -> "WorkPlan":
        """The plan whose arrays, by the names in `shapes`, have come to the device."""
        return WorkPlan(**{name: arrays[name] for name in self.shapes})


def decode_rows(group_size: int) -> int:
    """Rows of a decode tile, (token, query head of the group) pairs; 16 fill a matrix unit."""
    return max(16, _power_of_two(group_size))


def decode_queries(group_size: int) -> int:
    return decode_rows(group_size) // group_size


def chunk_rows(group_size: int, head_size: int) -> int:
    """Rows of a chunk tile; large heads halve them, to keep the accumulator in registers."""
    return max(64 if head_size > 128 else 128, _power_of_two(group_size))


def chunk_queries(group_size: int, head_size: int) -> int:
    return chunk_rows(group_size, head_size) // group_size


def make_plan(
    seq_lens: Int[np.ndarray, "S"],
    cu_q_lens: Int[np.ndarray, "S+1"],
    n_seqs: int,
    *,
    sizes: PlanSizes,
    window: int | None = None,
) -> WorkPlan:
    """The plan of a batch; see contract.RaggedMeta for its first three arguments.

    window: the widest one of all layers, None if any layer has none; cells that no query sees
        through it are not planned. Layers of narrower windows skip more by themselves.
    """
    starts = np.asarray(cu_q_lens[:n_seqs])
    n_new = np.asarray(cu_q_lens[1 : n_seqs + 1]) - starts
    seq_lens = np.asarray(seq_lens[:n_seqs])
    is_short = n_new <= sizes.max_short
    n_queries = decode_queries(sizes.group_size)
    tiles = _query_tiles(np.where(is_short, n_new, 0), n_new, seq_lens, starts, n_queries, window)
    items, merges = _split(tiles, sizes)
    n_queries = chunk_queries(sizes.group_size, sizes.head_size)
    chunks = _query_tiles(np.where(is_short, 0, n_new), n_new, seq_lens, starts, n_queries, window)
    shapes = sizes.shapes
    return WorkPlan(
        _fixed(_costly_first(items), shapes["decode"]),
        _fixed(_costly_first(chunks), shapes["chunks"]),
        _fixed(merges, shapes["merges"]),
    )


def _query_tiles(n_planned, n_new, seq_lens, starts, n_queries: int, window: int | None):
    """Items "I 8" of up to n_queries tokens each: the first n_planned of each sequence's n_new."""
    n_tiles = -(-n_planned // n_queries)
    owner = np.repeat(np.arange(len(n_tiles)), n_tiles)
    first = np.cumsum(n_tiles) - n_tiles
    offset = (np.arange(len(owner)) - first[owner]) * n_queries
    tiles = np.zeros((len(owner), 8), np.int32)
    tiles[:, SEQ] = owner
    tiles[:, TOKEN] = starts[owner] + offset
    tiles[:, N_TOKENS] = np.minimum(n_planned[owner] - offset, n_queries)
    tiles[:, POSITION] = position = (seq_lens - n_new)[owner] + offset
    tiles[:, KV_END] = position + tiles[:, N_TOKENS]
    if window is not None:
        tiles[:, KV_START] = np.maximum(position - window + 1, 0) // KEY_ALIGN * KEY_ALIGN
    tiles[:, SLOT] = -1
    return tiles


def _split(tiles, sizes: PlanSizes):
    """Items "W 8" with long contexts split, each tile's into parts of one size; and the merges."""
    n_keys = tiles[:, KV_END] - tiles[:, KV_START]
    split_size = _round_up(-(-int(n_keys.sum()) * sizes.n_kv_heads // sizes.n_ctas), MIN_SPLIT)
    split_size = max(split_size, MIN_SPLIT)
    n_parts = -(-n_keys // split_size)
    if n_parts.max(initial=0) < 2:
        return tiles, np.zeros((0, 4), np.int32)
    # Even parts of whole tiles; as n_keys > split_size >= part_size, there remain at least two.
    part_size = _round_up(-(-n_keys // n_parts), KEY_ALIGN)
    n_parts = -(-n_keys // part_size)
    n_slots = np.where(n_parts > 1, n_parts, 0)
    slot = np.cumsum(n_slots) - n_slots
    owner = np.repeat(np.arange(len(tiles)), n_parts)
    part = np.arange(len(owner)) - (np.cumsum(n_parts) - n_parts)[owner]
    items = tiles[owner]
    items[:, KV_START] += (part * part_size[owner]).astype(np.int32)
    items[:, KV_END] = np.minimum(items[:, KV_END], items[:, KV_START] + part_size[owner])
    items[:, SLOT] = np.where(n_slots[owner] > 0, slot[owner] + part, -1)
    items[:, SPLIT] = part
    is_split = n_slots > 0
    columns = tiles[:, TOKEN], tiles[:, N_TOKENS], slot, n_slots
    return items, np.stack([column[is_split] for column in columns], 1).astype(np.int32)


def _costly_first(items):
    """By the cells they read: rows without a token cost as much as others."""
    return items[np.argsort(items[:, KV_START] - items[:, KV_END], kind="stable")]


def _fixed(lines, shape: tuple[int, int]):
    assert len(lines) <= shape[0], (len(lines), shape)
    out = np.zeros(shape, np.int32)
    out[: len(lines)] = lines
    return out


def _round_up(x, multiple: int):
    return -(-x // multiple) * multiple


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
