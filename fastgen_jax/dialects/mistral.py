"""[TOOL_CALLS] and a list of calls in JSON, or since 2025 [TOOL_CALLS]name[ARGS]{...} for each."""

import json
import re
from collections.abc import Sequence

from fastgen_jax.dialects.dialect import Dialect, Literal, Tool, alternatives, arguments_of
from fastgen_jax.dialects.json_calls import read_calls, write_calls
from fastgen_jax.dialects.json_text import collect, value
from fastgen_jax.dialects.tape import Malformed, Tape, Wait

CALLS, ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
NAME = re.compile(r"[^\[\]{}\s]*")


def read(tape: Tape, tools: Sequence[Tool]) -> Wait:
    while (yield from tape.until(CALLS)):
        try:
            yield from tape.skip_spaces()
            if (yield from tape.peek()) == "[":
                yield from read_calls(tape)
            else:
                yield from _read_call(tape)
            yield from tape.skip_spaces()
        except Malformed:
            tape.give_up()


def _read_call(tape: Tape) -> Wait:
    name = yield from _word(tape)
    if (yield from tape.peek()) == "[":
        tape.take()
        if (yield from tape.peek()) == ID[1]:
            yield from tape.read(ID[1:])
            yield from _word(tape)
            yield from tape.read("[")
        yield from tape.read(ARGUMENTS[1:])
    yield from tape.skip_spaces()
    if not name or (yield from tape.peek()) != "{":
        raise Malformed
    tape.start_call(name)
    yield from value(tape, tape.write_arguments)
    tape.end_call()


def _word(tape: Tape) -> Wait:
    return (yield from collect(tape, lambda tape, write: tape.run(NAME.match, write)))


def write_list(tools: Sequence[Tool], parallel: bool, literal: Literal) -> str:
    return f'calls: {literal(CALLS)} " "? list\n{write_calls(tools, parallel)}'


def write_each(tools: Sequence[Tool], parallel: bool, literal: Literal) -> str:
    calls = (
        f"{literal(CALLS)} {json.dumps(tool.name)} {literal(ARGUMENTS)} {arguments_of(tool)}"
        for tool in tools
    )
    return f"calls: call{'+' if parallel else ''}\n{alternatives('call', calls)}"


TAGS = (CALLS, ID, ARGUMENTS)
MISTRAL = Dialect(name="mistral", markers=TAGS, read=read, write=write_list)
MISTRAL_ARGS = Dialect(name="mistral_args", markers=TAGS, read=read, write=write_each)
