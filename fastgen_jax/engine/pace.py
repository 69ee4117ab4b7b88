"""Pace: the token budget of each step, so that a running request's next token comes in time."""

from collections.abc import Iterable
from typing import NamedTuple

from fastgen_jax.engine.surface import Surface, Work
from fastgen_jax.engine.types import Sequence

SMALLEST_CHUNK = 16  # tokens of prompts that a step takes in, however long it takes


class Pace(NamedTuple):
    """Steps that take at most `seconds`, as far as prompts decide it."""

    surface: Surface
    seconds: float

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
        return max(self.surface.size_within(self.seconds, decodes, cached), n + SMALLEST_CHUNK)
