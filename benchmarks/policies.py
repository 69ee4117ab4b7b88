"""How other systems plan a step: pure functions of the signature of our `schedule`.

Engine(config, policy=...) runs them with our kernels, cache and sampling, so that what differs is
the policy. What none of them can do here is a step of more than `max_batched_tokens`, for no
program of that size is compiled: give the engine as many as the longest prompt has, or it is cut.
"""

from collections.abc import Sequence

from fastgen_jax.engine import types
from fastgen_jax.engine.scheduler import Limits, Policy, Reclaimable, schedule
from fastgen_jax.engine.types import Chunk, Plan

MAX_PADDING = 256  # tokens of a prompt step, had all prompts the length of its longest one
WATERMARK = 0.01  # of all blocks, which no prompt may take


def static(
    sequences: Sequence[types.Sequence],
    n_free: int,
    limits: Limits,
    reclaimable: Reclaimable = lambda s: len(s.block_ids),
) -> Plan:
    """Request-level batching, as FasterTransformer behind Triton does (Yu et al., Orca, OSDI 2022,
    section 2): a batch is formed, whole prompts first, and runs to the end of its longest
    answer before another one is. Blocks for the longest possible answers are reserved.

    It is kinder than its model: an answer is delivered when it ends, not with its batch.
    """
    draft = _Draft(sequences, n_free, limits, reclaimable)
    is_forming = all(s.n_tokens <= s.n_prompt + 1 for s in draft.running)
    prompts = [s for s in draft.running if _owed(s) > 1]
    for s in prompts:
        draft.run(s)
    if is_forming:
        draft.admit_reserved()
    if not draft.chunks:
        for s in list(draft.running):
            draft.run(s)
    return draft.plan()


def orca(
    sequences: Sequence[types.Sequence],
    n_free: int,
    limits: Limits,
    reclaimable: Reclaimable = lambda s: len(s.block_ids),
) -> Plan:
    """Iteration-level scheduling (Yu et al., Orca, OSDI 2022, algorithm 1): who has begun takes
    part in each step, and whole prompts enter beside them, in order of arrival, while there are
    rows and room for the longest that each may become.
    """
    draft = _Draft(sequences, n_free, limits, reclaimable)
    for s in list(draft.running):
        draft.run(s)
    draft.admit_reserved()
    return draft.plan()


def vllm_2023(
    sequences: Sequence[types.Sequence],
    n_free: int,
    limits: Limits,
    reclaimable: Reclaimable = lambda s: len(s.block_ids),
) -> Plan:
    """Prompts first, as vLLM 0.2 does (vllm/core/scheduler.py of November 2023, and Kwon et al.,
    SOSP 2023): whole prompts have steps of their own, and decodes wait for them. Nothing is
    reserved; the last to arrive gives way when a decode finds no block, and computes again.
    """
    draft = _Draft(sequences, n_free, limits, reclaimable)
    decodes = [s for s in draft.running if _owed(s) == 1]
    for s in draft.running[:]:
        if _owed(s) > 1:  # cut, because no step could hold it
            draft.run(s)
    if not draft.preempted:
        draft.admit_prompts()
    if not draft.chunks:
        for s in decodes:
            draft.run(s)
    return draft.plan()


def chunked(
    sequences: Sequence[types.Sequence],
    n_free: int,
    limits: Limits,
    reclaimable: Reclaimable = lambda s: len(s.block_ids),
) -> Plan:
    """As vLLM V1 does (vllm/v1/core/sched/scheduler.py): the running ones in order of arrival, then
    waiting ones, each with as many of its tokens as the budget has left; a prompt enters as soon as
    there are blocks for its next chunk. The last to arrive gives way when blocks run out, and
    nobody enters in such a step.
    """
    draft = _Draft(sequences, n_free, limits, reclaimable)
    for s in list(draft.running):
        draft.run(s)
    if not draft.preempted:
        draft.admit_chunks()
    return draft.plan()


POLICIES: dict[str, Policy] = {
    "splitfuse": schedule,
    "static": static,
    "orca": orca,
    "vllm-2023": vllm_2023,
    "chunked": chunked,
}


