"""<tool_call>{"name": ..., "arguments": {...}}</tool_call>: Hermes 2 and 3, Qwen 2.5 and 3."""

import json
from collections.abc import Sequence

from fastgen_jax.dialects.dialect import Dialect, Literal, Tool, alternatives, json_of
from fastgen_jax.dialects.json_text import call_object
from fastgen_jax.dialects.tape import Malformed, Tape, Wait

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def read(tape: Tape, tools: Sequence[Tool]) -> Wait:
    while (yield from tape.until(OPEN)):
        try:
            yield from tape.skip_spaces()
            yield from call_object(tape)
            yield from tape.skip_spaces()
            yield from tape.literal(CLOSE)
            yield from tape.skip_spaces()
        except Malformed:
            tape.give_up()


def write(tools: Sequence[Tool], parallel: bool, literal: Literal) -> str:
    rules = (object_of(tool, "arguments") for tool in tools)
    call = f'{literal(OPEN)} "\\n" object "\\n" {literal(CLOSE)}'
    again = ' ("\\n" call)*' if parallel else ""
    return f"calls: call{again}\ncall: {call}\n{alternatives('object', rules)}"


def object_of(tool: Tool, arguments: str) -> str:
    """Lark for the JSON object of a call."""
    head = f'{{"name": {json.dumps(tool.name)}, "{arguments}": '
    return f'{json.dumps(head)} {json_of(tool.parameters)} "}}"'


HERMES = Dialect(name="hermes", markers=(OPEN, CLOSE), read=read, write=write)
