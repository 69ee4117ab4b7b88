"""An engine without a model, for tests of the server: it answers each prompt with the prompt.

A step yields one token per live sample: the prompt's ids after the first, from the start again once
they are over, or those of `says`. An id of EOS ends the sample ("stop"), max_tokens too ("length").
A prompt's embedding is drawn from its ids, its token i has the logprob -i / 8.
"""

import itertools
import threading
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from fastgen_jax.engine.blocks import BlockMap
from fastgen_jax.engine.history import History
from fastgen_jax.engine.types import STEP_SIZES, Output, Plan, Request, Stats, TokenLogprobs
from fastgen_jax.errors import (
    CheckpointError,
    ContextLengthExceeded,
    EngineStopped,
    InvalidRequest,
    QueueFull,
)

MAX_TOKENS = 4096
VOCAB_SIZE = 335
HIDDEN_SIZE = 8


def embedding_of(prompt: list[int]) -> np.ndarray:
    return np.random.default_rng(prompt).normal(size=HIDDEN_SIZE).astype(np.float32)


def token_logprobs(token: int, logprob: float, n_top: int) -> TokenLogprobs:
    return TokenLogprobs(logprob, [((token + i) % VOCAB_SIZE, logprob - i) for i in range(n_top)])


def prompt_logprobs(request: Request) -> list[TokenLogprobs] | None:
    n_top = request.params.prompt_logprobs
    if n_top is None:
        return None
    return [token_logprobs(id, -i / 8, n_top) for i, id in enumerate(request.prompt_token_ids) if i]


@dataclass(eq=False)
class Sample:
    request_id: int
    index: int
    request: Request
    n_tokens: int = 0
    start_time: float = 0.0


