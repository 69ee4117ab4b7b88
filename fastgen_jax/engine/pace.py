"""Pace: the token budget of each step, so that a running request's next token comes in time."""

from collections.abc import Iterable
from typing import NamedTuple

from fastgen_jax.engine.surface import Surface, Work
from fastgen_jax.engine.types import Sequence

SMALLEST_CHUNK = 16  # tokens of prompts that a step takes in, however long it takes
LEARNING_RATE = 0.05  # of a step's weight in the mean of steps
MOST_OFF = 2.0  # times: a step that is further off the mean counts as if it were not


class Pace(NamedTuple):
    """Steps that take at most `seconds`, as far as prompts decide it.

    The surface was measured alone, before anybody asked; `off` is how many times what it says the
    newest steps took, so that the pace is kept beside whatever else the machine does.
    """

    surface: Surface
    seconds: float
    off: float = 1.0

    def after(self, work: Work, seconds: float) -> "Pace":
        """When a step has taken so long."""
        ratio = seconds / self.surface(work) / self.off
        ratio = min(max(ratio, 1 / MOST_OFF), MOST_OFF)
        return self._replace(off=self.off * (1 + LEARNING_RATE * (ratio - 1)))

    def budget(self, sequences: Iterable[Sequence]) -> int:
        """Tokens of the next step of these sequences, which are in their turn."""
        n = n_context = 0
        cached = -1  # of the first whose prompt is not in the cache
        for s in sequences:
            if s.n_tokens - s.n_cached > 1:
                cached = s.n_cached if cached < 0 else cached
            elif s.row >= 0:
                n, n_context = n + 1, n_context + s.n_tokens
        if cached < 0:
            return max(n, SMALLEST_CHUNK)
        decodes = Work(n, n_context, float(n_context))
        size = self.surface.size_within(self.seconds / self.off, decodes, cached)
        return max(size, n + SMALLEST_CHUNK)
