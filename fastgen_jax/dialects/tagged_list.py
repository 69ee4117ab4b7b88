"""A tag, and a list of calls in JSON: Granite 3, Phi 4 mini."""

from collections.abc import Sequence
from functools import partial

from fastgen_jax.dialects.dialect import Dialect, Literal, Tool
from fastgen_jax.dialects.json_calls import read_calls, write_calls
from fastgen_jax.dialects.tape import Malformed, Tape, Wait


def read(tags: tuple[str, ...], tape: Tape, tools: Sequence[Tool]) -> Wait:
    while (yield from tape.until(*tags)):
        try:
            yield from tape.skip_spaces()
            yield from read_calls(tape)
        except Malformed:
            tape.give_up()


def write(tag: str, tools: Sequence[Tool], parallel: bool, literal: Literal) -> str:
    return f"calls: {literal(tag)} list\n{write_calls(tools, parallel)}"


def after(name: str, *tags: str) -> Dialect:
    """The dialect that has one of these tags before the list. The first one is written."""
    return Dialect(name=name, markers=tags, read=partial(read, tags), write=partial(write, tags[0]))


GRANITE = after("granite", "<|tool_call|>", "<tool_call>")
PHI4_MINI = after("phi4_mini_json", "functools", "<|tool_call|>")
