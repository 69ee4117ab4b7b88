"""Generation: the text side of one HTTP request. Filled by the service, emptied by the response.

What a slow reader has not taken is merged into one larger piece; its size is bounded by the output
length that the engine admitted.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np

from fastgen_jax.dialects import CallPart, CallStart, Event, Reader, Text, Thought
from fastgen_jax.engine.types import Output, TokenLogprobs
from fastgen_jax.server.attainment import Pace
from fastgen_jax.server.errors import ApiError
from fastgen_jax.server.limits import Account
from fastgen_jax.tokenizer import TextDelta, TextStream


class Voice(NamedTuple):
    """How the answers to one request are read.

    Args:
        make_reader: makes the reader of one sample; None: all of it is text.
        shown_ids: special tokens that the reader must see.
        max_calls: so many calls of tools are told, and no more; None: all.
        tells_text: not so where a grammar forces calls: text is then a call that was cut.
        is_silent: no token is told: the engine's one is dropped, for none was asked for. What is
            kept is an embedding.
        tells_prompt: the logprobs of the prompt's tokens come before those of the sample's.
    """

    make_reader: Callable[[], Reader] | None = None
    shown_ids: frozenset[int] = frozenset()
    max_calls: int | None = None
    tells_text: bool = True
    is_silent: bool = False
    tells_prompt: bool = False


PLAIN = Voice()
SILENT = Voice(is_silent=True)

Scored = tuple[int, TokenLogprobs | None]  # a token's id; nothing precedes a prompt's first one


class Taken(NamedTuple):
    """What came since it was taken last."""

    events: list[Event]
    ids: list[int]
    logprobs: list[Scored]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Text))


class Choice:
    """One sample: what it says, and tokens not taken yet. Finished once finish_reason is set."""

    __slots__ = (
        "_max_calls",
        "_n_prompt_left",
        "_n_unassigned",
        "_prompt_left",
        "_reader",
        "_tells_prompt",
        "_tells_text",
        "embedding",
        "finish_reason",
        "first_time",
        "index",
        "is_silent",
        "last_time",
        "n_calls",
        "n_reused",
        "n_thought_tokens",
        "n_tokens",
        "pace",
        "pending_events",
        "pending_ids",
        "pending_logprobs",
        "start_time",
        "stop_reason",
        "stream",
        "wants_logprobs",
    )  # fmt: skip

    def __init__(self, index: int, stream: TextStream, wants_logprobs: bool, voice: Voice = PLAIN):
        self.index = index
        self.stream = stream
        self.wants_logprobs = wants_logprobs
        self.embedding: np.ndarray | None = None
        self.n_tokens = 0
        self.n_thought_tokens = 0  # tokens after which more of a thought was known
        self.n_calls = 0
        self.n_reused = 0  # prompt tokens that came from the prefix cache
        self.start_time = 0.0  # time.monotonic() of its first step, its first and its newest token
        self.first_time = self.last_time = 0.0
        self.pace = Pace()
        self.pending_events: list[Event] = []
        self.pending_ids: list[int] = []
        self.pending_logprobs: list[Scored] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._reader = voice.make_reader() if voice.make_reader else None
        self._max_calls, self._tells_text = voice.max_calls, voice.tells_text
        self.is_silent, self._tells_prompt = voice.is_silent, voice.tells_prompt
        self._prompt_left: Iterator[Scored] = iter(())
        self._n_prompt_left = 0
        self._n_unassigned = 0  # newest tokens that may yet turn out to be of a thought

    def push(self, output: Output):
        """Takes in one event of the engine. INVARIANT: never called after finish_reason is set."""
        if self.is_silent:
            self.n_reused, self.embedding = output.n_reused, output.embedding
            reason = "length" if output.embedding is None else "stop"
            self.finish_reason = output.finish_reason and reason
            return
        delta = self.stream.push(output)
        if output.start_time:
            self.n_reused, self.start_time = output.n_reused, output.start_time
        if output.token_id is not None:
            self.n_tokens += 1
            self.pending_ids.append(output.token_id)
            if self.wants_logprobs and output.logprobs is not None:
                self.pending_logprobs.append((output.token_id, output.logprobs))
        events = self._read(delta)
        self._count_thoughts(events, n_new=output.token_id is not None)
        self.pending_events += filter(self._is_told, events)
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason

    def _read(self, delta: TextDelta) -> list[Event]:
        if self._reader is None:
            return [Text(delta.text)] if delta.text else []
        events = self._reader.feed(delta.text)
        return events if delta.finish_reason is None else events + self._reader.close()

    def _is_told(self, event: Event) -> bool:
        if not isinstance(event, CallStart | CallPart):
            return self._tells_text or not isinstance(event, Text)
        is_told = self._max_calls is None or event.index < self._max_calls
        self.n_calls += is_told and isinstance(event, CallStart)
        return is_told

    def _count_thoughts(self, events: list[Event], *, n_new: int):
        """What a token adds may be told later: tags, and a character's first bytes."""
        self._n_unassigned += n_new
        if any(isinstance(event, Thought) for event in events):
            self.n_thought_tokens += self._n_unassigned
        if events:
            self._n_unassigned = 0

    def follow(self, prompt: list[int], logprobs: Sequence[TokenLogprobs]):
        """Takes in the scores of the prompt that it goes on from, of all tokens but the first."""
        if self._tells_prompt:
            self._prompt_left = zip(prompt, itertools.chain([None], logprobs), strict=True)
            self._n_prompt_left = len(prompt)

    @property
    def has_pending(self) -> bool:
        return bool(self._n_prompt_left or self.pending_ids or self.pending_events)

    @property
    def n_pending_logprobs(self) -> int:
        return self._n_prompt_left + len(self.pending_logprobs)

    def take(self, limit: int | None = None) -> Taken:
        """The events since the last call, neighbours joined, and token ids and logprobs, `limit` at
        most of each.
        """
        logprobs = list(itertools.islice(self._prompt_left, limit))
        self._n_prompt_left -= len(logprobs)
        if limit is not None:  # an id and its logprobs come together
            limit -= len(logprobs)
        logprobs += self.pending_logprobs[:limit]
        taken = Taken(joined(self.pending_events), self.pending_ids[:limit], logprobs)
        self.pending_events = []
        del self.pending_ids[:limit], self.pending_logprobs[:limit]
        return taken


