"""Placement: which sequence has which row and blocks, what the next step holds, and its batch.

The host's half of the KV cache: it plans and packs, and never waits for the device. Whoever ends,
gives way or is lost gives back here what it held.
"""

import math
from collections.abc import Callable, Iterable

from fastgen_jax.engine.batch import Batch, HostTables, Shape, pack
from fastgen_jax.engine.history import StepRecord
from fastgen_jax.engine.prefix import SequenceBlocks
from fastgen_jax.engine.runner import shape_for
from fastgen_jax.engine.scheduler import Limits, Policy, schedule
from fastgen_jax.engine.startup import ResolvedConfig
from fastgen_jax.engine.types import Plan, Sequence


class Placement:
    """Owner of the host tables and of who holds which block.

    INVARIANT: only running sequences have a row; only they and the retired hold blocks. A retired
    one keeps its blocks until its last step's tokens are read, so that they can be published, or
    until somebody needs them: the device runs steps in order, so that its last write lands before
    the next owner's first.

    Args:
        window: no layer sees a token that is so many positions back; None: some layer sees all.
        policy: plans steps in place of `schedule`, for experiments.
        make_tables: for who plans without a device.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        window: int | None,
        policy: Policy | None = None,
        make_tables: Callable[..., HostTables] = HostTables,
    ):
        self._config, self._window = config, window
        self._policy, self._make_tables = policy, make_tables
        self.limits = Limits(config.max_num_batched_tokens, config.max_num_seqs, config.block_size)
        self._pace = config.pace
        self.n_preemptions = 0
        self.lose(())

    def lose(self, sequences: Iterable[Sequence]) -> None:
        """Starts anew: the device has lost its cache, and with it all that these sequences had."""
        c = self._config
        self.tables = self._make_tables(
            c.max_num_seqs, c.max_model_len, c.table_width, c.processors
        )
        self.blocks = SequenceBlocks(
            c.num_kv_blocks, c.block_size, is_sharing=c.enable_prefix_caching, window=self._window
        )
        self.retired: dict[int, Sequence] = {}
        for sequence in sequences:
            sequence.row = -1
            self.blocks.lose(sequence)

    @property
    def n_running(self) -> int:
        return self.limits.max_seqs - len(self.tables.free_rows)

    @property
    def n_usable_blocks(self) -> int:
        return self.blocks.pool.n_usable

    @property
    def n_used_blocks(self) -> int:
        return self.blocks.pool.n_usable - self.blocks.pool.n_free

    def plan(self, sequences: list[Sequence]) -> Plan:
        """What the next step does with these live sequences, in their turn.

        The waiting ones in the plan hold their cached prefixes already, and no others.
        """
        self._drop_unseen(sequences)
        if self._pace is not None:
            self.limits = self.limits._replace(max_batched_tokens=self._pace.budget(sequences))
        attached = self._attach_prefixes(sequences)
        plan = self._schedule(sequences)
        admitted = {chunk.sequence.id for chunk in plan.chunks if chunk.sequence.row < 0}
        is_starved = attached and not admitted and (plan.preempted or not plan.chunks)
        for sequence in attached:
            if sequence.id not in admitted:
                self.blocks.forget(sequence)
        if is_starved:  # what waits must not hold blocks that what runs needs
            plan = self._schedule(sequences)
        return plan

    def took(self, step: StepRecord, seconds: float) -> None:
        """So long passed from the end of the step before until this one's tokens were read."""
        if self._pace is not None:
            work = step.work
            if work.n_tokens > len(step.chunks):  # whose length the pace decides
                self._pace = self._pace.after(work, seconds)

    def prepare(self, plan: Plan, shapes: Iterable[Shape]) -> Batch | None:
        """Applies a plan, and packs what its sequences do; None if that is nothing."""
        self.apply(plan)
        if not plan.chunks:
            return None
        shape = shape_for(sum(chunk.n_new for chunk in plan.chunks), shapes)
        return pack(plan.chunks, self.tables, shape, self.limits.block_size)

    def apply(self, plan: Plan) -> None:
        """Gives the plan's sequences their rows and blocks."""
        self.preempt(plan.preempted)
        for sequence in plan.bypassed:
            sequence.n_bypassed += 1
        if sum(chunk.n_blocks for chunk in plan.chunks) > self.blocks.pool.n_free:
            for sequence in self.retired.values():
                self.blocks.forget(sequence)
        for sequence, _, n_blocks in plan.chunks:
            if sequence.row < 0:
                self.tables.enter(sequence)
            if n_blocks:
                self.tables.extend(sequence, self.blocks.pool.allocate(n_blocks))

    def preempt(self, sequences: Iterable[Sequence]) -> None:
        """Takes all that they hold; they wait again."""
        for sequence in sequences:
            self.blocks.forget(sequence)
            self.tables.leave(sequence)
            self.n_preemptions += 1

    def retire(self, sequence: Sequence) -> None:
        """Its last step is on its way: another may have its row."""
        self.tables.leave(sequence)
        self.retired[sequence.id] = sequence

    def release(self, sequence: Sequence) -> None:
        """It has ended, in whatever state it was."""
        if sequence.row >= 0:
            self.tables.leave(sequence)
        self.blocks.forget(sequence)
        self.retired.pop(sequence.id, None)

    def _schedule(self, sequences: list[Sequence]) -> Plan:
        retiring = sum(map(self.blocks.n_exclusive, self.retired.values()))
        n_free = self.blocks.pool.n_free + retiring
        policy = self._policy or schedule
        return policy(sequences, n_free, self.limits, self.blocks.n_exclusive)

    def _drop_unseen(self, sequences: list[Sequence]) -> None:
        """Gives back blocks behind the windows of all layers."""
        if self.blocks.window is not None:
            for sequence in sequences:
                if sequence.row >= 0 and self.blocks.drop(sequence):
                    self.tables.drop(sequence)

    def _attach_prefixes(self, sequences: list[Sequence]) -> list[Sequence]:
        """Lets the first waiting sequences, as many as the budget can take, hold their cached
        prefix, for `schedule` to see: those that there may be rows and blocks for, and those to
        whom a running one may give way.
        """
        n_rows, n_running = len(self.tables.free_rows), self.n_running
        budget = self.limits.max_batched_tokens - n_running
        attached: list[Sequence] = []
        n_rows = 0 if self.blocks.pool.n_free < 2 * n_running else n_rows
        running = (s.priority for s in reversed(sequences) if s.row >= 0)
        worst = next(running, -math.inf)
        for sequence in sequences:
            if budget <= 0 or (len(attached) >= n_rows and sequence.priority >= worst):
                break
            if sequence.row < 0:
                if self.blocks.may_share(sequence):
                    self.blocks.attach(sequence)
                    attached.append(sequence)
                budget -= sequence.n_tokens - sequence.n_cached
        return attached
