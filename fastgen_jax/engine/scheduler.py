"""Dynamic SplitFuse: the whole scheduling policy, one pure function of counts.

A sequence owes `n_tokens - n_cached` tokens to the cache. Each step runs everyone who owes one
token (decodes), then fills the token budget with the others in arrival order, cutting the last
chunk so that the budget is met exactly (Holmes et al., DeepSpeed-FastGen, 2024). It sees no token
values, so it can plan a step while the one before runs.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from fastgen_jax.engine import types
from fastgen_jax.engine.types import Chunk, Plan

MAX_BYPASSED = 16  # times that younger requests may be admitted before one that does not fit yet


class Limits(NamedTuple):
    """What one step may hold."""

    max_batched_tokens: int
    max_seqs: int
    block_size: int


def servable_tokens(max_model_len: int, n_blocks: int, block_size: int) -> int:
    """The longest sequence, prompt and output together, that can ever be served: the one admission
    bound.

    Args:
        n_blocks: blocks that sequences can hold.
    """
    return min(max_model_len, n_blocks * block_size)


def schedule(
    sequences: Sequence[types.Sequence],
    n_free: int,
    limits: Limits,
    reclaimable: Callable[[types.Sequence], int] = lambda s: len(s.block_ids),
) -> Plan:
    """Plans one step; changes nothing.

    Args:
        sequences: live sequences in arrival order; those with a row are running, the others wait.
        n_free: KV blocks that can be allocated.
        reclaimable: blocks that preempting a sequence frees (fewer than it holds where it shares a
        prefix).

    Returns:
        Chunks that fit the limits and the free blocks, those of one token first; the youngest
        running sequences to preempt so that older ones can go on; waiting sequences that a younger
        one was admitted before.
    """
    running = [s for s in sequences if s.row >= 0]
    draft = _Draft(running, n_free, limits, reclaimable)
    draft.add_singles()
    draft.add_prompts()
    bypassed = []
    if not draft.preempted:
        bypassed = draft.admit([s for s in sequences if s.row < 0])
    draft.chunks.sort(key=lambda chunk: chunk.n_new > 1)
    return Plan(draft.chunks, draft.preempted, bypassed)


class _Draft:
    """A plan in the making: `alive` are the running sequences not preempted, oldest first."""

    def __init__(self, running, n_free, limits, reclaimable):
        self.alive: list[types.Sequence] = running
        self.n_free: int = n_free
        self.limits: Limits = limits
        self.reclaimable = reclaimable
        self.budget: int = limits.max_batched_tokens
        self.chunks: list[Chunk] = []
        self.preempted: list[types.Sequence] = []

    def add_singles(self) -> None:
        """Everyone who owes one token; the youngest give way when blocks run out."""
        block_size, chunks, alive = self.limits.block_size, self.chunks, self.alive
        i = 0
        while i < len(alive) and self.budget > 0:
            s = alive[i]
            i += 1
            if s.n_tokens - s.n_cached != 1:
                continue
            need = 1 if s.n_cached >= len(s.block_ids) * block_size else 0
            if need > self.n_free:
                self._preempt_younger_than(i)
                if need > self.n_free:  # nobody younger is left
                    self._preempt_youngest()
                    return
            self.n_free -= need
            self.budget -= 1
            chunks.append(Chunk(s, 1, need))

    def add_prompts(self) -> None:
        """Running sequences that owe more, oldest first, while budget and blocks last."""
        i = 0
        while i < len(self.alive) and self.budget > 0:
            s = self.alive[i]
            i += 1
            if s.n_tokens - s.n_cached == 1:
                continue
            if not self._room(s) and not self.chunks:
                self._preempt_younger_than(i)
            self._add(s)

    def admit(self, waiting: list[types.Sequence]) -> list[types.Sequence]:
        """Gives rows to waiting sequences whose known tokens fit beside one more block for each
        running one.

        One that does not fit yet is passed over, at most MAX_BYPASSED times. Returns those passed
        over.
        """
        passed: list[types.Sequence] = []
        bypassed: list[types.Sequence] = []
        for s in waiting:
            if self.budget == 0 or len(self.alive) == self.limits.max_seqs:
                break
            need = -(-s.n_tokens // self.limits.block_size) - len(s.block_ids)
            if need + len(self.alive) > self.n_free and self.alive:
                if s.n_bypassed >= MAX_BYPASSED:
                    break
                passed.append(s)
                continue
            self._add(s)
            self.alive.append(s)
            bypassed = list(passed)
        return bypassed

    def _room(self, s: types.Sequence) -> int:
        """Tokens of `s` that its own blocks and the free ones can still take."""
        return (len(s.block_ids) + self.n_free) * self.limits.block_size - s.n_cached

    def _add(self, s: types.Sequence) -> None:
        n_new = min(s.n_tokens - s.n_cached, self.budget, self._room(s))
        if n_new <= 0:
            return
        need = max(0, -(-(s.n_cached + n_new) // self.limits.block_size) - len(s.block_ids))
        self.n_free -= need
        self.budget -= n_new
        self.chunks.append(Chunk(s, n_new, need))

    def _preempt_younger_than(self, i: int) -> None:
        """Preempts from the youngest on, down to alive[i], until a block is free."""
        while self.n_free == 0 and len(self.alive) > i:
            self._preempt_youngest()

    def _preempt_youngest(self) -> None:
        victim = self.alive.pop()
        self.n_free += self.reclaimable(victim)
        self.preempted.append(victim)
