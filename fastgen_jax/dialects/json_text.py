"""Values on a tape, checked character by character and copied as JSON.

The arguments of a call are passed on before their end is known, so what is passed on must be sure
to begin valid JSON. Repaired are slips that models often make: control characters inside of strings
are escaped, and a comma before a closing bracket is left out.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from fastgen_jax.dialects.tape import Malformed, Tape, Wait, Write

NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
WORD = re.compile(r"[-+.0-9A-Za-z_]*")
MAX_NUMBER_LENGTH = 400  # Python refuses to read integers of 4,300 digits
PLAIN = re.compile(r'([^"\\\x00-\x1f\ud800-\udfff]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*')
CONTROL = re.compile(r"[\x00-\x1f\ud800-\udfff]*")  # and halves of pairs, of escapes in escapes
HEXADECIMAL = frozenset("0123456789abcdefABCDEF")


class Notation(NamedTuple):
    """How values are written. string: copies one as JSON; words: JSON of those that are none."""

    closers: Mapping[str, str]
    quotes: str
    string: Callable[[Tape, Write], Wait]
    words: Mapping[str, str]


def string(tape: Tape, write: Write) -> Wait:
    write((yield from tape.read('"')))
    mark = ""
    while mark != '"':
        yield from tape.run(PLAIN.match, write)
        yield from tape.run(CONTROL.match, lambda text: write(json.dumps(text)[1:-1]))
        mark = yield from tape.peek()
        if mark == '"':
            write(tape.take())
        elif mark == "\\":
            yield from _escape(tape, write)


def _escape(tape: Tape, write: Write) -> Wait:
    tape.take()
    letter = yield from tape.peek()
    if letter not in '"\\/bfnrtu':
        raise Malformed
    tape.take()
    digits = (yield from hexadecimal(tape, 4)) if letter == "u" else ""
    write(f"\\{letter}{digits}")


def hexadecimal(tape: Tape, n_digits: int) -> Wait:
    """Returns the digits."""
    digits = ""
    while len(digits) < n_digits:
        if (yield from tape.peek()) not in HEXADECIMAL:
            raise Malformed
        digits += tape.take()
    return digits


JSON = Notation(
    {"[": "]", "{": "}"}, '"', string, {"true": "true", "false": "false", "null": "null"}
)


def value(tape: Tape, write: Write, notation: Notation = JSON) -> Wait:
    """Copies one value, without the spaces around its tokens."""
    closers: list[str] = []  # of the containers that are open
    while True:
        yield from tape.skip_spaces()
        first = yield from tape.peek()
        if first in notation.closers:
            tape.take()
            write("{" if first == "{" else "[")
            closers.append(notation.closers[first])
        elif first in notation.quotes:
            yield from notation.string(tape, write)
        else:
            yield from _word(tape, write, notation)
        if not (yield from _next_member(tape, write, notation, closers, first)):
            return


def _next_member(
    tape: Tape, write: Write, notation: Notation, closers: list[str], before: str
) -> Wait:
    """Goes to where the next value stands, closing what ends before. Returns False if all does."""
    is_first = before in notation.closers
    while closers:
        yield from tape.skip_spaces()
        mark = yield from tape.peek()
        has_comma = mark == "," and not is_first
        if has_comma:
            tape.take()
            yield from tape.skip_spaces()
            mark = yield from tape.peek()
        if mark != closers[-1]:
            if not has_comma and not is_first:
                raise Malformed
            if has_comma:
                write(",")
            if closers[-1] == "}":
                yield from _key(tape, write, notation)
            return True
        tape.take()
        write("}" if closers.pop() == "}" else "]")
        is_first = False
    return False


def _key(tape: Tape, write: Write, notation: Notation) -> Wait:
    if (yield from tape.peek()) not in notation.quotes:
        raise Malformed
    yield from notation.string(tape, write)
    yield from colon(tape)
    write(":")


def colon(tape: Tape) -> Wait:
    yield from tape.skip_spaces()
    yield from tape.read(":")


def _word(tape: Tape, write: Write, notation: Notation) -> Wait:
    """Copies a number, or a word such as true."""
    text = yield from collect(tape, lambda tape, write: tape.run(WORD.match, write))
    is_number = len(text) <= MAX_NUMBER_LENGTH and NUMBER.fullmatch(text)
    if not is_number and text not in notation.words:
        raise Malformed
    write(notation.words.get(text, text))


def collect(tape: Tape, copy: Callable[[Tape, Write], Wait]) -> Wait:
    """Returns what `copy` writes, as one text."""
    pieces: list[str] = []
    yield from copy(tape, pieces.append)
    return "".join(pieces)


def json_in(text: str) -> str | None:
    """The JSON value that a text is, without spaces; None if it is none."""
    tape = Tape()
    tape.append(text)
    tape.is_ended = True
    try:
        found = _result(collect(tape, value))
    except Malformed:
        return None
    _result(tape.skip_spaces())
    return None if _result(tape.more()) else found


def _result(wait: Wait):
    """What a generator returns that has all of its text."""
    try:
        next(wait)
    except StopIteration as end:
        return end.value
    raise AssertionError("waits for text after the end")