class _Draft:
    """A plan in the making. INVARIANT: the running ones give way from the last in turn on."""

    def __init__(self, sequences, n_free, limits, reclaimable):
        self.running: list[types.Sequence] = [s for s in sequences if s.row >= 0]
        self.waiting: list[types.Sequence] = [s for s in sequences if s.row < 0]
        self.limits: Limits = limits
        self.n_free: int = n_free
        self.budget: int = limits.max_batched_tokens
        self.chunks: list[Chunk] = []
        self.preempted: list[types.Sequence] = []
        self._reclaimable = reclaimable

    def plan(self) -> Plan:
        self.chunks.sort(key=lambda chunk: chunk.n_new > 1)
        return Plan(self.chunks, self.preempted, [])

    def run(self, s: types.Sequence) -> None:
        """What a running one owes, as far as the budget goes; those behind it give way for its
        blocks, and in the end itself.
        """
        n_new = min(_owed(s), self.budget)
        if n_new == 0 or s in self.preempted:
            return
        need = self._blocks(s, s.n_cached + n_new)
        while need > self.n_free and self.running[-1] is not s:
            self._preempt_last()
        if need > self.n_free:
            self._preempt_last()
        else:
            self._take(s, n_new)

    def admit_reserved(self) -> None:
        """Whole prompts, in turn, while all that run could reach their longest. (Some gives way
        only while those that wait hold what is cached of their prompts.)
        """
        if self.preempted:
            return
        entering = [chunk.sequence for chunk in self.chunks if chunk.sequence.row < 0]
        given = {chunk.sequence.id: chunk.n_blocks for chunk in self.chunks}
        alive = self.running + entering
        reserved = sum(self._blocks(s, s.max_tokens) - given.get(s.id, 0) for s in alive)
        for s in self.waiting:
            whole = self._whole(s)
            need = self._blocks(s, s.max_tokens)
            if len(alive) == self.limits.max_seqs or not whole or reserved + need > self.n_free:
                return
            alive.append(s)
            self._take(s, whole)
            reserved += need - self.chunks[-1].n_blocks

    def admit_prompts(self) -> None:
        """Whole prompts, in turn, of about the same length."""
        n_all = self.n_free + sum(len(s.block_ids) for s in self.running)
        lengths = [chunk.n_new for chunk in self.chunks]
        n_alive = len(self.running)
        for s in self.waiting:
            whole = self._whole(s)
            n_padded = (len(lengths) + 1) * max([*lengths, whole])
            n_left = self.n_free - self._blocks(s, s.n_tokens)
            is_alone = not n_alive and not lengths
            if n_alive == self.limits.max_seqs or not whole:
                return
            if n_left < 0 or (n_left < WATERMARK * n_all and not is_alone):
                return
            if n_padded > self.limits.max_batched_tokens:
                return
            if n_padded - sum(lengths) - whole > MAX_PADDING:
                return
            self._take(s, whole)
            lengths.append(whole)
            n_alive += 1

    def admit_chunks(self) -> None:
        """What the budget holds of prompts, in turn, if there are blocks for that."""
        n_alive = len(self.running)
        for s in self.waiting:
            n_new = min(_owed(s), self.budget)
            need = self._blocks(s, s.n_cached + n_new)
            if n_alive == self.limits.max_seqs or n_new == 0 or need > self.n_free:
                return
            self._take(s, n_new)
            n_alive += 1

    def _whole(self, s: types.Sequence) -> int:
        """All that a waiting one owes; 0: not in this step. One that fits no step is cut."""
        n_new = _owed(s)
        if n_new > self.limits.max_batched_tokens:
            return self.budget
        return n_new if n_new <= self.budget else 0

    def _blocks(self, s: types.Sequence, n_tokens: int) -> int:
        """How many more it needs for that many tokens."""
        return max(-(-n_tokens // self.limits.block_size) - len(s.block_ids), 0)

    def _take(self, s: types.Sequence, n_new: int) -> None:
        need = self._blocks(s, s.n_cached + n_new)
        self.n_free -= need
        self.budget -= n_new
        self.chunks.append(Chunk(s, n_new, need))

    def _preempt_last(self) -> None:
        victim = self.running.pop()
        self.n_free += self._reclaimable(victim)
        self.preempted.append(victim)


def _owed(s: types.Sequence) -> int:
    return s.n_tokens - s.n_cached
