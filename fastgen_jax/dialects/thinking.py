"""How models write thoughts before they answer, and where those end."""

from __future__ import annotations

from dataclasses import dataclass

from fastgen_jax.dialects.dialect import Dialect
from fastgen_jax.dialects.events import Thought
from fastgen_jax.dialects.tape import SPACES, Tape, Wait


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """Thoughts between two tags, at most once, before everything else.

    Args:
        name: as --reasoning-parser gives it.
        openings, closings: the tags; any of them counts.
        dialect: reads answers that have thoughts among calls and text; then no other is asked.
    """

    name: str
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    dialect: Dialect | None = None

    @property
    def markers(self) -> tuple[str, ...]:
        return self.dialect.markers if self.dialect else (*self.openings, *self.closings)

    def is_opened_by(self, prompt: str) -> bool:
        """Whether the prompt ends inside of a thought, which the answer goes on with."""
        return prompt.rstrip(SPACES).endswith(self.openings)

    def read(self, tape: Tape, *, is_open: bool) -> Wait:
        """Reads the thoughts, if there are some, and nothing after them."""
        if not is_open:
            is_open = yield from tape.begins_with(*self.openings)
        if is_open:
            yield from tape.skip_spaces()
            yield from tape.until(*self.closings, kind=Thought)
            tape.drop()
            yield from tape.skip_spaces()
