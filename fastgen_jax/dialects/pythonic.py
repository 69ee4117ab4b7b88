"""[f(a=1, b="x"), g()], as Python is written: Llama 4, ToolACE, perhaps after <|python_start|>.

Without the tag, a list is calls only if the answer begins with it and it names the tools.
"""

import json
import re
from collections.abc import Collection, Sequence
from functools import partial
from itertools import chain

from fastgen_jax.dialects.dialect import Dialect, Literal, Tool, alternatives, json_of
from fastgen_jax.dialects.json_text import JSON, Notation, collect, hexadecimal, value
from fastgen_jax.dialects.tape import Malformed, Tape, Wait, Write
from fastgen_jax.dialects.xml_text import Parameters

START, END = "<|python_start|>", "<|python_end|>"
NAME = re.compile(r"[\w.-]*")
PLAIN = {'"': re.compile(r'[^"\\]*'), "'": re.compile(r"[^'\\]*")}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0"}
ESCAPES |= {"\\": "\\", "'": "'", '"': '"', "/": "/"}  # the last one is JSON's
N_DIGITS = {"x": 2, "u": 4, "U": 8}


def string(tape: Tape, write: Write) -> Wait:
    quote = yield from tape.read(*PLAIN)
    write('"')
    while True:
        yield from tape.run(
            PLAIN[quote].match, lambda text: write(json.dumps(text, ensure_ascii=False)[1:-1])
        )
        if (yield from tape.read(quote, "\\")) == quote:
            write('"')
            return
        write((yield from _escape(tape)))


def _escape(tape: Tape) -> Wait:
    """Returns JSON of what follows a backslash; of unknown escapes Python keeps it."""
    letter = yield from tape.peek()
    tape.take()
    if letter not in N_DIGITS:
        return json.dumps(ESCAPES.get(letter, "" if letter == "\n" else f"\\{letter}"))[1:-1]
    code = int((yield from hexadecimal(tape, N_DIGITS[letter])), 16)
    if code > 0x10FFFF:
        raise Malformed
    return json.dumps(chr(code))[1:-1]  # halves of a pair meet in the JSON


PYTHON = Notation(
    closers={**JSON.closers, "(": ")"},
    quotes="\"'",
    string=string,
    words={**JSON.words, "True": "true", "False": "false", "None": "null"},
)


def read(tape: Tape, tools: Sequence[Tool]) -> Wait:
    names = {tool.name for tool in tools}
    tag = yield from tape.begin(START, "[")
    while tag or (tag := (yield from tape.until(START))):
        try:
            if tag == START:
                yield from tape.skip_spaces()
                yield from tape.read("[")
            yield from tape.calls_in_list(partial(_read_call, tape, names))
            if (yield from tape.begin(END)):
                tape.drop()
            yield from tape.skip_spaces()
        except Malformed:
            tape.give_up()
        tag = None


def _read_call(tape: Tape, names: Collection[str]) -> Wait:
    name = yield from _name(tape)
    if name not in names:
        raise Malformed
    yield from tape.read("(")
    tape.start_call(name)
    yield from _read_arguments(tape)


def _name(tape: Tape) -> Wait:
    return (yield from collect(tape, lambda tape, write: tape.run(NAME.match, write)))


def _read_arguments(tape: Tape) -> Wait:
    tape.write_arguments("{")
    separator = ""
    yield from tape.skip_spaces()
    while (yield from tape.peek()) != ")":
        name = yield from _name(tape)
        yield from tape.skip_spaces()
        yield from tape.read("=")
        tape.write_arguments(f"{separator}{json.dumps(name)}:")
        yield from value(tape, tape.write_arguments, PYTHON)
        separator = ","
        yield from tape.skip_spaces()
        if (yield from tape.peek()) != ",":
            break
        tape.take()
        yield from tape.skip_spaces()
    yield from tape.read(")")
    tape.write_arguments("}")


def write(tools: Sequence[Tool], parallel: bool, literal: Literal) -> str:
    again = ' (", " call)*' if parallel else ""
    calls, rules = zip(*map(_write_call, range(len(tools)), tools), strict=True)
    lines = [f'calls: "[" call{again} "]"', alternatives("call", calls), *chain(*rules)]
    return "\n".join(lines)


def _write_call(index: int, tool: Tool) -> tuple[str, list[str]]:
    """Lark for a call of the tool, and the rules of its arguments: the required ones, and then, in
    the schema's order, as many of the others as the model likes.
    """
    parameters = Parameters(tool)
    names = sorted(parameters.properties, key=lambda name: name not in parameters.required)
    n_required = sum(name in parameters.required for name in names)
    rules = []
    for i, name in enumerate(names):
        argument = f"{json.dumps(f'{name}=')} {json_of(parameters.schema(name))}"
        next_one = f'(", " argument_{index}_{i + 1}){"" if i + 1 < n_required else "?"}'
        rules.append(f"argument_{index}_{i}: {argument} {next_one if i + 1 < len(names) else ''}")
    first = f"argument_{index}_0{'' if n_required else '?'}" if names else ""
    return f'{json.dumps(tool.name + "(")} {first} ")"', rules


PYTHONIC = Dialect(name="pythonic", markers=(START, END), read=read, write=write)
