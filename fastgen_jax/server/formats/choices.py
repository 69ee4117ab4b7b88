"""Answers that are lists of choices: what completions and chat completions share.

Chunks and answers are joined from encoded pieces, none of which takes long to build.
"""

import itertools
import time
import uuid
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from fastgen_jax.engine.types import TokenLogprobs
from fastgen_jax.server.errors import ApiError
from fastgen_jax.server.formats import format
from fastgen_jax.server.formats.format import DONE, Format, event
from fastgen_jax.server.generation import Choice, Generation, Scored, Taken
from fastgen_jax.tokenizer import Tokenizer

LOGPROB_FLOOR = -9999.0  # JSON has no infinity
PIECE_ENTRIES = 2000  # logprobs whose events are built in one go
PIECE_TOKENS = 100  # of them in one event
NOTHING = Taken([], [], [])


class ChoicesFormat(Format):
    """Holds what every chunk of one answer shares.

    Args:
        object, chunk_object: what the answer, and each chunk of its stream, say that they are.
        no_delta: the delta of a chunk that has nothing to say.
        logprobs_end: what closes the object that holds logprobs.
        n_echoed: characters of the prompts with which a sample of each begins.
        prompt_logprobs: rivals told of each token of the prompts; None: they are not told of.
    """

    def __init__(
        self,
        *,
        id_prefix: str,
        object: str,
        chunk_object: str,
        no_delta: bytes,
        logprobs_end: bytes = b"}",
        n_echoed: int = 0,
        model: str,
        tokenizer: Tokenizer,
        include_usage: bool = False,
        continuous_usage: bool = False,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        skip_special_tokens: bool = True,
        tokens_as_ids: bool = False,
        return_token_ids: bool = False,
    ):
        self._no_delta = no_delta
        self._logprobs_end = logprobs_end
        self._n_echoed = n_echoed
        self.tokenizer = tokenizer
        self.include_usage = include_usage
        self.continuous_usage = continuous_usage
        self.logprobs = logprobs
        self.prompt_logprobs = prompt_logprobs
        self.skip_special_tokens = skip_special_tokens
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
                n_logprobs = min(choice.n_pending_logprobs, PIECE_TOKENS)
                n_left -= n_logprobs * (1 + (self.logprobs or 0))
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
        more = self._of_prompts(generation)
        return b"".join(
            (head, b',"choices":[', b",".join(choices), b'],"usage":', usage, more, b"}")
        )

    def n_entries(self, generation: Generation) -> int:
        n_entries = generation.n_tokens
        n_entries += generation.n_pending_logprobs * ((self.logprobs or 0) + 1)
        n_repeated = self._n_echoed + self.return_token_ids * generation.n_prompt_tokens
        if self.prompt_logprobs is not None:
            n_repeated += generation.n_prompt_tokens * (self.prompt_logprobs + 1)
        return n_entries + n_repeated * generation.n_samples

    @abstractmethod
    def _deltas(
        self, choice: Choice, generation: Generation, taken: Taken, is_first: bool
    ) -> list[bytes]:
        """The members of a chunk's choice that hold what is new, each of a chunk of its own."""

    @abstractmethod
    def _content(self, choice: Choice, generation: Generation, taken: Taken) -> dict[str, Any]:
        """The members of an answer's choice that hold what it says."""

    @abstractmethod
    def _finish_reason(self, choice: Choice) -> str | None:
        """Why the choice ended, as this API says it."""

    @abstractmethod
    def _logprob_columns(
        self, choice: Choice, generation: Generation, logprobs: list[Scored]
    ) -> dict[str, list]:
        """The next tokens and their logprobs, in lists as this API shows them."""

    def _of_prompts(self, generation: Generation) -> bytes:
        """Further members of an answer, which tell of the prompts."""
        return b""

    def _owes_end(self, choice: Choice) -> bool:
        return choice.finish_reason is not None and choice.index not in self._ended

    def _chunk(self, choice: Choice, generation: Generation, usage: bytes) -> bytes:
        """The events of what is new in one choice; none for a piece of a character, or what may
        become a stop string or a tag.
        """
        is_first = choice.index not in self._started
        self._started.add(choice.index)
        taken = choice.take(PIECE_TOKENS if choice.wants_logprobs else None)
        deltas = self._deltas(choice, generation, taken, is_first)
        is_last = choice.finish_reason is not None and not choice.has_pending
        if is_last:
            self._ended.add(choice.index)
        if not deltas and (is_last or taken.logprobs or self.return_token_ids):
            deltas = [self._no_delta]
        return b"".join(
            self._event(
                choice,
                generation,
                delta,
                usage,
                taken if i == 0 else NOTHING,
                is_last=is_last and i == len(deltas) - 1,
            )
            for i, delta in enumerate(deltas)
        )

    def _event(
        self,
        choice: Choice,
        generation: Generation,
        delta: bytes,
        usage: bytes,
        taken: Taken,
        *,
        is_last: bool,
    ) -> bytes:
        extra = b""
        if self.return_token_ids:
            extra = b',"token_ids":' + orjson.dumps(taken.ids)
        return b"".join((
            self._head, b'{"index":%d,' % choice.index, delta,
            b',"logprobs":', self._logprobs(choice, generation, [taken.logprobs]),
            b',"finish_reason":', orjson.dumps(self._finish_reason(choice) if is_last else None),
            b',"stop_reason":', orjson.dumps(choice.stop_reason if is_last else None),
            extra, b"}]", usage, b"}\n\n",
        ))  # fmt: skip

    def _final(self, choice: Choice, generation: Generation) -> dict[str, Any]:
        first = choice.take(PIECE_ENTRIES if choice.wants_logprobs else None)
        ids = first.ids

        def pieces() -> Iterator[list[Scored]]:
            yield first.logprobs
            while choice.has_pending:
                taken = choice.take(PIECE_ENTRIES)
                ids.extend(taken.ids)
                yield taken.logprobs

        fields = {"index": choice.index} | self._content(choice, generation, first)
        fields["logprobs"] = orjson.Fragment(self._logprobs(choice, generation, pieces()))
        fields["finish_reason"] = self._finish_reason(choice)
        fields["stop_reason"] = choice.stop_reason
        if self.return_token_ids:
            fields["token_ids"] = ids
            fields["prompt_token_ids"] = generation.prompts[generation.prompt_of(choice)]
        return fields

    def _logprobs(
        self, choice: Choice, generation: Generation, pieces: Iterable[list[Scored]]
    ) -> bytes:
        """JSON of the logprobs, spelled piece by piece."""
        if self.logprobs is None:
            return b"null"
        columns: dict[str, list[bytes]] = {}
        for piece in pieces:
            for name, values in self._logprob_columns(choice, generation, piece).items():
                columns.setdefault(name, []).append(orjson.dumps(values)[1:-1])
        members = [
            b'"%b":[%b]' % (name.encode(), b",".join(filter(None, parts)))
            for name, parts in columns.items()
        ]
        return b"{" + b",".join(members) + self._logprobs_end

    def _scores_of(self, generation: Generation, i: int) -> bytes:
        """JSON of the logprobs of a prompt, as vLLM tells them: by id, null for the first token."""
        scored = zip(generation.prompts[i][1:], generation.prompt_logprobs[i], strict=True)
        pieces = [b"null"]
        while piece := list(itertools.islice(scored, PIECE_ENTRIES)):
            pieces.append(orjson.dumps([self._by_id(*entry) for entry in piece])[1:-1])
        return b"[" + b",".join(pieces) + b"]"

    def _by_id(self, token_id: int, entry: TokenLogprobs) -> dict[str, dict[str, Any]]:
        """A token and its rivals; its rank is known if it is one of them."""
        ranks = {id: rank for rank, (id, _) in enumerate(entry.top, 1)}
        told = {token_id: entry.logprob} | dict(entry.top[: self.prompt_logprobs])
        return {
            str(id): {
                "logprob": max(logprob, LOGPROB_FLOOR),
                "rank": ranks.get(id),
                "decoded_token": self._token_text(id),
            }
            for id, logprob in told.items()
        }

    def _token_text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.tokens_as_ids else self.tokenizer.token_text(token_id)
