"""What a dialect is: how a family of models writes calls of tools, and what asks for such calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastgen_jax.dialects.tape import Tape, Wait
from fastgen_jax.grammar import closed

Literal = Callable[[str], str]
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Tool(NamedTuple):
    """A function that the model may call. parameters: the JSON schema of its arguments."""

    name: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How a family of models writes calls.

    Args:
        name: as --tool-call-parser gives it.
        markers: tags that must reach the reader even where the tokenizer has them as special
            tokens, which text usually hides.
        read: the format: reads an answer from a tape, given the request's tools.
        write: Lark rules of a call of each of these tools, with or without others after it;
            the first rule is named `calls`.
    """

    name: str
    markers: tuple[str, ...]
    read: Callable[[Tape, Sequence[Tool]], Wait]
    write: Callable[[Sequence[Tool], bool, Literal], str]


def alternatives(name: str, rules: Iterable[str]) -> str:
    """Lark rules name_0, name_1, ..., and the rule `name` that is any of them."""
    numbered = [(f"{name}_{i}", rule) for i, rule in enumerate(rules)]
    lines = [f"{name}: {' | '.join(number for number, _ in numbered)}"]
    return "\n".join([*lines, *(f"{number}: {rule}" for number, rule in numbered)])


def spell(text: str, markers: Iterable[str], literal: Literal) -> list[str]:
    """Lark for a text that has markers in it, part by part."""
    parts = [text]
    for marker in markers:
        pieces = (piece for part in parts for piece in _split(part, marker))
        parts = [piece for piece in pieces if piece]
    return [literal(part) if part in markers else json.dumps(part) for part in parts]


def _split(text: str, marker: str) -> list[str]:
    """The text, cut before and after the marker, wherever that is in it."""
    before, *others = text.split(marker)
    return [before, *(piece for other in others for piece in (marker, other))]


def free_text(name: str, end: str) -> str:
    """A Lark rule of any text up to what ends it first, and that: a quoted string or a token."""
    is_string = end.startswith('"')
    return f"{name}[suffix={end}]: /(?s:.*)/" if is_string else f"{name}: /(?s:.*)/ {end}"


def json_of(schema: Mapping[str, Any]) -> str:
    """Lark for JSON that the schema allows, compact, as chat templates write it."""
    return f"%json {json.dumps({**schema, 'x-guidance': COMPACT})}"


def arguments_of(tool: Tool) -> str:
    """Lark for the tool's arguments as one object. Where the schema lists members and says nothing
    of others there are none: models that are forced to call invent them.
    """
    return json_of(closed({"type": "object", **tool.parameters}))
