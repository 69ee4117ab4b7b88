"""One engine by a virtual clock: the product's scheduler, placement and block pool, no device.

It turns as engine.Pipeline does: plans a step while the one before runs, then takes in the tokens
of that one. Of a step it knows how long it takes, of a token that it came.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from benchmarks.simulation.step_time import StepTime
from fastgen_jax.engine.placement import Placement
from fastgen_jax.engine.scheduler import Policy
from fastgen_jax.engine.startup import ResolvedConfig
from fastgen_jax.engine.surface import Work
from fastgen_jax.engine.types import Plan, Sequence
from fastgen_jax.sampling_params import SamplingParams

PARAMS = SamplingParams(temperature=0.0, ignore_eos=True)
UNNAMED = np.zeros(1 << 20, np.int32)  # tokens whose values do not matter


@dataclass(eq=False, slots=True)
class Job:
    """A request, and what became of it. INVARIANT: `times` ascend, at most n_output of them."""

    time: float  # of its arrival
    n_prompt: int
    n_output: int
    prompt_ids: np.ndarray | None = None  # where prefixes are shared
    ticket: Any = None  # where a router reads it
    times: list[float] = field(default_factory=list)  # when its tokens came
    n_reused: int = 0
    has_failed: bool = False

    @property
    def n_tokens(self) -> int:
        return self.n_prompt + self.n_output


class Step(NamedTuple):
    """A planned step: whose tokens are there at its end."""

    end: float
    sampled: list[Sequence]


class Rows:
    """What HostTables is to Placement, less the tables."""

    def __init__(self, n_rows: int, *sizes: Any):
        self.free_rows = list(range(n_rows))

    def enter(self, sequence: Sequence) -> None:
        sequence.row = self.free_rows.pop()

    def leave(self, sequence: Sequence) -> None:
        self.free_rows.append(sequence.row)
        sequence.row = -1

    def extend(self, sequence: Sequence, blocks: list[int]) -> None:
        sequence.block_ids += blocks


def sizes(
    *,
    budget: int,
    max_seqs: int,
    n_blocks: int,
    block_size: int = 64,
    max_model_len: int = 4096,
    is_sharing: bool = False,
) -> ResolvedConfig:
    """Limits of an engine that needs no model."""
    return ResolvedConfig(
        model="simulated", max_num_batched_tokens=budget, max_num_seqs=max_seqs,
        num_kv_blocks=n_blocks, block_size=block_size, max_model_len=max_model_len,
        enable_prefix_caching=is_sharing, memory_fraction=0.9,
    )  # fmt: skip


class Replica:
    """INVARIANT: `jobs` are those that have not ended; `n_outstanding` is the sum of their tokens.

    Args:
        seconds: of a step.
        is_ahead: whether a step is planned while the one before runs, as ours are.
        on_plan: hears of every plan before it is applied.
    """

    def __init__(
        self,
        name: str,
        config: ResolvedConfig,
        seconds: StepTime,
        *,
        policy: Policy | None = None,
        is_ahead: bool = True,
        on_plan: Any = None,
    ):
        self.name = name
        self.n_outstanding = 0
        self.n_steps = self.n_step_tokens = 0
        self.busy = 0.0  # seconds
        self.due: Step | None = None  # whose tokens come next
        self.jobs: dict[int, Job] = {}
        self._config, self._seconds, self._policy = config, seconds, policy
        self._is_ahead, self._on_plan = is_ahead, on_plan
        self._n_entered = 0
        self._is_sharing = config.enable_prefix_caching
        self._start_anew()

    def _start_anew(self) -> None:
        self.placement = Placement(self._config, None, self._policy, Rows)  # type: ignore
        self.due = self._in_flight = None
        self._live: dict[int, Sequence] = {}  # in their turn
        self._free_at = 0.0

    def add(self, job: Job) -> None:
        ids = UNNAMED[: job.n_prompt] if job.prompt_ids is None else job.prompt_ids
        sequence = Sequence(
            self._n_entered, self._n_entered, 0, ids, PARAMS, 0, job.n_tokens, frozenset(),
            n_tokens=job.n_prompt,
        )  # fmt: skip
        self.jobs[sequence.id] = job
        self._live[sequence.id] = sequence
        self._n_entered += 1
        self.n_outstanding += job.n_tokens

    def turn(self, now: float) -> float | None:
        """Plans and starts what can be; when the next tokens come, or None."""
        if not self._is_ahead:
            self.due = self._start(now)
        else:
            self.due = self._in_flight or self._start(now)
            self._in_flight = self._start(now) if self.due else None
        return self.due.end if self.due else None

    def commit(self) -> list[Job]:
        """Takes in the tokens that are due; those that have ended."""
        assert self.due is not None
        now, ended = self.due.end, []
        for sequence in self.due.sampled:
            job = self.jobs[sequence.id]
            job.times.append(now)
            if self._is_sharing:
                sequence.output_ids.append(0)
                self.placement.blocks.publish(sequence)
            if len(job.times) == job.n_output:
                self.placement.release(sequence)
                self.n_outstanding -= job.n_tokens
                job.n_reused = sequence.n_reused
                ended.append(self.jobs.pop(sequence.id))
        return ended

    def fail(self) -> list[Job]:
        """All is lost; those that had not ended."""
        lost = list(self.jobs.values())
        self.jobs.clear()
        self.n_outstanding = 0
        self._start_anew()
        return lost

    def _start(self, now: float) -> Step | None:
        """The next step, which begins when the one before has ended."""
        plan = self.placement.plan(list(self._live.values()))
        if self._on_plan:
            self._on_plan(plan)
        newcomers = [chunk.sequence for chunk in plan.chunks if chunk.sequence.row < 0]
        for sequence in newcomers:
            if not sequence.is_dequeued:
                sequence.n_reused, sequence.is_dequeued = sequence.n_cached, True
        self.placement.apply(plan)
        if not plan.chunks:
            return None
        work, sampled = self._count(plan)
        seconds = self._seconds(work)
        self._free_at = max(self._free_at, now) + seconds
        self.busy += seconds
        self.n_steps += 1
        self.n_step_tokens += work.n_tokens
        return Step(self._free_at, sampled)

    def _count(self, plan: Plan) -> tuple[Work, list[Sequence]]:
        """Advances the counts of a plan's sequences."""
        n_tokens = n_context = n_masked = n_pairs = 0
        sampled: list[Sequence] = []
        for sequence, n_new, _ in plan.chunks:
            cached = sequence.n_cached = sequence.n_cached + n_new
            n_tokens += n_new
            n_context += cached
            n_pairs += n_new * cached
            n_masked += n_new * (n_new - 1)
            if cached == sequence.n_tokens:
                sequence.n_tokens += 1
                sampled.append(sequence)
                if sequence.n_tokens == sequence.max_tokens:
                    del self._live[sequence.id]
                    self.placement.retire(sequence)
        return Work(n_tokens, n_context, n_pairs - n_masked / 2), sampled
