"""An answer on its way to becoming events: what arrived and is unread, what it turned into.

A format is a generator function over a Tape. It yields where it needs more text and is resumed when
there is some, or the end. Nothing is read twice, hence an answer costs time linear in its length,
however it is cut into pieces: an attempt at a call that fails becomes text, and reading goes on
where it failed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator
from typing import Any

from fastgen_jax.dialects.events import CallPart, CallStart, Event, Text, Thought

Wait = Generator[None, None, Any]  # of what it returns, a format's own annotations say the type
SPACES = " \t\r\n"


class Malformed(Exception):
    """What was begun is not a call, or the answer ended before it was one. Stays in this wing."""


class Reader:
    """Text in, events out. The joined events do not depend on where the text was cut.

    Args:
        read: the format: a generator function over the tape.
    """

    def __init__(self, read: Callable[[Tape], Wait]):
        self._tape = Tape()
        self._format = read(self._tape)
        next(self._format, None)

    def feed(self, text: str) -> list[Event]:
        """What is certain after this piece of the answer."""
        if text:
            self._tape.append(text)
            next(self._format, None)
        return self._tape.pop_events()

    def close(self) -> list[Event]:
        """What was held back, once the answer has ended."""
        self._tape.is_ended = True
        next(self._format, None)
        return self._tape.pop_events()


class Tape:
    """The unread text of an answer, and the events that were made of what was read.

    INVARIANT: every character that was read is in an event, or in the attempt, or is a character of
    the format around something that is in an event.
    """

    def __init__(self):
        self.is_ended = False
        self._unread = ""
        self._at = 0
        self._events: list[Event] = []
        self._attempt: list[str] | None = None  # all of it, until it is certain to be a call
        self._n_calls = 0

    def append(self, text: str) -> None:
        assert self._at == len(self._unread), "the format waits before it has read all"
        self._unread, self._at = text, 0

    def pop_events(self) -> list[Event]:
        """The new events; neighbours of a kind are joined."""
        runs = itertools.groupby(self._events, key=_kind)
        joined = [(kind, "".join(event[-1] for event in run)) for kind, run in runs]
        self._events = []
        return [kind(*index, text) for (kind, *index), text in joined if text]

    # --- reading

    def more(self) -> Wait:
        """Waits for a character. Returns False if the answer has ended."""
        while self._at == len(self._unread):
            if self.is_ended:
                return False
            yield
        return True

    def peek(self) -> Wait:
        """The next character. Raises Malformed at the end."""
        if not (yield from self.more()):
            raise Malformed
        return self._unread[self._at]

    def take(self) -> str:
        """The character that was peeked."""
        return self._take_to(self._at + 1)

    def literal(self, text: str) -> Wait:
        """Reads exactly this text, or raises Malformed before the first other character."""
        for expected in text:
            if (yield from self.peek()) != expected:
                raise Malformed
            self.take()

    def run(self, is_inside: Callable[[str, int], Any], write: Callable[[str], None]) -> Wait:
        """Copies characters while `is_inside(text, at)`, a pattern's match, is not empty."""
        while (yield from self.more()):
            match = is_inside(self._unread, self._at)
            if match.end() > self._at:
                write(self._take_to(match.end()))
            if self._at < len(self._unread):
                return

    def skip_spaces(self) -> Wait:
        while (yield from self.more()) and self._unread[self._at] in SPACES:
            self.take()

    def begins_with(self, *tags: str) -> Wait:
        """Whether one of the tags is next, perhaps after spaces; only then it is read."""
        self._attempt = []
        yield from self.skip_spaces()
        start = ""
        while start not in tags and any(tag.startswith(start) for tag in tags):
            if not (yield from self.more()):
                break
            start += self.take()
        if start not in tags:
            self._unread, self._at = "".join(self._attempt) + self._unread[self._at :], 0
        self._attempt = None
        return start in tags

    def until(self, *tags: str, kind: type[Text] | type[Thought] = Text) -> Wait:
        """Passes text on, up to the first of the tags. Returns the tag, which begins an attempt, or
        None at the end of the answer.

        Held back is what may belong to a tag: spaces before it, and its first characters.
        """
        spaces: list[str] = []
        start = ""  # of a tag, perhaps
        while (yield from self.more()):
            text = start + self._take_to(len(self._unread))
            at, tag = min(
                ((at, tag) for tag in tags if (at := text.find(tag)) >= 0),
                key=lambda found: (found[0], -len(found[1])),
                default=(len(text), ""),
            )
            n_certain = at if tag else len(text) - _n_doubtful(text, tags)
            words = text[:n_certain].rstrip(SPACES)
            if words:
                self.emit(kind("".join(spaces) + words))
                spaces = []
            spaces.append(text[len(words) : n_certain])
            start = text[n_certain:]
            if tag:
                self._at -= len(start) - len(tag)
                self._attempt = [*spaces, tag]
                return tag
        self.emit(kind("".join(spaces) + start))
        return None

    def _take_to(self, end: int) -> str:
        text = self._unread[self._at : end]
        self._at = end
        if self._attempt is not None:
            self._attempt.append(text)
        return text

    # --- writing

    def emit(self, event: Event) -> None:
        self._events.append(event)

    def start_call(self, name: str) -> None:
        """What was attempted is a call."""
        self._attempt = None
        self.emit(CallStart(self._n_calls, name))
        self._n_calls += 1

    def write_arguments(self, text: str) -> None:
        self.emit(CallPart(self._n_calls - 1, text))

    def drop(self) -> None:
        """What was attempted is the format's own, and no call."""
        self._attempt = None

    def give_up(self) -> None:
        """What was attempted is text, unless it is a call already."""
        if self._attempt is not None:
            self.emit(Text("".join(self._attempt)))
            self._attempt = None


def _kind(event: Event) -> tuple[Any, ...]:
    """What neighbouring events share that are pieces of one."""
    return (type(event), *event[:-1])


def _n_doubtful(text: str, tags: tuple[str, ...]) -> int:
    """Length of the longest end of the text that begins a tag."""
    longest = min(len(text), max(map(len, tags), default=1) - 1)
    ends = (text[len(text) - n :] for n in range(longest, 0, -1))
    return next((len(end) for end in ends if any(tag.startswith(end) for tag in tags)), 0)
