"""The reader of one answer: thoughts first, then text and calls."""

from collections.abc import Sequence

from fastgen_jax.dialects.dialect import Dialect, Tool
from fastgen_jax.dialects.tape import Reader, Tape, Wait
from fastgen_jax.dialects.thinking import Thinking


def make_reader(
    dialect: Dialect | None = None,
    thinking: Thinking | None = None,
    *,
    tools: Sequence[Tool] = (),
    is_thinking: bool = False,
) -> Reader:
    """A reader of one answer.

    Args:
        dialect: how calls are written; None: there are none.
        thinking: how thoughts are written; None: there are none.
        tools: the request's.
        is_thinking: the prompt ends inside of a thought (Thinking.is_opened_by).
    """

    def read(tape: Tape) -> Wait:
        own = thinking.dialect if thinking else None
        if thinking and not own:
            yield from thinking.read(tape, is_open=is_thinking)
        if speaker := own or dialect:
            yield from speaker.read(tape, tools)
        else:
            yield from tape.until()

    return Reader(read)
