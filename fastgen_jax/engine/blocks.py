"""BlockPool: which KV blocks are free, who holds the others, and which may be reused as a cached
prefix.

Every block but 0 (scratch, for padding) is in exactly one class:
    free       on the free list
    held       by `ref[b] >= 1` live sequences
    evictable  published, held by nobody, oldest first
INVARIANT: n_free == free + evictable. Only full blocks are published, and a published block is
never written again.
"""

import itertools
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Published(NamedTuple):
    """What a cached block holds: the tokens (as bytes) that lead from `parent` to `prefix`."""

    prefix: int  # a number, never reused, so that nothing matches behind an evicted prefix
    parent: int
    tokens: bytes


EMPTY_PREFIX = 0
FREE, HELD, SHARED, EVICTABLE = range(4)


class BlockMap(NamedTuple):
    """What each block is, but for scratch."""

    classes: bytes  # FREE, HELD by one sequence, SHARED by several or EVICTABLE
    seconds: float  # that making it took


class BlockPool:
    """Owner of all KV blocks. Errors change nothing.

    Args:
        n_blocks: blocks in the cache, scratch included.
    """

    def __init__(self, n_blocks: int):
        assert n_blocks >= 2, n_blocks
        self.n_blocks = n_blocks
        self._free = list(range(n_blocks - 1, 0, -1))
        self._ref = [0] * n_blocks
        self._prefixes = itertools.count(EMPTY_PREFIX + 1)
        self._index: dict[tuple[int, bytes], int] = {}  # (parent, tokens) -> block
        self._published: dict[int, Published] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def n_usable(self) -> int:
        """Blocks that sequences can hold: all but scratch."""
        return self.n_blocks - 1

    @property
    def n_free(self) -> int:
        return len(self._free) + len(self._evictable)

    def allocate(self, n: int) -> list[int]:
        """Takes n blocks, evicting the longest-unused cached ones when the free list is short."""
        if n > self.n_free:
            raise ValueError(f"{n} blocks wanted, {self.n_free} free")
        while len(self._free) < n:
            self._evict()
        taken = [self._free.pop() for _ in range(n)]
        for block in taken:
            self._ref[block] = 1
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Gives up one hold on each block. Raises ValueError, and changes nothing, for a block not
        held.
        """
        if len(set(blocks)) != len(blocks):
            raise ValueError(f"a block is named twice: {sorted(blocks)}")
        for block in blocks:
            if not (0 < block < self.n_blocks and self._ref[block] > 0):
                raise ValueError(f"block {block} is not held")
        # The end of a sequence first: of a cached prefix the tail is evicted before the head.
        for block in reversed(blocks):
            self._ref[block] -= 1
            if self._ref[block] == 0:
                if block in self._published:
                    self._evictable[block] = None
                else:
                    self._free.append(block)

    def n_exclusive(self, blocks: Iterable[int]) -> int:
        """How many of these blocks would become free if their holder released them."""
        return sum(self._ref[block] == 1 for block in blocks)

    def publish(self, block: int, parent: int, tokens: bytes) -> int:
        """Offers a full block for reuse; returns the number of the prefix that it ends.

        A prefix that is published already stays as it is.
        """
        assert self._ref[block] > 0, block
        key = parent, tokens
        if key not in self._index:
            assert block not in self._published, block
            self._index[key] = block
            self._published[block] = Published(next(self._prefixes), *key)
        return self._published[self._index[key]].prefix

    def match(self, tokens: Sequence[bytes]) -> tuple[list[int], int]:
        """Holds the longest published prefix of `tokens` (bytes of each full block, in order).

        Returns its blocks and its number. Tokens are compared, not a hash of them.
        """
        blocks: list[int] = []
        prefix = EMPTY_PREFIX
        for block_tokens in tokens:
            block = self._index.get((prefix, block_tokens))
            if block is None:
                break
            blocks.append(block)
            prefix = self._published[block].prefix
        for block in blocks:
            self._ref[block] += 1
            self._evictable.pop(block, None)
        return blocks, prefix

    def flush(self) -> int:
        """Forgets all that has been published. Returns the number of a prefix that nothing leads
        to: what is published behind it is never found.
        """
        while self._evictable:
            self._evict()
        self._index.clear()
        self._published.clear()
        return next(self._prefixes)

    def map(self) -> BlockMap:
        """For people to look at."""
        started = time.perf_counter()
        classes = bytearray(ref if ref < SHARED else SHARED for ref in self._ref)
        for block in self._evictable:
            classes[block] = EVICTABLE
        return BlockMap(bytes(classes[1:]), time.perf_counter() - started)

    def _evict(self) -> None:
        block, _ = self._evictable.popitem(last=False)
        del self._index[self._published.pop(block)[1:]]
        self._free.append(block)

    def check(self) -> None:
        """Asserts the class invariants (for tests): each block in one class, counters equal to
        lists.
        """
        held = [b for b in range(1, self.n_blocks) if self._ref[b] > 0]
        classes = sorted(self._free + held + list(self._evictable))
        assert classes == list(range(1, self.n_blocks)), classes
        assert self._ref[0] == 0, "scratch is held"
        assert all(self._published[b][1:] == key for key, b in self._index.items())
        assert len(self._index) == len(self._published)
        assert all(b in self._published for b in self._evictable)
