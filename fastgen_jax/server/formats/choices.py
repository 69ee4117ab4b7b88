"""Answers that are lists of choices: what completions and chat completions share.

Streamed chunks are joined from encoded pieces.
"""

import time
import uuid
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import orjson

from fastgen_jax.engine.types import TokenLogprobs
from fastgen_jax.server.errors import ApiError
from fastgen_jax.server.formats import format
from fastgen_jax.server.formats.format import DONE, Format, event, prompt_of
from fastgen_jax.server.generation import Choice, Generation
from fastgen_jax.tokenizer import Tokenizer

LOGPROB_FLOOR = -9999.0  # JSON has no infinity
PIECE_ENTRIES = 2000  # logprobs whose events are built in one go
PIECE_TOKENS = 100  # of them in one event


class ChoicesFormat(Format):
    """Holds what every chunk of one answer shares.

    Args:
        object, chunk_object: what the answer, and each chunk of its stream, say that they are.
        no_delta: what `_delta` makes of no text, after the first.
        n_echoed: characters of the prompts with which a sample of each begins.
    """

    def __init__(
        self,
        *,
        id_prefix: str,
        object: str,
        chunk_object: str,
        no_delta: bytes,
        n_echoed: int = 0,
        model: str,
        tokenizer: Tokenizer,
        include_usage: bool = False,
        continuous_usage: bool = False,
        logprobs: int | None = None,
        tokens_as_ids: bool = False,
        return_token_ids: bool = False,
    ):
        self._no_delta = no_delta
        self._n_echoed = n_echoed
        self.tokenizer = tokenizer
        self.include_usage = include_usage
        self.continuous_usage = continuous_usage
        self.logprobs = logprobs
        self.tokens_as_ids = tokens_as_ids
        self.return_token_ids = return_token_ids
        self._started: set[int] = set()  # choices whose first chunk is out
        self._ended: set[int] = set()  # choices whose finish_reason is out
        self._fields = {
            "id": id_prefix + uuid.uuid4().hex,
            "object": object,
            "created": int(time.time()),
            "model": model,
        }
        chunk_fields = self._fields | {"object": chunk_object}
        self._head = b"data: " + orjson.dumps(chunk_fields)[:-1] + b',"choices":['

    def chunks(self, generation: Generation) -> Iterator[bytes]:
        usage = b""
        if self.continuous_usage:
            usage = b',"usage":' + orjson.dumps(format.usage_of(generation))
        elif self.include_usage:
            usage = b',"usage":null'
        events: list[bytes] = []
        n_left = PIECE_ENTRIES
        for choice in generation.choices:
            while choice.has_pending or self._owes_end(choice):
                n_left -= len(choice.pending_logprobs[:PIECE_TOKENS]) * (1 + (self.logprobs or 0))
                events.append(self._chunk(choice, generation, usage))
                if n_left <= 0:
                    yield b"".join(events)
                    events, n_left = [], PIECE_ENTRIES
        if any(events):
            yield b"".join(events)

    def end(self, generation: Generation) -> bytes:
        if not self.include_usage:
            return DONE
        usage = orjson.dumps(format.usage_of(generation))
        return self._head + b'],"usage":' + usage + b"}\n\n" + DONE

    def error(self, error: ApiError) -> bytes:
        return event(error.body())

    def result(self, generation: Generation) -> bytes:
        """Built choice by choice, so that other threads run in between."""
        choices = [orjson.dumps(self._final(c, generation)) for c in generation.choices]
        head, usage = orjson.dumps(self._fields)[:-1], orjson.dumps(format.usage_of(generation))
        return b"".join((head, b',"choices":[', b",".join(choices), b'],"usage":', usage, b"}"))

    def n_entries(self, generation: Generation) -> int:
        n_tokens = generation.n_tokens * ((self.logprobs or 0) + 1)
        n_repeated = self._n_echoed + self.return_token_ids * generation.n_prompt_tokens
        return n_tokens + n_repeated * (len(generation.choices) // len(generation.prompts))

    @abstractmethod
    def _delta(self, choice: Choice, generation: Generation, text: str, is_first: bool) -> bytes:
        """The member of a chunk's choice that holds its text."""

    @abstractmethod
    def _content(self, choice: Choice, generation: Generation, text: str) -> dict[str, Any]:
        """The members of an answer's choice that hold its text."""

    @abstractmethod
    def _logprob_entries(
        self, choice: Choice, pairs: list[tuple[int, TokenLogprobs]]
    ) -> dict[str, Any]:
        """Token ids and their logprobs, as this API shows them."""

    def _owes_end(self, choice: Choice) -> bool:
        return choice.finish_reason is not None and choice.index not in self._ended

    def _chunk(self, choice: Choice, generation: Generation, usage: bytes) -> bytes:
        is_first = choice.index not in self._started
        self._started.add(choice.index)
        text, ids, entries = choice.take(PIECE_TOKENS if choice.wants_logprobs else None)
        delta = self._delta(choice, generation, text, is_first)
        finish_reason = None if choice.has_pending else choice.finish_reason
        if finish_reason is not None:
            self._ended.add(choice.index)
        elif delta == self._no_delta and not (entries or self.return_token_ids):
            return b""  # a piece of a character, or what may become a stop string
        logprobs = self._logprobs(choice, ids, entries)
        extra = b""
        if self.return_token_ids:
            extra = b',"token_ids":' + orjson.dumps(ids)
        return b"".join((
            self._head, b'{"index":%d,' % choice.index, delta,
            b',"logprobs":', b"null" if logprobs is None else orjson.dumps(logprobs),
            b',"finish_reason":', orjson.dumps(finish_reason),
            b',"stop_reason":', orjson.dumps(finish_reason and choice.stop_reason),
            extra, b"}]", usage, b"}\n\n",
        ))  # fmt: skip

    def _final(self, choice: Choice, generation: Generation) -> dict[str, Any]:
        text, ids, entries = choice.take()
        fields = {"index": choice.index} | self._content(choice, generation, text)
        fields["logprobs"] = self._logprobs(choice, ids, entries)
        fields["finish_reason"] = choice.finish_reason
        fields["stop_reason"] = choice.stop_reason
        if self.return_token_ids:
            fields["token_ids"] = ids
            fields["prompt_token_ids"] = generation.prompts[prompt_of(choice, generation)]
        return fields

    def _logprobs(
        self, choice: Choice, ids: list[int], entries: list[TokenLogprobs]
    ) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        return self._logprob_entries(choice, list(zip(ids, entries, strict=False)))

    def _token_text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.tokens_as_ids else self.tokenizer.token_text(token_id)
