"""An answer on its way to becoming events: what arrived and is unread, what it turned into.

A format is a generator function over a Tape. It yields where it needs more text and is resumed when
there is some, or the end. What was read is not read again, hence an answer costs time linear in its
length, however it is cut into pieces: an attempt at a call that fails becomes text, and reading
goes on where it failed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Generator
from typing import Any

from fastgen_jax.dialects.events import CallPart, CallStart, Event, Text, Thought

Wait = Generator[None, None, Any]  # of what it returns, docstrings say the type
Write = Callable[[str], None]
SPACES = " \t\r\n"
MAX_PIECE = 256  # what is unread may be looked through for each attempt in it
SPACE_RUN = re.compile(r"[ \t\r\n]*")


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
        for start in range(0, len(text), MAX_PIECE):
            self._tape.append(text[start : start + MAX_PIECE])
            next(self._format, None)
        return self._tape.pop_events()

    def close(self) -> list[Event]:
        """What was held back, once the answer has ended."""
        self._tape.is_ended = True
        next(self._format, None)
        return self._tape.pop_events()


class Tape:
    """The unread text of an answer, and the events that were made of what was read.

    INVARIANT: every character that was read is in an event, or in the attempt, or belongs to the
    format and not to what it says.
    """

    def __init__(self):
        self.is_ended = False
        self._unread = ""
        self._at = 0
        self._events: list[Event] = []
        self._attempt: list[str] | None = None  # what becomes text unless it turns out as expected
        self._n_calls = 0
        self._is_in_call = False

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
        """Returns the next character. Raises Malformed at the end."""
        if not (yield from self.more()):
            raise Malformed
        return self._unread[self._at]

    def take(self) -> str:
        """The character that was peeked."""
        return self._take_to(self._at + 1)

    def read(self, *texts: str) -> Wait:
        """Reads one of these texts, none of which begins another, and returns it. Raises Malformed
        before the first character that does not belong to one.
        """
        start = ""
        while start not in texts:
            start += yield from self.peek()
            if not any(text.startswith(start) for text in texts):
                raise Malformed
            self.take()
        return start

    def skip_spaces(self) -> Wait:
        yield from self.run(SPACE_RUN.match, _forget)

    def run(self, match: Callable[[str, int], Any], write: Write) -> Wait:
        """Copies characters as long as `match`, of a pattern for any number of them, takes them."""
        while (yield from self.more()):
            end = match(self._unread, self._at).end()
            write(self._take_to(end))
            if end < len(self._unread):
                return

    def copy_until(self, tags: tuple[str, ...], write: Write) -> Wait:
        """Copies text up to the first of the tags, and reads that. Returns the tag, or None at the
        end of the answer. Held back is what may begin a tag.
        """
        start = ""
        while (yield from self.more()):
            text = start + self._unread[self._at :]
            n_before, tag = _first(text, tags)
            self._take_to(len(self._unread) - len(text) + n_before + len(tag))
            if tag:
                write(text[:n_before])
                return tag
            n_certain = len(text) - _n_doubtful(text, tags)
            write(text[:n_certain])
            start = text[n_certain:]
        write(start)
        return None

    def until(self, *tags: str, kind: type[Text] | type[Thought] = Text) -> Wait:
        """Emits text up to the first of the tags, with which an attempt begins. Returns the tag, or
        None at the end. Spaces before a tag are the format's.
        """
        assert self._attempt is None, "an attempt goes on"
        spaces: list[str] = []

        def write(text: str) -> None:
            words = text.rstrip(SPACES)
            if words:
                self.emit(kind("".join(spaces) + words))
                spaces.clear()
            spaces.append(text[len(words) :])

        tag = yield from self.copy_until(tags, write)
        if tag is None:
            self.emit(kind("".join(spaces)))
        else:
            self._attempt = [*spaces, tag]
        return tag

    def begin(self, *tags: str) -> Wait:
        """Begins an attempt if one of the tags is next, perhaps after spaces, and reads that.
        Returns the tag, or None: then nothing was read.
        """
        assert self._attempt is None, "an attempt goes on"
        self._attempt = []
        yield from self.skip_spaces()
        start = ""
        while start not in tags and any(tag.startswith(start) for tag in tags):
            if not (yield from self.more()):
                break
            start += self.take()
        if start in tags:
            return start
        self._unread, self._at = "".join(self._attempt) + self._unread[self._at :], 0
        self._attempt = None
        return None

    def calls_in_list(self, read_one: Callable[[], Wait]) -> Wait:
        """Reads the rest of a list of calls after its bracket, and spaces after it.

        Args:
            read_one: reads a call and leaves it open.
        """
        mark = ","
        while mark == ",":
            yield from self.skip_spaces()
            yield from read_one()
            self.end_call()
            self.expect_more()
            yield from self.skip_spaces()
            mark = yield from self.read(",", "]")
        self.drop()
        yield from self.skip_spaces()

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
        """What was attempted is a call. From here on the attempt is what was read since the last
        arguments were written.
        """
        self._attempt = []
        self._is_in_call = True
        self.emit(CallStart(self._n_calls, name))
        self._n_calls += 1

    def write_arguments(self, text: str) -> None:
        """The next fragment. Once the answer has ended, an end that was not seen is not made up."""
        assert self._is_in_call and self._attempt is not None, "no call has begun"
        self._attempt.clear()
        if not self.is_ended:
            self.emit(CallPart(self._n_calls - 1, text))

    def end_call(self) -> None:
        """The call is complete, with all that the format has around it."""
        self._is_in_call = False
        self._attempt = None

    def expect_more(self, *texts: str) -> None:
        """What is read from here on is an attempt, as are these texts that were read before."""
        assert self._attempt is None, "an attempt goes on"
        self._attempt = [*texts]

    def drop(self) -> None:
        """What was attempted belongs to the format, and is no call."""
        self._attempt = None

    def give_up(self) -> None:
        """What was attempted is text. But what is missing from a call whose answer has ended would
        not have been text, nor is what came of it.
        """
        if self._is_in_call and self.is_ended:
            self._at = len(self._unread)
        else:
            for text in self._attempt or ():
                self.emit(Text(text))
        self.end_call()


def _forget(_: str) -> None:
    pass


def _kind(event: Event) -> tuple[Any, ...]:
    """What neighbouring events share that are pieces of one."""
    return (type(event), *event[:-1])


def _first(text: str, tags: tuple[str, ...]) -> tuple[int, str]:
    """Where the first tag begins, and the longest there; else the end, and no tag."""
    found = [(at, -len(tag), tag) for tag in tags if (at := text.find(tag)) >= 0]
    at, _, tag = min(found, default=(len(text), 0, ""))
    return at, tag


def _n_doubtful(text: str, tags: tuple[str, ...]) -> int:
    """Length of the longest end of the text that begins a tag."""
    longest = min(len(text), max(map(len, tags), default=1) - 1)
    ends = (text[len(text) - n :] for n in range(longest, 0, -1))
    return next((len(end) for end in ends if any(tag.startswith(end) for tag in tags)), 0)
