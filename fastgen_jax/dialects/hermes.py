"""<tool_call>{"name": ..., "arguments": {...}}</tool_call>: Hermes, Qwen 2.5 and 3, Granite 4."""

from collections.abc import Sequence

from fastgen_jax.dialects.dialect import Dialect, Literal, Tool
from fastgen_jax.dialects.json_calls import read_call, write_call
from fastgen_jax.dialects.tape import Malformed, Tape, Wait

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def read(tape: Tape, tools: Sequence[Tool]) -> Wait:
    while (yield from tape.until(OPEN)):
        try:
            yield from tape.skip_spaces()
            yield from tape.read("{")
            yield from read_call(tape)
            yield from tape.skip_spaces()
            yield from tape.read(CLOSE)
            tape.end_call()
            yield from tape.skip_spaces()
        except Malformed:
            tape.give_up()


def write(tools: Sequence[Tool], parallel: bool, literal: Literal) -> str:
    again = ' ("\\n" call)*' if parallel else ""
    call = f'{literal(OPEN)} "\\n" object "\\n" {literal(CLOSE)}'
    return f"calls: call{again}\ncall: {call}\n{write_call(tools)}"


HERMES = Dialect(name="hermes", markers=(OPEN, CLOSE), read=read, write=write)
