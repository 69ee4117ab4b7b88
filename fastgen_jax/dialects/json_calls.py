"""Calls that are JSON objects, {"name": ..., "arguments": {...}}, alone or in a list."""

import json
from collections.abc import Collection, Sequence

from fastgen_jax.dialects.dialect import Tool, alternatives, arguments_of
from fastgen_jax.dialects.json_text import collect, colon, json_in, string, value
from fastgen_jax.dialects.tape import Malformed, Tape, Wait


def read_call(tape: Tape, names: Collection[str] | None = None) -> Wait:
    """Reads a call after its first brace, and leaves it open. The arguments may be called
    parameters, come first, be a string that holds JSON, null, or absent. Other members are read and
    ignored.

    Args:
        names: of the only functions that count; None: all do.
    """
    name, arguments, is_started, mark = "", "{}", False, ","
    while mark == ",":
        yield from tape.skip_spaces()
        key = json.loads((yield from collect(tape, string)))
        yield from colon(tape)
        yield from tape.skip_spaces()
        if key == "name" and not name:
            name = json.loads((yield from collect(tape, string)))
            if not name.isprintable() or (names is not None and name not in names):
                raise Malformed
        elif key in ("arguments", "parameters") and not is_started:
            if name and (yield from tape.peek()) == "{":
                tape.start_call(name)
                yield from value(tape, tape.write_arguments)
                is_started = True
            else:
                arguments = _object_in((yield from collect(tape, value)))
        else:
            yield from value(tape, _ignore)
        yield from tape.skip_spaces()
        mark = yield from tape.read(",", "}")
    if not name:
        raise Malformed
    if not is_started:
        tape.start_call(name)
        tape.write_arguments(arguments)


def read_calls(tape: Tape) -> Wait:
    """Reads a list of calls, and spaces after it."""

    def read_one() -> Wait:
        yield from tape.read("{")
        yield from read_call(tape)

    yield from tape.read("[")
    yield from tape.calls_in_list(read_one)


def _object_in(text: str) -> str:
    """The object that JSON is, or that its string holds; null is one without members."""
    held = json_in(json.loads(text)) if text.startswith('"') else text
    if held == "null":
        return "{}"
    if held is None or not held.startswith("{"):
        raise Malformed
    return held


def _ignore(_: str) -> None:
    pass


def write_call(tools: Sequence[Tool], arguments: str = "arguments") -> str:
    """Lark rules of `object`, a call of one of the tools."""
    heads = [f'{{"name": {json.dumps(tool.name)}, "{arguments}": ' for tool in tools]
    objects = [
        f'{json.dumps(head)} {arguments_of(tool)} "}}"'
        for head, tool in zip(heads, tools, strict=True)
    ]
    return alternatives("object", objects)


def write_calls(tools: Sequence[Tool], parallel: bool) -> str:
    """Lark rules of `list`, calls in brackets, and of what it needs."""
    again = ' (", " object)*' if parallel else ""
    return f'list: "[" object{again} "]"\n{write_call(tools)}'
