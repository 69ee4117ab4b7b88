"""BlockPool: which KV blocks are free, who holds the others, and which may be reused as a cached
prefix.

Every block but 0 (scratch, for padding) is in exactly one class:
    free       on the free list
    held       by `ref[b] >= 1` live sequences
    evictable  published, held by nobody, oldest first
INVARIANT: n_free == free + evictable. Only full blocks are published, and a published block is
never written again.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Published(NamedTuple):
    """What a cached block holds: its tokens (as bytes), after the prefix with digest `parent`."""

    digest: bytes
    parent: bytes
    tokens: bytes


def chain_digest(parent: bytes, tokens: bytes) -> bytes:
    """Digest of a prefix: BLAKE2b over the digest of all blocks before and this block's token
    bytes.
    """
    return hashlib.blake2b(parent + tokens, digest_size=16).digest()


class BlockPool:
    """Owner of all KV blocks. Errors change nothing.

    Args:
        n_blocks: blocks in the cache, scratch included.
        digest: hash of (parent digest, token bytes); a parameter so that tests can force
        collisions.
    """

    def __init__(self, n_blocks: int, *, digest=chain_digest):
        assert n_blocks >= 2, n_blocks
        self.n_blocks = n_blocks
        self._digest = digest
        self._free = list(range(n_blocks - 1, 0, -1))
        self._ref = [0] * n_blocks
        self._index: dict[bytes, int] = {}
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

    def publish(self, block: int, parent: bytes, tokens: bytes) -> bytes:
        """Offers a full block for reuse; returns the digest of the prefix that it ends.

        A prefix that is published already stays as it is.
        """
        assert self._ref[block] > 0, block
        digest = self._digest(parent, tokens)
        if digest not in self._index and block not in self._published:
            self._index[digest] = block
            self._published[block] = Published(digest, parent, tokens)
        return digest

    def match(self, tokens: Sequence[bytes]) -> tuple[list[int], bytes]:
        """Holds the longest published prefix of `tokens` (bytes of each full block, in order).

        Returns its blocks and its digest. Tokens are compared, so that a hash collision is a miss.
        """
        blocks: list[int] = []
        parent = b""
        for block_tokens in tokens:
            digest = self._digest(parent, block_tokens)
            block = self._index.get(digest)
            if block is None or self._published[block] != (digest, parent, block_tokens):
                break
            blocks.append(block)
            parent = digest
        for block in blocks:
            self._ref[block] += 1
            self._evictable.pop(block, None)
        return blocks, parent

    def _evict(self) -> None:
        block, _ = self._evictable.popitem(last=False)
        del self._index[self._published.pop(block).digest]
        self._free.append(block)

    def check(self) -> None:
        """Asserts the class invariants (for tests): each block in one class, counters equal to
        lists.
        """
        held = [b for b in range(1, self.n_blocks) if self._ref[b] > 0]
        classes = sorted(self._free + held + list(self._evictable))
        assert classes == list(range(1, self.n_blocks)), classes
        assert self._ref[0] == 0, "scratch is held"
        assert all(self._published[b].digest == d for d, b in self._index.items())
        assert len(self._index) == len(self._published)
        assert all(b in self._published for b in self._evictable)
