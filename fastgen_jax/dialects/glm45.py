"""<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>: GLM 4.5."""

import json
import re
from collections.abc import Sequence

from fastgen_jax.dialects.dialect import Dialect, Literal, Tool, spell
from fastgen_jax.dialects.json_text import collect
from fastgen_jax.dialects.tape import Malformed, Tape, Wait
from fastgen_jax.dialects.xml_text import Parameters, read_argument, write_functions

OPEN, CLOSE = "<tool_call>", "</tool_call>"
KEY, KEY_END = "<arg_key>", "</arg_key>"
VALUE, VALUE_END = "<arg_value>", "</arg_value>"
NAME = re.compile(r"[^<>{\s]*")


def read(tape: Tape, tools: Sequence[Tool]) -> Wait:
    by_name = {tool.name: Parameters(tool) for tool in tools}
    while (yield from tape.until(OPEN)):
        try:
            yield from tape.skip_spaces()
            name = yield from collect(tape, lambda tape, write: tape.run(NAME.match, write))
            yield from tape.skip_spaces()
            tag = yield from tape.read(KEY, CLOSE)
            if not name:
                raise Malformed
            tape.start_call(name)
            yield from _read_arguments(tape, by_name.get(name, Parameters(None)), tag)
            tape.end_call()
            yield from tape.skip_spaces()
        except Malformed:
            tape.give_up()


def _read_arguments(tape: Tape, parameters: Parameters, tag: str) -> Wait:
    tape.write_arguments("{")
    separator = ""
    while tag == KEY:
        pieces: list[str] = []
        if not (yield from tape.copy_until((KEY_END,), pieces.append)):
            raise Malformed
        key = "".join(pieces)
        yield from tape.skip_spaces()
        yield from tape.read(VALUE)
        tape.write_arguments(f"{separator}{json.dumps(key)}:")
        yield from read_argument(tape, parameters.kinds(key), (VALUE_END,))
        separator = ","
        yield from tape.skip_spaces()
        tag = yield from tape.read(KEY, CLOSE)
    tape.write_arguments("}")


def write(tools: Sequence[Tool], parallel: bool, literal: Literal) -> str:
    again = ' ("\\n" call)*' if parallel else ""
    call = f"{literal(OPEN)} function {literal(CLOSE)}"
    functions = write_functions(
        tools,
        function="NAME\n",
        argument=f"{KEY}NAME{KEY_END}\n{VALUE}",
        margin="",
        end=VALUE_END,
        spelled=lambda text: spell(text, TAGS, literal),
    )
    return f"calls: call{again}\ncall: {call}\n{functions}"


TAGS = (OPEN, CLOSE, KEY, KEY_END, VALUE, VALUE_END)
GLM45 = Dialect(name="glm45", markers=TAGS, read=read, write=write)
