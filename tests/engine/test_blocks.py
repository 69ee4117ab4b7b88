"""Each block is free, held or cached, never two of them, whatever is asked of the pool."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastgen_jax.engine.blocks import EMPTY_PREFIX, BlockPool


def publish(pool, blocks, contents):
    """Publishes blocks as one prefix."""
    prefix = pool.match([])[1]
    for block, content in zip(blocks, contents, strict=True):
        prefix = pool.publish(block, prefix, content)


def snapshot(pool):
    return list(pool._free), list(pool._ref), dict(pool._published), list(pool._evictable)


def test_allocated_blocks_are_distinct_and_never_scratch():
    pool = BlockPool(9)
    assert sorted(pool.allocate(8)) == list(range(1, 9))
    assert pool.n_free == 0


def test_allocating_too_many_blocks_changes_nothing():
    pool = BlockPool(4)
    pool.allocate(1)
    before = snapshot(pool)
    with pytest.raises(ValueError, match="3 blocks wanted, 2 free"):
        pool.allocate(3)
    assert snapshot(pool) == before


@pytest.mark.parametrize(
    ("blocks", "message"),
    [([1, 1], "named twice"), ([1, 3], "block 3 is not held"), ([0], "block 0"), ([9], "block 9"),
     ([-1], "block -1")],
)  # fmt: skip
def test_releasing_what_is_not_held_changes_nothing(blocks, message):
    pool = BlockPool(5)
    assert pool.allocate(2) == [1, 2]
    before = snapshot(pool)
    with pytest.raises(ValueError, match=message):
        pool.release(blocks)
    assert snapshot(pool) == before


def test_released_blocks_cannot_be_released_again():
    pool = BlockPool(5)
    blocks = pool.allocate(2)
    pool.release(blocks)
    with pytest.raises(ValueError, match="not held"):
        pool.release(blocks)


def test_match_finds_the_longest_published_prefix():
    pool = BlockPool(9)
    blocks = pool.allocate(3)
    publish(pool, blocks, [b"a", b"b", b"c"])
    assert pool.match([b"a", b"b", b"x"])[0] == blocks[:2]
    assert pool.match([b"b"])[0] == []
    assert pool.match([])[0] == []


def test_matched_blocks_are_held_until_both_holders_release_them():
    pool = BlockPool(4)
    blocks = pool.allocate(1)
    publish(pool, blocks, [b"a"])
    assert pool.match([b"a"])[0] == blocks
    pool.release(blocks)
    assert (pool.n_free, pool.n_exclusive(blocks)) == (2, 1)
    pool.release(blocks)
    assert pool.n_free == 3


def test_held_published_blocks_are_never_handed_out():
    pool = BlockPool(6)
    blocks = pool.allocate(2)
    publish(pool, blocks, [b"a", b"b"])
    assert not set(pool.allocate(3)) & set(blocks)
    with pytest.raises(ValueError, match="1 blocks wanted, 0 free"):
        pool.allocate(1)


def test_free_blocks_are_taken_before_cached_ones():
    pool = BlockPool(4)
    blocks = pool.allocate(1)
    publish(pool, blocks, [b"a"])
    pool.release(blocks)
    pool.allocate(2)
    assert pool.match([b"a"])[0] == blocks


def test_longest_unused_prefix_is_evicted_first():
    pool = BlockPool(4)
    for content in (b"a", b"b", b"c"):
        block = pool.allocate(1)
        publish(pool, block, [content])
        pool.release(block)
    pool.release(pool.match([b"a"])[0])  # now b is the oldest
    pool.allocate(1)
    assert [len(pool.match([c])[0]) for c in (b"a", b"b", b"c")] == [1, 0, 1]


def test_tail_of_a_prefix_is_evicted_before_its_head():
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    publish(pool, blocks, [b"a", b"b", b"c"])
    pool.release(blocks)
    pool.allocate(1)
    assert pool.match([b"a", b"b", b"c"])[0] == blocks[:2]


def test_prefix_published_twice_stays_where_it_is():
    pool = BlockPool(4)
    first, second = pool.allocate(2)
    publish(pool, [first], [b"a"])
    publish(pool, [second], [b"a"])
    pool.release([second])
    assert pool.match([b"a"])[0] == [first]


class Colliding(bytes):
    """Block contents that all have one hash."""

    def __hash__(self):
        return 7


def test_contents_that_collide_in_their_hash_are_told_apart():
    """The index is a dict of the contents themselves; no hash of them is ever taken for them."""
    pool = BlockPool(9)
    blocks = pool.allocate(4)
    publish(pool, blocks, [Colliding([i]) for i in range(4)])
    assert pool.match([Colliding([0]), Colliding([1]), Colliding([9])])[0] == blocks[:2]
    for other in (4, 5, 255):
        assert pool.match([Colliding([other])])[0] == []
    pool.check()


def test_block_behind_an_evicted_prefix_matches_nothing():
    pool = BlockPool(4)
    head, tail = pool.allocate(2)
    publish(pool, [head], [b"a"])
    [copy] = pool.allocate(1)
    publish(pool, [copy, tail], [b"a", b"b"])  # the same prefix, computed twice
    pool.release([head, copy])
    pool.allocate(2)  # evicts the head
    assert pool.match([b"a", b"b"])[0] == []


class Pools(RuleBasedStateMachine):
    """Sequences of blocks of two letters, so that prefixes collide; digests of four bits."""

    @initialize(n_blocks=st.integers(2, 12))
    def start(self, n_blocks):
        self.pool = BlockPool(n_blocks)
        self.held: list[tuple[list[int], list[bytes]]] = []  # blocks and contents of sequences
        self.written: dict[int, tuple[bytes, ...]] = {}  # block -> all that its prefix holds

    @rule(contents=st.lists(st.sampled_from([b"a", b"b"]), min_size=1, max_size=5))
    def compute(self, contents):
        """What the engine does with a prompt: match, allocate the rest, write, publish."""
        blocks, prefix = self.pool.match(contents)
        for i, block in enumerate(blocks):
            assert self.written[block] == tuple(contents[: i + 1]), "a foreign block matched"
        n_new = len(contents) - len(blocks)
        if n_new > self.pool.n_free:
            self.pool.release(blocks)
            return
        n_matched = len(blocks)
        blocks += self.pool.allocate(n_new)
        for i in range(n_matched, len(contents)):
            assert all(blocks[i] not in other for other, _ in self.held), "a held block is given"
            assert blocks[i] not in self.pool._published
            self.written[blocks[i]] = tuple(contents[: i + 1])
            prefix = self.pool.publish(blocks[i], prefix, contents[i])
        self.held.append((blocks, contents))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        blocks, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(blocks)

    @rule()
    def flush(self):
        """What was written before is found by nobody, nor what is behind the prefix returned."""
        nowhere = self.pool.flush()
        assert self.pool.match([b"a"]) == self.pool.match([b"b"]) == ([], EMPTY_PREFIX)
        if self.pool.n_free:
            (block,) = self.pool.allocate(1)
            self.pool.publish(block, nowhere, b"a")
            self.pool.release([block])
            assert self.pool.match([b"a"]) == ([], EMPTY_PREFIX)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release_twice(self, data):
        blocks, _ = data.draw(st.sampled_from(self.held))
        before = snapshot(self.pool)
        with pytest.raises(ValueError, match="named twice"):
            self.pool.release(blocks + blocks[:1])
        assert snapshot(self.pool) == before

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def counts_agree(self):
        self.pool.check()
        count = Counter(b for blocks, _ in self.held for b in blocks)
        assert self.pool._ref == [count[b] for b in range(self.pool.n_blocks)]
        assert self.pool.n_free == self.pool.n_usable - len(count)
        every = [b for b in range(1, self.pool.n_blocks) if count[b] == 1]
        assert self.pool.n_exclusive(range(1, self.pool.n_blocks)) == len(every)

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def held_blocks_keep_what_was_written(self):
        for blocks, contents in self.held:
            for i, block in enumerate(blocks):
                assert self.written[block] == tuple(contents[: i + 1])


Pools.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_random_use_keeps_the_pool_consistent = Pools.TestCase
