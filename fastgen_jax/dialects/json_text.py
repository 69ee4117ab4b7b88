"""JSON on a tape, checked character by character and copied as it comes.

The arguments of a call are passed on before their end is known, so what is passed on must be sure
to be a prefix of JSON. Control characters inside of strings, a common slip of models, are escaped.
"""

import json
import re
from collections.abc import Callable

from fastgen_jax.dialects.tape import Malformed, Tape, Wait

Write = Callable[[str], None]
SCALAR = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?|true|false|null")
SCALAR_CHARACTERS = re.compile(r"[-+.0-9A-Za-z]*")
MAX_SCALAR_LENGTH = 400  # of a number; Python refuses to read integers of 4,300 digits
PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
CONTROL = re.compile(r"[\x00-\x1f]")
HEXADECIMAL = frozenset("0123456789abcdefABCDEF")


def value(tape: Tape, write: Write) -> Wait:
    """Copies one JSON value, without the spaces around its tokens."""
    closers: list[str] = []  # of the containers that are open
    while True:
        yield from tape.skip_spaces()
        first = yield from tape.peek()
        if first in "{[":
            write(tape.take())
            closers.append("}" if first == "{" else "]")
            yield from tape.skip_spaces()
            is_empty = (yield from tape.peek()) == closers[-1]
            if not is_empty:
                yield from _key(tape, write, closers)
                continue
        elif first == '"':
            yield from string(tape, write)
        else:
            yield from _scalar(tape, write)
        if not (yield from _goes_on(tape, write, closers)):
            return


def _goes_on(tape: Tape, write: Write, closers: list[str]) -> Wait:
    """After a value: closes what ends here. Returns whether another value follows."""
    while closers:
        yield from tape.skip_spaces()
        mark = yield from tape.peek()
        if mark == ",":
            write(tape.take())
            yield from _key(tape, write, closers)
            return True
        if mark != closers[-1]:
            raise Malformed
        write(tape.take())
        closers.pop()
    return False


def _key(tape: Tape, write: Write, closers: list[str]) -> Wait:
    """Copies the key of the next member, if what is open is an object."""
    if closers[-1] == "}":
        yield from tape.skip_spaces()
        yield from string(tape, write)
        yield from colon(tape)
        write(":")


def colon(tape: Tape) -> Wait:
    yield from tape.skip_spaces()
    yield from tape.literal(":")


def string(tape: Tape, write: Write) -> Wait:
    yield from tape.literal('"')
    write('"')
    while True:
        yield from tape.run(PLAIN.match, write)
        mark = yield from tape.peek()
        if mark == '"':
            write(tape.take())
            return
        if mark == "\\":
            yield from _escape(tape, write)
        else:
            write(json.dumps(tape.take())[1:-1])


def _escape(tape: Tape, write: Write) -> Wait:
    tape.take()
    letter = yield from tape.peek()
    if letter not in '"\\/bfnrtu':
        raise Malformed
    escape = "\\" + tape.take()
    for _ in range(4 if letter == "u" else 0):
        if (yield from tape.peek()) not in HEXADECIMAL:
            raise Malformed
        escape += tape.take()
    write(escape)


def _scalar(tape: Tape, write: Write) -> Wait:
    text = yield from collect(tape, lambda tape, write: tape.run(SCALAR_CHARACTERS.match, write))
    if len(text) > MAX_SCALAR_LENGTH or not SCALAR.fullmatch(text):
        raise Malformed
    write(text)


def collect(tape: Tape, copy: Callable[[Tape, Write], Wait]) -> Wait:
    """What `copy` writes, as one text."""
    pieces: list[str] = []
    yield from copy(tape, pieces.append)
    return "".join(pieces)


def call_object(tape: Tape) -> Wait:
    """Reads {"name": ..., "arguments": {...}} as a call; the arguments may be "parameters", come
    first, be a string that holds JSON, null, or absent. Other members are read and ignored.
    """
    name, arguments, is_started = None, "{}", False
    yield from tape.literal("{")
    while True:
        yield from tape.skip_spaces()
        key = json.loads((yield from collect(tape, string)))
        yield from colon(tape)
        yield from tape.skip_spaces()
        if is_started:
            yield from value(tape, _ignore)
        elif key == "name":
            name = json.loads((yield from collect(tape, string)))
        elif key not in ("arguments", "parameters"):
            yield from value(tape, _ignore)
        elif name and (yield from tape.peek()) == "{":
            tape.start_call(name)
            yield from value(tape, tape.write_arguments)
            is_started = True
        else:
            arguments = _object_in((yield from collect(tape, value)))
        yield from tape.skip_spaces()
        if (yield from tape.peek()) != ",":
            break
        tape.take()
    yield from tape.literal("}")
    if not is_started:
        if not name:
            raise Malformed
        tape.start_call(name)
        tape.write_arguments(arguments)


def _object_in(text: str) -> str:
    """The object that a JSON value is, or that its string holds; null is one without members."""
    if text.startswith('"'):
        inner = Tape()
        inner.append(json.loads(text))
        inner.is_ended = True
        text = _result(collect(inner, value))
        if _result(inner.skip_spaces()) or _result(inner.more()):
            raise Malformed
    if text == "null":
        return "{}"
    if not text.startswith("{"):
        raise Malformed
    return text


def _result(wait: Wait):
    """What a format returns that has all of its text."""
    try:
        next(wait)
    except StopIteration as end:
        return end.value
    raise AssertionError("waits for text after the end")


def _ignore(_: str) -> None:
    pass
