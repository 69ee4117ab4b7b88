"""Answers to Generate and GenerateStream, as encoded GenerateResponses."""

import time
import uuid
from collections.abc import Iterator
from typing import Any

from fastgen_jax.dialects import Thought
from fastgen_jax.server.errors import ApiError
from fastgen_jax.server.formats.choices import PIECE_ENTRIES, PIECE_TOKENS
from fastgen_jax.server.formats.format import Format
from fastgen_jax.server.generation import Choice, Generation, Taken
from fastgen_jax.server.rpc import fastgen_pb2 as messages
from fastgen_jax.tokenizer import Tokenizer


class GenerateFormat(Format):
    """The messages of a stream, put together, say what the one answer says.

    Args:
        echo: the text of each prompt, where answers begin with it.
        options: what only HTTP's forms know, and no GenerateRequest can ask for.
    """

    def __init__(
        self,
        *,
        model: str,
        tokenizer: Tokenizer,
        logprobs: int | None,
        echo: list[str] | None = None,
        **options: Any,
    ):
        self.tokenizer = tokenizer
        self.logprobs = logprobs
        self.echo = echo
        self._started: set[int] = set()  # choices of which something is out
        self._ended: set[int] = set()  # choices whose finish_reason is out
        self._head = {"id": f"gen-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def chunks(self, generation: Generation) -> Iterator[bytes]:
        response, n_left = self._response(), PIECE_ENTRIES
        for choice in generation.choices:
            while choice.has_pending or self._owes_end(choice):
                taken = choice.take(PIECE_TOKENS if choice.wants_logprobs else None)
                self._add(response, choice, taken, generation)
                n_left -= len(taken.logprobs) * (1 + (self.logprobs or 0))
                if n_left <= 0:
                    yield response.SerializeToString()
                    response, n_left = self._response(), PIECE_ENTRIES
        if response.choices:
            yield response.SerializeToString()

    def end(self, generation: Generation) -> bytes:
        return self._response(usage=_usage_of(generation)).SerializeToString()

    def error(self, error: ApiError) -> bytes:
        """No message: the status that ends the stream says it."""
        return b""

    def result(self, generation: Generation) -> bytes:
        response = self._response(usage=_usage_of(generation))
        for choice in generation.choices:
            self._add(response, choice, choice.take(), generation)
        return response.SerializeToString()

    def n_entries(self, generation: Generation) -> int:
        n_logprobs = generation.n_pending_logprobs * ((self.logprobs or 0) + 1)
        return (
            generation.n_tokens + n_logprobs + sum(map(len, self.echo or ())) * generation.n_samples
        )

    def _response(self, usage: messages.Usage | None = None) -> messages.GenerateResponse:
        return messages.GenerateResponse(**self._head, usage=usage)

    def _owes_end(self, choice: Choice) -> bool:
        return choice.finish_reason is not None and choice.index not in self._ended

    def _add(
        self,
        response: messages.GenerateResponse,
        choice: Choice,
        taken: Taken,
        generation: Generation,
    ):
        """What is new in one choice."""
        echoed = ""
        if self.echo and choice.index not in self._started:
            echoed = self.echo[generation.prompt_of(choice)]
        self._started.add(choice.index)
        thoughts = (event.text for event in taken.events if isinstance(event, Thought))
        added = response.choices.add(
            index=choice.index,
            text=echoed + taken.text,
            reasoning="".join(thoughts),
            token_ids=taken.ids,
        )
        if self.logprobs is not None:
            for id, entry in taken.logprobs:
                rivals = entry.top[: self.logprobs] if entry else []
                top = [self._logprob(*rival) for rival in rivals]
                added.logprobs.append(self._logprob(id, entry and entry.logprob, top))
        if choice.finish_reason is not None and not choice.has_pending:
            self._ended.add(choice.index)
            _add_end(added, choice)

    def _logprob(
        self, id: int, logprob: float | None, top: list[messages.TokenLogprob] | None = None
    ) -> messages.TokenLogprob:
        token = self.tokenizer.token_text(id)
        return messages.TokenLogprob(token_id=id, token=token, logprob=logprob, top=top)


def _add_end(added: messages.Choice, choice: Choice):
    added.finish_reason = choice.finish_reason or ""
    if isinstance(choice.stop_reason, str):
        added.stop_text = choice.stop_reason
    elif choice.stop_reason is not None:
        added.stop_token_id = choice.stop_reason


def _usage_of(generation: Generation) -> messages.Usage:
    return messages.Usage(
        prompt_tokens=generation.n_prompt_tokens,
        completion_tokens=generation.n_tokens,
        cached_tokens=generation.n_reused_tokens,
        reasoning_tokens=generation.n_thought_tokens,
    )
