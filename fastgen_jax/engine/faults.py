"""What the engine does about faults: who is tried again, when to give up, and what health says.

A step that fails says nothing about which of its sequences made it fail. So each is tried again
alone, up to where the step was lost; one that fails alone ends with an error, the others go on with
the same tokens. Sequences that had no part in the step are recomputed and not suspected.
"""

import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping

from fastgen_jax.engine.batch import Batch
from fastgen_jax.engine.types import Sequence

log = logging.getLogger("fastgen_jax.engine")

# So many within FAILURE_WINDOW, or with no good step between: then the engine gives up.
MAX_FAILED_STEPS = 10
FAILURE_WINDOW = 60.0  # seconds
DECAY = 0.98  # a step, of what the share of non-finite rows remembers


class Trials:
    """Suspects in the order in which they are tried.

    INVARIANT: while a suspect lives, a step holds chunks of the first living one and no others.
    """

    def __init__(self):
        self._until: dict[int, int] = {}  # sequence id -> tokens in the cache that acquit it

    def defendants(self, live: Mapping[int, Sequence]) -> list[Sequence]:
        """Those that the next step may hold: one suspect, or all if none lives."""
        for sequence_id in self._until:
            if sequence_id in live:
                return [live[sequence_id]]
        return list(live.values())

    def accuse(self, sequences: Iterable[tuple[Sequence, int]]) -> list[Sequence]:
        """Takes in the sequences of a failed step, each with the tokens that it had cached after
        it. Returns those that were tried alone already: they are guilty.
        """
        guilty = []
        for sequence, n_cached in sequences:
            if sequence.is_finished:
                continue
            if sequence.id in self._until:
                guilty.append(sequence)
            else:
                self._until[sequence.id] = n_cached
        return guilty

    def acquit(self, batch: Batch) -> None:
        """Clears those whom a good step has brought past where the bad one was lost."""
        if self._until:
            for sequence, n_cached in batch.reached():
                if n_cached >= self._until.get(sequence.id, n_cached + 1):
                    del self._until[sequence.id]

    def drop(self, sequence: Sequence) -> None:
        """It has ended."""
        self._until.pop(sequence.id, None)


class Faults:
    """Counts and logs faults. One writer: the engine's thread."""

    def __init__(self):
        self.n_failed_steps = 0
        self.n_nonfinite = 0  # samples
        self._failures: deque[float] = deque()
        self._n_rows = self._n_bad_rows = 0.0  # sampled lately

    @property
    def is_final(self) -> bool:
        """Whether the engine should give up."""
        return len(self._failures) >= MAX_FAILED_STEPS

    @property
    def nonfinite_share(self) -> float:
        """Of the rows sampled lately, from 0 to 1; rows count half after 34 steps."""
        return self._n_bad_rows / max(self._n_rows, 1.0)

    def step_failed(self, error: Exception, batch: Batch | None, state: str) -> None:
        """Counts and logs a step that failed in that state of the engine; `batch` is None if it
        could not even be planned.
        """
        self.n_failed_steps += 1
        self._failures.append(time.monotonic())
        what = "planning a step" if batch is None else f"a step of {batch.summary()}"
        log.error("%s failed (%s): %s", what, state, type(error).__name__, exc_info=error)

    def step_succeeded(self, n_rows: int, n_bad: int) -> None:
        """Counts a good step that sampled so many rows, some of them not finite."""
        self._n_rows = self._n_rows * DECAY + n_rows
        self._n_bad_rows = self._n_bad_rows * DECAY + n_bad
        self.n_nonfinite += n_bad
        if n_bad:
            log.warning("non-finite logits in %d of the %d rows of a step", n_bad, n_rows)
        oldest = time.monotonic() - FAILURE_WINDOW
        while self._failures and self._failures[0] < oldest:
            self._failures.popleft()
