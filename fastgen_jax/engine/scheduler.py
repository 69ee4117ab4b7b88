"""Dynamic SplitFuse: the whole scheduling policy, one pure function of counts.

A sequence owes `n_tokens - n_cached` tokens to the cache. Each step runs everyone who owes one
token (decodes), then fills the token budget with the others in their turn, cutting the last chunk
so that the budget is met exactly (Holmes et al., DeepSpeed-FastGen, 2024). Turns are by priority,
lower first, then by arrival. It sees no token values, so it can plan a step while the one before
runs.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fastgen_jax.engine import types
from fastgen_jax.engine.types import Chunk, Plan

MAX_BYPASSED = 16  # times that those behind may be admitted before one that does not fit yet


class Limits(NamedTuple):
    """What one step may hold."""

    max_batched_tokens: int
    max_seqs: int
    block_size: int


Reclaimable = Callable[[types.Sequence], int]
Policy = Callable[[Sequence[types.Sequence], int, Limits, Reclaimable], Plan]  # as `schedule`


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
    reclaimable: Reclaimable = lambda s: len(s.block_ids),
) -> Plan:
    """Plans one step; changes nothing.

    Args:
        sequences: live sequences in their turn; those with a row are running, the others wait.
        n_free: KV blocks that can be allocated.
        reclaimable: blocks that preempting a sequence frees (fewer than it holds where it shares a
        prefix).

    Returns:
        Chunks that fit the limits and the free blocks, those of one token first; the last running
        sequences to preempt, so that those before them can go on or waiting ones of better priority
        can enter; waiting sequences that one behind them was admitted before.
    """
    draft = _Draft([s for s in sequences if s.row >= 0], n_free, limits, reclaimable)
    draft.add_singles()
    bypassed = draft.admit([s for s in sequences if s.row < 0])
    draft.add_prompts()
    draft.chunks.sort(key=lambda chunk: chunk.n_new > 1)
    return Plan(draft.chunks, draft.preempted, bypassed)


class _Draft:
    """A plan in the making: `running` are the running sequences not preempted, in their turn.

    INVARIANT: nobody is preempted for one whose turn comes later, nor for a waiting one of the same
    priority.
    """

    def __init__(self, running, n_free, limits, reclaimable):
        self.running: list[types.Sequence] = running
        self.n_free: int = n_free
        self.limits: Limits = limits
        self.reclaimable = reclaimable
        self.budget: int = limits.max_batched_tokens
        self.chunks: list[Chunk] = []
        self.preempted: list[types.Sequence] = []
        self.n_admitted = 0
        self.n_asked = 0  # leading running ones whose prompts had their chance

    def add_singles(self) -> None:
        """Everyone who owes one token; the last in turn give way when blocks run out."""
        block_size, chunks, running = self.limits.block_size, self.chunks, self.running
        i = 0
        while i < len(running) and self.budget > 0:
            s = running[i]
            i += 1
            if _owed(s) != 1:
                continue
            need = 1 if s.n_cached >= len(s.block_ids) * block_size else 0
            if need > self.n_free:
                self._preempt_behind(i)
                if need > self.n_free:  # nobody is left behind it
                    self._preempt_last()
                    return
            self.n_free -= need
            self.budget -= 1
            chunks.append(Chunk(s, 1, need))

    def add_prompts(self, worst_priority: float = math.inf) -> None:
        """Running sequences that owe more, in their turn, while budget and blocks last; none of a
        worse priority, and none twice. Ones of worse priority give way for what it lacks of blocks.
        """
        while self.n_asked < len(self.running) and self.budget > 0:
            s = self.running[self.n_asked]
            if s.priority > worst_priority:
                return
            self.n_asked += 1
            if _owed(s) == 1:
                continue
            if not self._room(s) and not self.chunks:
                self._preempt_behind(self.n_asked)
            while self._outranks_last(s) and self._room(s) < min(_owed(s), self.budget):
                self._preempt_last()
            self._add(s)

    def admit(self, waiting: list[types.Sequence]) -> list[types.Sequence]:
        """Gives rows to waiting sequences whose known tokens fit beside one more block for each
        running one; running ones of worse priority give way for that.

        One that does not fit yet is passed over, at most MAX_BYPASSED times. Returns those passed
        over.
        """
        passed: list[types.Sequence] = []
        bypassed: list[types.Sequence] = []
        for s in waiting:
            self.add_prompts(s.priority)
            if self.budget == 0 or not self._has_turn(s):
                break
            n_victims = self._n_victims(s)
            if n_victims is None:
                if s.n_bypassed >= MAX_BYPASSED:
                    break
                passed.append(s)
                continue
            for _ in range(n_victims):
                self._preempt_last()
            self._add(s)
            self.n_admitted += 1
            bypassed = list(passed)
        return bypassed

    @property
    def _n_alive(self) -> int:
        return len(self.running) + self.n_admitted

    def _has_turn(self, s: types.Sequence) -> bool:
        """Whether a waiting sequence, or one behind it, may still enter: nobody enters while others
        of its priority give way, nor without a row.
        """
        if self.preempted and s.priority >= self.preempted[-1].priority:
            return False
        return self._n_alive < self.limits.max_seqs or self._outranks_last(s)

    def _outranks_last(self, s: types.Sequence) -> bool:
        return bool(self.running) and s.priority < self.running[-1].priority

    def _n_victims(self, s: types.Sequence) -> int | None:
        """How many of the last running sequences, all of worse priority, must give way for `s` to
        fit; None: it does not fit even so.
        """
        n_free, n_alive = self.n_free, self._n_alive
        if self._fits(s, n_free, n_alive):
            return 0
        if not self._outranks_last(s):
            return None
        taken = {chunk.sequence.id: chunk.n_blocks for chunk in self.chunks}
        for n, victim in enumerate(reversed(self.running), 1):
            if victim.priority <= s.priority:
                return None
            n_free += self.reclaimable(victim) + taken.get(victim.id, 0)
            if self._fits(s, n_free, n_alive - n):
                return n
        return None

    def _fits(self, s: types.Sequence, n_free: int, n_alive: int) -> bool:
        """Whether a waiting sequence has a row and blocks beside so many that run."""
        need = -(-s.n_tokens // self.limits.block_size) - len(s.block_ids)
        return n_alive < self.limits.max_seqs and (need + n_alive <= n_free or not n_alive)

    def _room(self, s: types.Sequence) -> int:
        """Tokens of `s` that its own blocks and the free ones can still take."""
        return (len(s.block_ids) + self.n_free) * self.limits.block_size - s.n_cached

    def _add(self, s: types.Sequence) -> None:
        n_new = min(_owed(s), self.budget, self._room(s))
        if n_new <= 0:
            return
        need = max(0, -(-(s.n_cached + n_new) // self.limits.block_size) - len(s.block_ids))
        self.n_free -= need
        self.budget -= n_new
        self.chunks.append(Chunk(s, n_new, need))

    def _preempt_behind(self, i: int) -> None:
        """Preempts from the last in turn on, down to running[i], until a block is free."""
        while self.n_free == 0 and len(self.running) > i:
            self._preempt_last()

    def _preempt_last(self) -> None:
        """The last in turn gives way, with what this plan had for it."""
        victim = self.running.pop()
        for i, chunk in enumerate(self.chunks):
            if chunk.sequence is victim:
                self.n_free += chunk.n_blocks
                self.budget += chunk.n_new
                del self.chunks[i]
                break
        self.n_free += self.reclaimable(victim)
        self.preempted.append(victim)


def _owed(s: types.Sequence) -> int:
    return s.n_tokens - s.n_cached
