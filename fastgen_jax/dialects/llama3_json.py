"""{"name": ..., "parameters": {...}} and nothing else, perhaps after <|python_tag|>: Llama 3.

Without the tag, JSON is a call only if the answer begins with it and it names one of the tools.
"""

from collections.abc import Sequence

from fastgen_jax.dialects.dialect import Dialect, Literal, Tool
from fastgen_jax.dialects.json_calls import read_call, write_call
from fastgen_jax.dialects.tape import Malformed, Tape, Wait

TAG = "<|python_tag|>"


def read(tape: Tape, tools: Sequence[Tool]) -> Wait:
    tag = yield from tape.begin(TAG, "{")
    while tag or (tag := (yield from tape.until(TAG))):
        try:
            if tag == TAG:
                yield from tape.skip_spaces()
                yield from tape.read("{")
            yield from read_call(tape, None if tag == TAG else {tool.name for tool in tools})
            tape.end_call()
            yield from _read_others(tape)
        except Malformed:
            tape.give_up()
        tag = None


def _read_others(tape: Tape) -> Wait:
    """Reads the calls that follow the first, each after a semicolon."""
    yield from tape.skip_spaces()
    while (yield from tape.begin(";")):
        yield from tape.skip_spaces()
        yield from tape.read("{")
        yield from read_call(tape)
        tape.end_call()
        yield from tape.skip_spaces()


def write(tools: Sequence[Tool], parallel: bool, literal: Literal) -> str:
    again = ' ("; " object)*' if parallel else ""
    return f"calls: object{again}\n{write_call(tools, 'parameters')}"


LLAMA3_JSON = Dialect(name="llama3_json", markers=(TAG,), read=read, write=write)
