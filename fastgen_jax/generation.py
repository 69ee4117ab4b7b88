"""Requests of one call of LLM.generate or LLM.embed on their way through the engine.

A Generation submits them as the engine has room and sorts its outputs into samples; `run` steps it
in the caller's thread, and an interrupt between steps cancels what runs.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgen_jax.engine.pooling import normalized
from fastgen_jax.engine.types import FinishReason, Output, Request, TokenLogprobs
from fastgen_jax.errors import FastGenError, InvalidRequest, QueueFull
from fastgen_jax.results import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    RequestOutput,
)
from fastgen_jax.sampling_params import SamplingParams
from fastgen_jax.tokenizer import TextStream, Tokenizer

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
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self._wants_logprobs = request.params.logprobs is not None
        self._stop_reason: int | str | None = None
        self.error: str | None = None

    def push(self, output: Output) -> None:
        """Takes the next output; a stop string may end the sample before the engine does."""
        if output.token_id is not None:
            self._token_ids.append(output.token_id)
        self.n_reused = output.n_reused or self.n_reused
        self._embedding, self.hidden_states = output.embedding, output.hidden_states
        if output.logprobs is not None:
            self._logprobs.append(output.logprobs)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        self.error = output.error
        end = self._stream.push(output) if self._stream else output
        self.finish_reason, self._stop_reason = end.finish_reason, end.stop_reason

    def result(self) -> CompletionOutput:
        logprobs = cumulative = None
        if self._wants_logprobs:
            logprobs = self._positions(self._token_ids, self._logprobs)
            cumulative = sum(position.logprob for position in self._logprobs)
        return CompletionOutput(
            index=self.index,
            text=self._stream.text if self._stream else "",
            token_ids=self._token_ids,
            cumulative_logprob=cumulative,
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
        self, token_ids: list[int], logprobs: list[TokenLogprobs]
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

    request: Request
    samples: list[Sample]
    request_id: int | None = None

    @property
    def is_finished(self) -> bool:
        return all(sample.finish_reason for sample in self.samples)

    def result(self, prompt: str | None) -> RequestOutput:
        """prompt: its text, if it came as one."""
        return RequestOutput(
            str(self.request_id),
            prompt,
            self.request.prompt_token_ids,
            [sample.result() for sample in self.samples],
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


class Generation:
    """One call of generate or embed: submits requests as the engine has room, collects outputs."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, requests: list[Request]):
        self.jobs = [Job(request, _samples(request, tokenizer)) for request in requests]
        self.n_tokens = 0
        self._engine = engine
        self._waiting = deque(sorted(self.jobs, key=lambda job: job.request.priority))
        self._live: dict[int, Job] = {}

    @property
    def is_finished(self) -> bool:
        return not self._waiting and not self._live

    def step(self) -> int:
        """Runs one step of the engine; returns how many prompts it finished."""
        self._submit_waiting()
        assert self._engine.has_work, f"the engine lost requests {list(self._live)}"
        return self._collect()

    def cancel(self) -> None:
        """Ends everything and lets the engine release it."""
        self._waiting.clear()
        for request_id in self._live:
            self._engine.cancel(request_id)
        while self._live and self._engine.has_work:
            self._collect()

    def _submit_waiting(self) -> None:
        while self._waiting:
            job = self._waiting[0]
            try:
                job.request_id = self._engine.submit(job.request)
            except QueueFull:
                if not self._engine.has_work:
                    raise
                return
            self._live[job.request_id] = self._waiting.popleft()

    def _collect(self) -> int:
        n_live = len(self._live)
        for output in self._engine.step():
            job = self._live.get(output.request_id)
            if job is None or job.samples[output.index].finish_reason:
                continue
            sample = job.samples[output.index]
            sample.push(output)
            self.n_tokens += output.token_id is not None
            if sample.finish_reason and not output.finish_reason:
                self._engine.finish(output.request_id, output.index)
            if sample.finish_reason and job.is_finished:
                del self._live[output.request_id]
        return n_live - len(self._live)


def run(generation: Generation, use_tqdm: bool | Callable[..., Any]) -> None:
    """Steps until all is done. Ctrl-C takes effect between steps, once everything is cancelled.

    use_tqdm: whether to show a bar, or what makes it.
    """
    from tqdm import tqdm

    start = time.monotonic()
    make_bar = use_tqdm if callable(use_tqdm) else tqdm
    bar = make_bar(total=len(generation.jobs), unit="prompt", miniters=0, disable=not use_tqdm)
    with bar, _deferred_interrupt() as interrupted:
        try:
            while not generation.is_finished:
                n_finished = generation.step()
                speed = generation.n_tokens / (time.monotonic() - start)
                if speed:
                    bar.set_postfix_str(f"{speed:.1f} tokens/s", refresh=False)
                bar.update(n_finished)
                if interrupted.is_set():
                    raise KeyboardInterrupt
        except BaseException:
            generation.cancel()
            raise


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets instead of interrupting a step halfway; a second one interrupts."""
    asked = threading.Event()

    def ask(signum: int, frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_default or threading.current_thread() is not threading.main_thread():
        yield asked
        return
    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