def joined(events: list[Event]) -> list[Event]:
    """The events, with neighbours of one kind, and of one call, as one."""
    if len(events) < 2:  # as it is while a reader keeps up
        return events
    runs = itertools.groupby(events, key=lambda event: (type(event), event[:-1]))
    return [
        run[0]._replace(**{run[0]._fields[-1]: "".join(event[-1] for event in run)})
        for run in (list(run) for _, run in runs)
    ]


class Generation:
    """All samples of one HTTP request: prompt i, sample j is choice i * n + j.

    It ends when every choice is finished, or with `error`. Only the event loop touches it.
    """

    def __init__(
        self,
        choices: list[Choice],
        prompts: list[list[int]],
        *,
        is_streaming: bool,
        max_tokens: int | None = None,
    ):
        self.choices = choices
        self.prompts = prompts
        self.max_tokens = max_tokens
        self.is_streaming = is_streaming
        self.arrival = time.monotonic()
        self.n_open = len(choices)
        self.error: ApiError | None = None
        self.request_id = ""  # as the client hears it
        self.request_ids: list[int] = []  # the engine's
        self.timers: list[asyncio.TimerHandle] = []
        self.first_token_timer: asyncio.TimerHandle | None = None
        self.account: Account | None = None  # whom its tokens are charged to
        self.prompt_logprobs: list[Sequence[TokenLogprobs]] = [()] * len(prompts)  # but the first's
        self._changed = asyncio.Event()

    @property
    def is_done(self) -> bool:
        return self.n_open == 0 or self.error is not None

    @property
    def n_samples(self) -> int:
        """Of each prompt."""
        return len(self.choices) // len(self.prompts)

    @property
    def n_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def n_reused_tokens(self) -> int:
        """Prompt tokens that the prefix cache saved each prompt's first sample."""
        return sum(choice.n_reused for choice in self.choices[:: self.n_samples])

    @property
    def n_tokens(self) -> int:
        return sum(choice.n_tokens for choice in self.choices)

    @property
    def n_pending_logprobs(self) -> int:
        return sum(choice.n_pending_logprobs for choice in self.choices)

    @property
    def n_thought_tokens(self) -> int:
        return sum(choice.n_thought_tokens for choice in self.choices)

    def prompt_of(self, choice: Choice) -> int:
        """The number of the prompt that it goes on from."""
        return choice.index // self.n_samples

    def score(self, choice: Choice, logprobs: Sequence[TokenLogprobs]):
        """Takes in the scores of a prompt, which the engine tells with its first sample."""
        i = self.prompt_of(choice)
        self.prompt_logprobs[i] = logprobs
        for sample in self.choices[i * self.n_samples : (i + 1) * self.n_samples]:
            sample.follow(self.prompts[i], logprobs)

    def notify(self):
        """Wakes the reader: at each change if it streams, else at the end."""
        if self.is_streaming or self.is_done:
            self._changed.set()

    @property
    def embeddings(self) -> list[np.ndarray]:
        """Of a request for them that has ended well: one per prompt."""
        assert all(choice.embedding is not None for choice in self.choices)
        return [cast(np.ndarray, choice.embedding) for choice in self.choices]

    async def changed(self):
        """Returns after the next change.

        Raises:
            ApiError: the request failed.
        """
        await self._changed.wait()
        self._changed.clear()
        if self.error is not None:
            raise self.error
