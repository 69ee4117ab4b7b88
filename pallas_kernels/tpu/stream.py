"""A walk over tiles of context: which blocks come next, and their copies from HBM, tiles ahead.

An owner is whatever a program computes one softmax for: a sequence, or a tile of queries of one. A
stream visits its owners in order and each owner's tiles in order, one per iteration. Block tables
are fetched whole, several owners ahead; blocks several iterations ahead. INVARIANT: a buffer is
refilled only after the iteration that read it and after the copy out of it, if any, has ended.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LOWEST = -1e30  # finite, so that differences are never NaN
LOG2_E = 1.4426950408889634
N_TABLES = 8  # block tables in flight; more than buffers of tiles, since an owner may have one tile


class Owner(NamedTuple):
    """Scalars: the sequence, and the range of its blocks that are needed."""

    seq: Any
    first: Any
    end: Any


class Cursor(NamedTuple):
    """Scalars: an owner and one of its tiles."""

    owner: Any
    tile: Any


@dataclass(frozen=True)
class Stream:
    """One stream's refs. `owner_of` reads an owner's scalars; owners end at `stop`."""

    owner_of: Callable[[Any], Owner]
    stop: Any
    tables: Any  # HBM "S 1 P"
    cache: tuple[Any, ...]  # HBM "B K 2 H C", and scales "B K 2 C" of a quantised one
    table_ring: Any  # SMEM (N_TABLES, P)
    table_sems: Any  # (N_TABLES,)
    rings: tuple[Any, ...]  # VMEM (buffers, blocks, *block) for each array of the cache
    sems: Any  # (buffers,)

    @property
    def n_buffers(self) -> int:
        return self.rings[0].shape[0]

    @property
    def n_blocks(self) -> int:
        return self.rings[0].shape[1]

    def first_tile(self, owner):
        return self.owner_of(owner).first // self.n_blocks

    def is_last(self, at: Cursor):
        return (at.tile + 1) * self.n_blocks >= self.owner_of(at.owner).end

    def next(self, at: Cursor) -> Cursor:
        """The tile after this one; past the end it stays at `stop`."""
        is_last = self.is_last(at)
        owner = jnp.minimum(at.owner + is_last.astype(jnp.int32), self.stop)
        return Cursor(owner, jnp.where(is_last, self.first_tile(owner), at.tile + 1))

    def range_of(self, at: Cursor):
        """Which blocks of the tile are needed: from, to, counted within the tile."""
        owner, start = self.owner_of(at.owner), at.tile * self.n_blocks
        first = jnp.clip(owner.first - start, 0, self.n_blocks)
        return first, jnp.clip(owner.end - start, 0, self.n_blocks)

    def _table_copy(self, owner):
        slot = owner % N_TABLES
        seq = self.owner_of(owner).seq
        return pltpu.make_async_copy(
            self.tables.at[seq, 0], self.table_ring.at[slot], self.table_sems.at[slot]
        )

    def fetch_table(self, owner):
        @pl.when(owner < self.stop)
        def _():
            self._table_copy(owner).start()

    def block_id(self, owner, block):
        return self.table_ring[owner % N_TABLES, block]

    def _copies(self, slot, b: int, block_id) -> list:
        return [
            pltpu.make_async_copy(array.at[block_id], ring.at[slot, b], self.sems.at[slot])
            for array, ring in zip(self.cache, self.rings, strict=True)
        ]

    def begin(self, start, on_owner: Callable[[Any], None]) -> Cursor:
        """Fetches the first tables and tiles; returns the cursor of the next tile to fetch."""
        for i in range(N_TABLES - self.n_buffers):
            self.fetch_table(start + i)
        at = Cursor(start, self.first_tile(start))
        for item in range(self.n_buffers - 1):
            self.fetch(at, item, on_owner)
            at = self.next(at)
        return at

    def fetch(self, at: Cursor, item, on_owner: Callable[[Any], None]):
        """Starts the copies of the tile that iteration `item` will work on.

        `on_owner` is called with each owner before its first tile is fetched.
        """
        slot = item % self.n_buffers

        @pl.when(at.owner < self.stop)
        def _():
            @pl.when(at.tile == self.first_tile(at.owner))
            def _():
                self._table_copy(at.owner).wait()
                self.fetch_table(at.owner + N_TABLES - self.n_buffers)
                on_owner(at.owner)

            first, end = self.range_of(at)
            for b in range(self.n_blocks):

                @pl.when((first <= b) & (b < end))
                def _(b=b):
                    block_id = self.block_id(at.owner, at.tile * self.n_blocks + b)
                    for copy in self._copies(slot, b, block_id):
                        copy.start()

    def wait(self, at: Cursor, item):
        """Waits for the tile of iteration `item`."""
        slot = item % self.n_buffers

        @pl.when(at.owner < self.stop)
        def _():
            first, end = self.range_of(at)
            for b in range(self.n_blocks):

                @pl.when((first <= b) & (b < end))
                def _(b=b):
                    for copy in self._copies(slot, b, 0):
                        copy.wait()


def shares(costs, n_shares: int):
    """Borders "n_shares + 1" between consecutive owners, such that shares cost about the same.

    Owners that cost nothing come last and belong to nobody.
    """
    total = jnp.cumsum(costs)
    n_owners = (costs > 0).sum(dtype=jnp.int32)
    goal = jnp.arange(1, n_shares, dtype=jnp.int32) * (total[-1] // n_shares)
    inner = (total[None] <= goal[:, None]).sum(1, dtype=jnp.int32)
    ends = jnp.stack([jnp.zeros((), jnp.int32), n_owners])
    return jnp.concatenate([ends[:1], jnp.minimum(inner, n_owners), ends[1:]])


def mask_scores(scores, distance, spec):
    """Scores of keys at `distance` (key position - query position); hidden ones get LOWEST."""
    visible = distance <= 0
    if spec.window is not None:
        visible &= distance > -spec.window
    return jnp.where(visible, scores, LOWEST)


def log2_scores(products, distance, spec, slope):
    """q.k -> scores * log2(e): scaled, capped, with ALiBi; exp2 of them is the softmax's weight."""
    if spec.soft_cap is None:
        scores = products * (spec.scale * LOG2_E)
    else:
        scores = jnp.tanh(products * (spec.scale / spec.soft_cap)) * (spec.soft_cap * LOG2_E)
    if slope is not None:
        scores = scores + (slope * LOG2_E) * distance.astype(jnp.float32)
    return scores


def dot(a, b, contract):
    """A product on the matrix unit with float32 sums; exact passes for float32 operands."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (contract, ((), ())), preferred_element_type=jnp.float32, precision=precision
    )


def to_columns(rows):
    """Rows "M H" as columns "H M" in float32: exact, by the matrix unit."""
    n = rows.shape[0]
    dtype = jnp.float32 if rows.dtype == jnp.float32 else jnp.bfloat16
    row, column = (lax.broadcasted_iota(jnp.int32, (n, n), i) for i in range(2))
    identity = jnp.where(row == column, 1.0, 0.0).astype(dtype)
    return dot(rows.astype(dtype), identity, ((0,), (0,)))


def product_dtype(q_dtype, cache_dtype):
    """Of the operands of both products: float32 where queries or cache have that precision."""
    return jnp.float32 if jnp.float32 in (q_dtype, cache_dtype) else jnp.bfloat16
