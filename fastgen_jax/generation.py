"""Requests of one call of LLM.generate, LLM.stream or LLM.embed on their way through the engine.

A Generation submits them and sorts their outputs into samples; a Driver (driver.py) says when.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastgen_jax.engine.pooling import normalized
from fastgen_jax.engine.types import FinishReason, Output, Request, TokenLogprobs
from fastgen_jax.errors import FastGenError, InvalidRequest
from fastgen_jax.results import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    RequestOutput,
)
from fastgen_jax.sampling_params import SamplingParams
from fastgen_jax.tokenizer import TextDelta, TextStream, Tokenizer

if TYPE_CHECKING:
    from fastgen_jax.engine.engine import Engine


class Sample:
    """One sample as it grows, or what comes of a prompt that is embedded."""

    def __init__(
        self, index: int, request: Request, tokenizer: Tokenizer | None, stream: TextStream | None
    ):
        self.index = index
        self.finish_reason: FinishReason | None = None
        self.n_reused = 0  # prompt tokens that came from the prefix cache
        self._tokenizer = tokenizer
        self._stream = stream
        self._token_ids: list[int] = []
        self._embedding: np.ndarray | None = None
        self.hidden_states: np.ndarray | None = None
        self._logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: Sequence[TokenLogprobs] | None = None
        self._cumulative = 0.0 if request.params.logprobs is not None else None
        self._new_text, self._n_old = "", 0  # of the last output; tokens before it
        self._stop_reason: int | str | None = None
        self.error: str | None = None

    def push(self, output: Output) -> None:
        """Takes the next output; a stop string may end the sample before the engine does."""
        self._n_old = len(self._token_ids)
        if output.token_id is not None:
            self._token_ids.append(output.token_id)
        self.n_reused = output.n_reused or self.n_reused
        self._embedding, self.hidden_states = output.embedding, output.hidden_states
        if output.logprobs is not None:
            self._logprobs.append(output.logprobs)
            assert self._cumulative is not None, "logprobs that nobody asked for"
            self._cumulative += output.logprobs.logprob
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        self.error = output.error
        end = self._stream.push(output) if self._stream else output
        self.finish_reason, self._stop_reason = end.finish_reason, end.stop_reason
        self._new_text = end.text if isinstance(end, TextDelta) else ""

    def result(self) -> CompletionOutput:
        """All of it so far."""
        return self._output(self._stream.text if self._stream else "", 0)

    def news(self) -> CompletionOutput:
        """What the last output has added to it."""
        return self._output(self._new_text, self._n_old)

    def _output(self, text: str, start: int) -> CompletionOutput:
        """What there is from a token on."""
        token_ids = self._token_ids[start:]
        logprobs = None
        if self._cumulative is not None:
            logprobs = self._positions(token_ids, self._logprobs[start:])
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=token_ids,
            cumulative_logprob=self._cumulative,
            logprobs=logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            error=self.error,
        )

    def prompt_positions(self, request: Request) -> list[dict[int, Logprob] | None] | None:
        """What came of the prompt's scores; None before the first position that has one."""
        if self.prompt_logprobs is None:
            return None
        prompt, scores = request.prompt_token_ids, self.prompt_logprobs
        first = len(prompt) - len(scores)
        return [None] * first + self._positions(prompt[first:], scores)

    def embedding(self, *, is_normalized: bool) -> EmbeddingOutput:
        vector = self._embedding
        if vector is None:
            return EmbeddingOutput([], self.error)
        return EmbeddingOutput((normalized(vector) if is_normalized else vector).tolist())

    def _positions(
        self, token_ids: list[int], logprobs: Sequence[TokenLogprobs]
    ) -> list[dict[int, Logprob]]:
        return [self._position(*each) for each in zip(token_ids, logprobs, strict=True)]

    def _position(self, token_id: int, logprobs: TokenLogprobs) -> dict[int, Logprob]:
        """The token that is there, then the most likely ones."""
        ranks = {id: rank for rank, (id, _) in enumerate(logprobs.top, 1)}
        pairs = {token_id: logprobs.logprob} | dict(logprobs.top)
        return {
            id: Logprob(value, ranks.get(id), self._tokenizer and self._tokenizer.token_text(id))
            for id, value in pairs.items()
        }


def to_score(prompt: list[int], completion: list[int]) -> Request:
    """What is asked to learn how likely a completion is.

    Raises:
        InvalidRequest: nothing comes before it.
    """
    if not prompt:
        raise InvalidRequest(
            "a prompt needs at least one token, such as the tokenizer's for the beginning of a "
            "text: nothing else says how likely the first token of a completion is",
            param="prompt",
        )
    params = SamplingParams(max_tokens=0, prompt_logprobs=0, temperature=0.0, detokenize=False)
    return Request([*prompt, *completion], params, scored_from=len(prompt))