@dataclass(eq=False)
class FakeEngine:
    """`may_step` cleared holds the engine; `fault` makes its next step raise."""

    eos_token_id: int
    step_time: float = 0.0
    max_queued_requests: int = 64
    may_step: threading.Event = field(default_factory=threading.Event)
    fault: BaseException | None = None
    nonfinite_share: float = 0.0
    poisoned: set[int] = field(default_factory=set)  # request ids that end with an error
    cancelled: list[int] = field(default_factory=list)
    finished: list[tuple[int, int]] = field(default_factory=list)
    submitted: list[Request] = field(default_factory=list)
    says: list[list[int]] = field(default_factory=list)  # what samples say instead, each its own
    may_change: threading.Event = field(default_factory=threading.Event)  # cleared holds changes
    changes: list[tuple] = field(default_factory=list)
    misfit: str = ""  # what is wrong with the next weights
    is_sleeping: bool = False
    is_compiling: bool = False
    n_programs: int = 10  # of 10
    n_programs_failed: int = 0

    def __post_init__(self):
        self.config = SimpleNamespace(
            model="fake", tokenizer=None, dtype="float32", cache_dtype="float32", block_size=16,
            num_kv_blocks=256, max_model_len=MAX_TOKENS,
            max_queued_requests=self.max_queued_requests,
            enable_prefix_caching=True, max_num_batched_tokens=512, max_num_seqs=64,
        )  # fmt: skip
        self.model_config = SimpleNamespace(
            family="fake", n_layers=1, hidden_size=HIDDEN_SIZE, vocab_size=VOCAB_SIZE
        )
        self.max_total_tokens = MAX_TOKENS
        self.default_params = {"temperature": 0.0}
        self.eos_token_ids = frozenset({self.eos_token_id})
        self.history = History()
        self.live: dict[tuple[int, int], Sample] = {}
        self.n_steps = self.n_generated = self.n_prompt = 0
        self.steps_by_size = [0] * (len(STEP_SIZES) + 1)
        self.last_step_time = time.monotonic()
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._stopping = False
        self._outbox: list[Output] = []
        self.may_step.set()
        self.may_change.set()

    @property
    def is_full(self) -> bool:
        with self._lock:
            return len({key[0] for key in self.live}) >= self.max_queued_requests

    def submit_all(self, requests: list[Request]) -> list[int]:
        for request in requests:
            self._check(request)
        with self._lock:
            if self._stopping:
                raise EngineStopped("the engine has stopped")
            n_open = len({key[0] for key in self.live})
            if n_open + len(requests) > self.max_queued_requests:
                raise QueueFull(f"{n_open} requests run or wait; try again later", retry_after=2.0)
            ids = [next(self._ids) for _ in requests]
            for id, request in zip(ids, requests, strict=True):
                self.submitted.append(request)
                self.n_prompt += len(request.prompt_token_ids)
                for index in range(request.params.n):
                    self.live[id, index] = Sample(id, index, request)
        return ids

    def _check(self, request: Request):
        n_prompt, n_output = len(request.prompt_token_ids), request.params.max_tokens
        n_output = 1 if n_output is None else n_output
        n_output = 0 if request.pooling else n_output
        if n_prompt + n_output > MAX_TOKENS:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {MAX_TOKENS} tokens. However, you "
                f"requested {n_prompt + n_output} tokens ({n_prompt} in the prompt, {n_output} "
                "in the completion). Please reduce the length of the prompt or completion.",
                param="prompt",
            )
        if not request.prompt_token_ids:
            raise InvalidRequest("the prompt is empty", param="prompt")

    def end_at(self, token_ids) -> None:
        self.eos_token_ids |= token_ids

    def cancel(self, request_id: int) -> None:
        with self._lock:
            self.cancelled.append(request_id)
            for key in [key for key in self.live if key[0] == request_id]:
                del self.live[key]
                self._outbox.append(Output(*key, None, finish_reason="abort"))

    def finish(self, request_id: int, index: int) -> None:
        with self._lock:
            self.finished.append((request_id, index))
            self.live.pop((request_id, index), None)

    def update_weights(self, source: str, *, in_flight: str) -> None:
        self._change("update_weights", source, in_flight)
        if self.misfit:
            raise CheckpointError(self.misfit)

    def sleep(self, level: int) -> None:
        self._change("sleep", level)
        self.is_sleeping = True

    def wake_up(self) -> None:
        self._change("wake_up")
        self.is_sleeping = False

    def reset_prefix_cache(self) -> None:
        self._change("reset_prefix_cache")

    def _change(self, *change) -> None:
        assert self.may_change.wait(20)
        self.changes.append(change)

    def map_blocks(self, receive) -> None:
        receive(BlockMap(bytes(min(len(self.live), 3) for _ in range(255)), 0.0))

    def stop(self) -> None:
        self._stopping = True
        self.may_step.set()

    def stats(self) -> Stats:
        return Stats(
            n_running=len(self.live), n_waiting=0, n_blocks_used=len(self.live), n_blocks=256,
            n_steps=self.n_steps, n_step_tokens=self.n_generated,
            steps_by_size=tuple(self.steps_by_size), n_prompt_tokens=self.n_prompt,
            n_generated_tokens=self.n_generated, n_preemptions=0, n_prefix_queries=0,
            n_prefix_hits=0, n_failed_steps=0, n_nonfinite=0,
            nonfinite_share=self.nonfinite_share, n_programs=self.n_programs, n_programs_wanted=10,
            n_programs_failed=self.n_programs_failed, last_step_time=self.last_step_time,
        )  # fmt: skip

    def run(self, deliver) -> None:
        while not self._stopping:
            if not self.may_step.wait(0.01):
                continue
            time.sleep(self.step_time or (0.0 if self.live else 0.001))
            if self.fault is not None:
                raise self.fault
            if outputs := self.step():
                deliver(outputs)
        with self._lock:
            deliver([Output(*key, None, finish_reason="abort") for key in self.live])
            self.live.clear()

    def step(self) -> list[Output]:
        with self._lock:
            if not self.may_step.is_set():  # it was cleared before the newest request came
                return []
            outputs, self._outbox = self._outbox, []
            outputs += [self._next(sample) for sample in self.live.values()]
            for output in outputs:
                if output.finish_reason is not None:
                    self.live.pop((output.request_id, output.index), None)
        self.n_steps += 1
        if outputs:
            self.history.begin(Plan([], [], []))
            self.history.end(0.0, n_padded=16, n_running=len(self.live), n_waiting=0)
        self.steps_by_size[bisect_left(STEP_SIZES, len(outputs))] += len(outputs) > 0
        self.last_step_time = time.monotonic()
        return outputs

    def _next(self, sample: Sample) -> Output:
        id, index, params = sample.request_id, sample.index, sample.request.params
        if id in self.poisoned:
            return Output(id, index, None, finish_reason="error", error="logits are not finite")
        prompt = sample.request.prompt_token_ids
        if sample.request.pooling is not None:
            return Output(id, index, None, finish_reason="stop", embedding=embedding_of(prompt))
        if params.max_tokens == 0:
            scores, now = prompt_logprobs(sample.request), time.monotonic()
            return Output(
                id, index, None, finish_reason="length", start_time=now, prompt_logprobs=scores
            )
        echoed = self.says[index % len(self.says)] if self.says else prompt[1:] or prompt
        token = echoed[sample.n_tokens % len(echoed)]
        if sample.n_tokens == len(echoed) and not params.ignore_eos:
            token = self.eos_token_id
        sample.n_tokens += 1
        sample.start_time = sample.start_time or time.monotonic()
        self.n_generated += 1
        logprobs, scores = None, None
        if params.logprobs is not None:
            logprobs = token_logprobs(token, -0.5, params.logprobs)
        if index == 0 and sample.n_tokens == 1:
            scores = prompt_logprobs(sample.request)
        reason = None
        if token in self.eos_token_ids and not params.ignore_eos:
            reason = "stop"
        elif sample.n_tokens == params.max_tokens:
            reason = "length"
        return Output(
            id, index, token, logprobs, reason, start_time=sample.start_time, prompt_logprobs=scores
        )
