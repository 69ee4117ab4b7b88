"""<tool_call><function=name><parameter=key>value</parameter></function></tool_call>: Qwen 3 Coder.

The outer tags are often forgotten by these models; then the function must be one of the tools.
"""

import json
import re
from collections.abc import Sequence

from fastgen_jax.dialects.dialect import Dialect, Literal, Tool
from fastgen_jax.dialects.json_text import collect
from fastgen_jax.dialects.tape import Malformed, Tape, Wait
from fastgen_jax.dialects.xml_text import Parameters, read_argument, write_functions

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
NAME = re.compile(r"[^<>\n]*")


def read(tape: Tape, tools: Sequence[Tool]) -> Wait:
    by_name = {tool.name: Parameters(tool) for tool in tools}
    while tag := (yield from tape.until(OPEN, FUNCTION)):
        try:
            if tag == OPEN:
                yield from tape.skip_spaces()
                yield from tape.read(FUNCTION)
            name = yield from _name(tape)
            if tag == FUNCTION and name not in by_name:
                raise Malformed
            tape.start_call(name)
            yield from _read_arguments(tape, by_name.get(name, Parameters(None)))
            yield from tape.skip_spaces()
            if tag == OPEN:
                yield from tape.read(CLOSE)
            tape.end_call()
            if tag == FUNCTION and (yield from tape.begin(CLOSE)):
                tape.drop()
            yield from tape.skip_spaces()
        except Malformed:
            tape.give_up()


def _name(tape: Tape) -> Wait:
    """Returns what stands before the end of the tag."""
    name = yield from collect(tape, lambda tape, write: tape.run(NAME.match, write))
    if not name:
        raise Malformed
    yield from tape.read(">")
    return name


def _read_arguments(tape: Tape, parameters: Parameters) -> Wait:
    tape.write_arguments("{")
    separator = ""
    yield from tape.skip_spaces()
    while (yield from tape.read(PARAMETER, FUNCTION_END)) == PARAMETER:
        key = yield from _name(tape)
        if (yield from tape.peek()) == "\n":
            tape.take()
        tape.write_arguments(f"{separator}{json.dumps(key)}:")
        closings = (f"\n{PARAMETER_END}", PARAMETER_END)
        yield from read_argument(tape, parameters.kinds(key), closings)
        separator = ","
        yield from tape.skip_spaces()
    tape.write_arguments("}")


def write(tools: Sequence[Tool], parallel: bool, literal: Literal) -> str:
    again = ' ("\\n" call)*' if parallel else ""
    call = f'{literal(OPEN)} "\\n" function "{FUNCTION_END}" "\\n" {literal(CLOSE)}'
    functions = write_functions(
        tools,
        function=f"{FUNCTION}NAME>\n",
        argument=f"{PARAMETER}NAME>\n",
        margin="\n",
        end=PARAMETER_END,
        spelled=lambda text: [json.dumps(text)],
    )
    return f"calls: call{again}\ncall: {call}\n{functions}"


QWEN3_CODER = Dialect(name="qwen3_coder", markers=(OPEN, CLOSE), read=read, write=write)
