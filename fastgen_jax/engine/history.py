"""The newest steps in numbers: what each one held, and how long it took.

One writer, the engine's thread, which notes what it has at hand; readers of any thread. Counts and
ids of sequences, never tokens.
"""

import threading
import time
from collections import deque
from typing import NamedTuple

from fastgen_jax.engine.surface import Work
from fastgen_jax.engine.types import Plan

N_STEPS = 120  # that are kept

# Id of a sequence, its new tokens, those in the cache after the step, those known before it. The
# step yields a token if the last two are equal. A tuple of ints, of which a step has hundreds.
ChunkRecord = tuple[int, int, int, int]


class StepRecord(NamedTuple):
    """One step that did not fail."""

    number: int  # from 1 on, without gaps
    end_time: float  # time.monotonic()
    seconds: float  # from its planning until the tokens of the step before were read
    n_padded: int  # tokens that the program computes
    n_running: int  # when it ended
    n_waiting: int
    n_preempted: int
    chunks: list[ChunkRecord]

    @property
    def work(self) -> Work:
        return Work.of((n_new, cached) for _, n_new, cached, _ in self.chunks)


class History:
    """INVARIANT: at most N_STEPS records, in order."""

    def __init__(self):
        self._steps: deque[StepRecord] = deque(maxlen=N_STEPS)
        self._lock = threading.Lock()  # a deque that grows cannot be copied
        self._n_steps = self._n_preempted = 0
        self._chunks: list[ChunkRecord] = []

    @property
    def n_steps(self) -> int:
        """The number of the newest step; 0: there was none."""
        return self._n_steps

    @property
    def newest(self) -> StepRecord | None:
        return self._steps[-1] if self._steps else None

    def since(self, number: int) -> list[StepRecord]:
        """The steps after that one, as far as they are kept."""
        with self._lock:
            n_new = max(min(self._n_steps - number, len(self._steps)), 0)
            return [self._steps[i] for i in range(-n_new, 0)]

    def begin(self, plan: Plan) -> None:
        """A step that is to do this, and has not changed a count yet."""
        self._n_preempted = len(plan.preempted)
        self._chunks = [
            (s.id, n_new, s.n_cached + n_new, s.n_tokens) for s, n_new, _ in plan.chunks
        ]

    def end(self, seconds: float, *, n_padded: int, n_running: int, n_waiting: int) -> None:
        """It has succeeded."""
        with self._lock:
            self._n_steps += 1
            self._steps.append(
                StepRecord(
                    self._n_steps, time.monotonic(), seconds, n_padded, n_running, n_waiting,
                    self._n_preempted, self._chunks,
                )
            )  # fmt: skip