def _samples(request: Request, tokenizer: Tokenizer | None) -> list[Sample]:
    p = request.params
    tokenizer = tokenizer if p.detokenize else None
    streams = [None] * p.n
    if tokenizer is not None:
        streams = TextStream.of_samples(tokenizer, [request.prompt_token_ids], p)
    return [Sample(i, request, tokenizer, stream) for i, stream in enumerate(streams)]


@dataclass
class Job:
    """A prompt on its way through the engine; request_id is None until it is submitted."""

    place: int  # among the call's prompts
    request: Request
    samples: list[Sample]
    request_id: int | None = None

    @property
    def is_finished(self) -> bool:
        return all(sample.finish_reason for sample in self.samples)

    def result(
        self, prompt: str | None, samples: list[CompletionOutput] | None = None
    ) -> RequestOutput:
        """prompt: its text, if it came as one. samples: what is told of them, if not all."""
        return RequestOutput(
            str(self.request_id),
            prompt,
            self.request.prompt_token_ids,
            [sample.result() for sample in self.samples] if samples is None else samples,
            num_cached_tokens=self.samples[0].n_reused,  # the others share what the first one made
            prompt_logprobs=self.samples[0].prompt_positions(self.request),
        )

    def embedding(self, *, is_normalized: bool) -> EmbeddingRequestOutput:
        """Of a request with a pooling."""
        (sample,) = self.samples
        return EmbeddingRequestOutput(
            str(self.request_id),
            sample.embedding(is_normalized=is_normalized),
            self.request.prompt_token_ids,
            sample.n_reused,
        )

    def scores(self) -> np.ndarray:
        """f32 of each scored token. Raises FastGenError if there are none."""
        found = self._read(self.samples[0].prompt_logprobs)
        return np.array([position.logprob for position in found], np.float32)

    def hidden_states(self) -> np.ndarray:
        """f32[L, P, D]. Raises FastGenError if there are none."""
        return self._read(self.samples[0].hidden_states)

    def _read(self, found: Any) -> Any:
        if found is None:
            why = self.samples[0].error or self.samples[0].finish_reason
            raise FastGenError(f"request {self.request_id} left nothing of its prompt: {why}")
        return found


class Ended(NamedTuple):
    """A generation's last event. error: what its caller is told instead of results.

    thread: which has ended with it, for it was the last one.
    """

    error: BaseException | None
    thread: threading.Thread | None


Token = tuple[int, CompletionOutput]  # the prompt's place among the call's, and what is new of it
Event = list[Token] | Ended


class Generation:
    """One call of generate, embed or stream. What waits for it is told by events.

    INVARIANT: once it is with a Driver, the Driver's thread alone changes it; others read.

    Args:
        tell: takes events, in that thread. Those of one step come as one.
        tells_tokens: whether there are any before the last.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        requests: list[Request],
        tell: Callable[[Event], None],
        *,
        tells_tokens: bool = False,
    ):
        self.jobs = [
            Job(i, request, _samples(request, tokenizer)) for i, request in enumerate(requests)
        ]
        self.waiting = deque(sorted(self.jobs, key=lambda job: job.request.priority))
        self.live: dict[int, Job] = {}
        self.n_tokens = 0
        self.error: BaseException | None = None
        self.tell = tell
        self._tells_tokens = tells_tokens
        self._news: list[Token] = []

    @property
    def n_finished(self) -> int:
        return len(self.jobs) - len(self.waiting) - len(self.live)

    @property
    def is_over(self) -> bool:
        """Whether nothing of it waits or runs."""
        return not self.waiting and not self.live

    def submit_next(self, engine: Engine) -> int:
        """The id of its next request. Raises QueueFull, EngineStopped."""
        job = self.waiting[0]
        job.request_id = engine.submit(job.request)
        self.live[job.request_id] = job
        self.waiting.popleft()
        return job.request_id

    def push(self, output: Output, engine: Engine) -> None:
        """Takes an output of one of its live requests."""
        job = self.live[output.request_id]
        sample = job.samples[output.index]
        if sample.finish_reason:
            return
        sample.push(output)
        self.n_tokens += output.token_id is not None
        if self._tells_tokens:
            self._news.append((job.place, sample.news()))
        if sample.finish_reason and not output.finish_reason:
            engine.finish(output.request_id, output.index)
        if sample.finish_reason and job.is_finished:
            del self.live[output.request_id]

    def tell_news(self) -> None:
        """Tells what came since it did so last."""
        if self._news:
            self.tell(self._news)
            self._news = []

    def end(self, engine: Engine, error: BaseException | None) -> None:
        """Has the engine end what runs, soon; nothing more is submitted. The first error stays."""
        self.error = self.error or error
        self.waiting.clear()
        for request_id in self.live:
            engine.cancel(request_id)
