"""How models write thoughts before they answer, and where those end."""

from __future__ import annotations

import json
from dataclasses import dataclass

from fastgen_jax.dialects.dialect import Dialect, Literal, free_text, spell
from fastgen_jax.dialects.events import Thought
from fastgen_jax.dialects.tape import SPACES, Tape, Wait


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """Thoughts between two tags, at most once, before everything else.

    Args:
        name: as --reasoning-parser gives it.
        openings, closings: the tags; any of them counts, the first is the one to write.
        head: what stands before an answer that is no call.
        dialect: reads answers that have thoughts among calls and text; then no other is asked.
    """

    name: str
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    head: str = ""
    dialect: Dialect | None = None

    @property
    def markers(self) -> tuple[str, ...]:
        """Tags that must reach the reader even where text usually hides them."""
        return self.dialect.markers if self.dialect else (*self.openings, *self.closings)

    def is_opened_by(self, prompt: str) -> bool:
        """Whether the prompt ends inside of a thought, which the answer goes on with."""
        return prompt.rstrip(SPACES).endswith(self.openings)

    def read(self, tape: Tape, *, is_open: bool) -> Wait:
        """Reads the thoughts, if there are some, and nothing after them."""
        if (yield from tape.begin(*self.openings)) or is_open:
            tape.drop()
            yield from tape.skip_spaces()
            yield from tape.until(*self.closings, kind=Thought)
            tape.drop()
            yield from tape.skip_spaces()

    def grammar(
        self, *, is_open: bool = False, is_call: bool = False, literal: Literal = json.dumps
    ) -> str:
        """A Lark grammar of thoughts and then what the grammar named `answer` allows.

        Args:
            is_open: the prompt ends inside of a thought; else one may be left out.
            is_call: `answer` is a dialect's grammar of calls.
            literal: see Dialect.grammar.
        """
        end, *after = spell(self.closings[0], self.markers, literal)
        thought = " ".join(["free", *after, r'("\n" "\n"?)?'])
        if not is_open:
            opening = " ".join(spell(self.openings[0], self.markers, literal))
            thought = f"({opening} {thought})?"
        head = "" if is_call else " ".join(spell(self.head, self.markers, literal))
        start = f"start: {thought} {head} @answer"
        return f"%llguidance {{}}\n{start}\n{free_text('free', end)}\n"
