"""Calls of DeepSeek, each between tags of its own: V3 and R1 with a fence around the JSON, V3.1."""

import json
from collections.abc import Sequence

from fastgen_jax.dialects.dialect import Dialect, Literal, Tool, alternatives, arguments_of
from fastgen_jax.dialects.json_text import value
from fastgen_jax.dialects.tape import SPACES, Malformed, Tape, Wait

CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
TAGS = (CALLS, CALL, SEPARATOR, CALL_END, CALLS_END)
FENCE = "```"


def read(tape: Tape, tools: Sequence[Tool]) -> Wait:
    while (yield from tape.until(CALLS)):
        try:
            yield from tape.skip_spaces()
            tag = yield from tape.read(CALL)
            while tag == CALL:
                yield from _read_call(tape)
                yield from tape.skip_spaces()
                tag = yield from tape.read(CALL, CALLS_END)
                tape.end_call()
                tape.expect_more(tag)
            tape.drop()
            yield from tape.skip_spaces()
        except Malformed:
            tape.give_up()


def _read_call(tape: Tape) -> Wait:
    """Reads a call after its first tag, and leaves it open. What stands before the separator is
    V3.1's name, or V3's "function", after which V3 has the name and a fence.
    """
    pieces: list[str] = []
    if not (yield from tape.copy_until((SEPARATOR,), pieces.append)):
        raise Malformed
    yield from tape.skip_spaces()
    is_fenced = (yield from tape.peek()) != "{"
    if is_fenced:
        pieces.clear()
        if not (yield from tape.copy_until((FENCE,), pieces.append)):
            raise Malformed
        yield from tape.read("json")
        yield from tape.skip_spaces()
    name = "".join(pieces).strip(SPACES)
    if not name or (yield from tape.peek()) != "{":
        raise Malformed
    tape.start_call(name)
    yield from value(tape, tape.write_arguments)
    yield from tape.skip_spaces()
    if is_fenced:
        yield from tape.read(FENCE)
        yield from tape.skip_spaces()
    yield from tape.read(CALL_END)


def write_v3(tools: Sequence[Tool], parallel: bool, literal: Literal) -> str:
    heads = [json.dumps(f"{tool.name}\n{FENCE}json\n") for tool in tools]
    calls = [
        f'{literal(CALL)} "function" {literal(SEPARATOR)} {head} {arguments_of(tool)} '
        f'"\\n{FENCE}" {literal(CALL_END)}'
        for head, tool in zip(heads, tools, strict=True)
    ]
    return _between(literal, calls, ' ("\\n" call)*' if parallel else "")


def write_v31(tools: Sequence[Tool], parallel: bool, literal: Literal) -> str:
    calls = [
        f"{literal(CALL)} {json.dumps(tool.name)} {literal(SEPARATOR)} "
        f"{arguments_of(tool)} {literal(CALL_END)}"
        for tool in tools
    ]
    return _between(literal, calls, " call*" if parallel else "")


def _between(literal: Literal, calls: list[str], again: str) -> str:
    return (
        f"calls: {literal(CALLS)} call{again} {literal(CALLS_END)}\n{alternatives('call', calls)}"
    )


DEEPSEEK_V3 = Dialect(name="deepseek_v3", markers=TAGS, read=read, write=write_v3)
DEEPSEEK_V31 = Dialect(name="deepseek_v31", markers=TAGS, read=read, write=write_v31)
