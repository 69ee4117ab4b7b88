"""What a model's answer says, piece by piece: text, thoughts, calls of tools."""

from typing import NamedTuple


class Text(NamedTuple):
    """A piece of what the user shall read."""

    text: str


class Thought(NamedTuple):
    """A piece of what the model thought before it answered."""

    text: str


class CallStart(NamedTuple):
    """A call of a tool begins. index: of the answer's calls, from 0."""

    index: int
    name: str


class CallPart(NamedTuple):
    """A fragment of the call's arguments; all of them joined are the text of a JSON object, unless
    the answer was cut or went wrong inside of the call.
    """

    index: int
    arguments: str


Event = Text | Thought | CallStart | CallPart
