"""Engine: submit, cancel, step, run. The one owner of sequences, rows and blocks.

A step plans and dispatches batch k+1 before it reads the tokens of batch k, so the device never waits for the host: counts
advance at dispatch, values arrive one step later. A sequence that turns out to have ended wastes at most one token, which
is discarded. Rows and blocks are released as soon as no later step needs them: the device runs steps in order, so a
stray write of a step in flight lands before the next owner's first.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastgen_jax import startup
from fastgen_jax.batch import MAX_EOS, Batch, HostTables, pack
from fastgen_jax.blocks import BlockPool
from fastgen_jax.config import EngineConfig, FinishReason, SamplingParams
from fastgen_jax.errors import ContextLengthExceeded, EngineStopped, InvalidRequest, QueueFull
from fastgen_jax.runner import StepResult, shape_for
from fastgen_jax.scheduler import Limits, schedule, servable_tokens
from fastgen_jax.types import Output, Plan, Request, Sequence, Stats, TokenLogprobs

MAX_FAILED_STEPS = 3  # in a row; then the engine gives up
MAX_PREFIX_LOOKUPS = 4  # waiting sequences per step
QUEUED_POOLS = 4  # prompt tokens that may wait, in KV pools ...
QUEUED_CONTEXTS = 64  # ... or in longest prompts, whichever is more


class InFlight(NamedTuple):
    """A dispatched step whose tokens have not been read."""

    batch: Batch
    result: Any


class Engine:
    """Generates tokens for requests; see the module's docstring for the order of things.

    Thread-safe: submit, submit_all, cancel, finish, stop, stats. One thread at a time may call step or run.

    Args:
        config: what to load and its limits; `self.config` is the same with nothing left None.
        on_phase: called with (phase, done, total) while loading and compiling.

    Raises:
        ConfigError, CheckpointError: the model cannot be served so; the message says what to change.
    """

    def __init__(self, config: EngineConfig, on_phase: startup.OnPhase | None = None):
        on_phase = on_phase or (lambda phase, done, total: None)
        started = startup.start(config, on_phase)
        self.config = c = started.config
        self.model_config = started.model_config
        self.default_params = default_params(started.generation_config)
        self.eos_token_ids = eos_token_ids(started)
        self.timings = {"plan": 0.0, "pack": 0.0, "dispatch": 0.0, "wait": 0.0, "commit": 0.0}
        self._runner = started.runner
        assert c.max_num_seqs and c.max_model_len and c.num_kv_blocks
        assert c.block_size and c.max_num_batched_tokens
        self._tables = HostTables(c.max_num_seqs, c.max_model_len, startup.table_width(c))
        self._pool = BlockPool(c.num_kv_blocks)
        self._limits = Limits(c.max_num_batched_tokens, c.max_num_seqs, c.block_size)
        self.max_total_tokens = servable_tokens(c.max_model_len, self._pool.n_usable, c.block_size)
        self._live: dict[int, Sequence] = {}  # by id, which is arrival order
        self._requests: dict[int, list[Sequence]] = {}  # unfinished samples of each
        self._in_flight: InFlight | None = None
        self._lock = threading.Lock()  # guards the next five
        self._inbox: deque[Callable[[list[Output]], None]] = deque()
        self._n_open = 0  # requests submitted and not ended
        self._n_queued_tokens = 0
        self._closed: str | None = None  # why nothing more is accepted
        self._ids = itertools.count()
        self._wake = threading.Event()
        self._stopping = False
        self._sequence_ids = itertools.count()
        self._n_failed_steps = 0
        self._counters = dict.fromkeys(
            ("steps", "prompt_tokens", "generated_tokens", "preemptions"), 0
        )
        self._counters |= {"prefix_queries": 0, "prefix_hits": 0}
        self._last_step_time = time.monotonic()
        self._runner.compile(self._tables, lambda done, total: on_phase("compiling", done, total))
        on_phase("ready", 1, 1)

    # Any thread.

    def check(self, request: Request) -> int:
        """The most tokens, prompt and output, that a request may reach.

        Raises:
            InvalidRequest, ContextLengthExceeded: it can never be served; `submit` would say the same.
        """
        p, prompt = request.params, request.prompt_token_ids
        vocab_size, bound = self.model_config.vocab_size, self.max_total_tokens
        if not prompt:
            raise InvalidRequest("the prompt is empty; it needs at least one token", param="prompt")
        wanted = 1 if p.max_tokens is None else p.max_tokens
        if len(prompt) + wanted > bound:
            raise ContextLengthExceeded(self._too_long(len(prompt), wanted), param="prompt")
        _check_ids("prompt", prompt, vocab_size)
        _check_ids("stop_token_ids", p.stop_token_ids, vocab_size)
        _check_ids("logit_bias", list(p.logit_bias or ()), vocab_size)
        return bound if p.max_tokens is None else len(prompt) + p.max_tokens

    def submit(self, request: Request) -> int:
        """Queues a request and returns its id.

        Raises:
            InvalidRequest, ContextLengthExceeded: it can never be served; nothing was queued.
            QueueFull: too many requests or prompt tokens wait; try again later.
            EngineStopped: the engine accepts no more work.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: list[Request]) -> list[int]:
        """Queues all of them or, raising as `submit` does, none."""
        totals = [self.check(request) for request in requests]
        n_tokens = sum(len(r.prompt_token_ids) * r.params.n for r in requests)
        with self._lock:
            if self._closed:
                raise EngineStopped(self._closed)
            self._check_room(len(requests), n_tokens)
            self._n_open += len(requests)
            self._n_queued_tokens += n_tokens
            ids = [next(self._ids) for _ in requests]
            for request_id, request, total in zip(ids, requests, totals, strict=True):
                self._inbox.append(self._enter(request_id, request, total))
        self._wake.set()
        return ids

    def cancel(self, request_id: int) -> None:
        """Ends what is left of a request with finish_reason "abort". Unknown and ended ids are ignored."""

        def apply(outputs: list[Output]) -> None:
            for sequence in list(self._requests.get(request_id, ())):
                self._end(sequence, "abort")
                outputs.append(Output(request_id, sequence.index, None, finish_reason="abort"))

        self._command(apply)

    def finish(self, request_id: int, index: int) -> None:
        """Ends one sample quietly: its caller has seen enough (a stop string). No Output follows."""

        def apply(outputs: list[Output]) -> None:
            for sequence in list(self._requests.get(request_id, ())):
                if sequence.index == index:
                    self._end(sequence, "stop")

        self._command(apply)

    def stop(self, reason: str = "the engine has stopped") -> None:
        """Accepts no more requests and makes `run` return, ending live requests with "abort"."""
        with self._lock:
            self._closed = self._closed or reason
        self._stopping = True
        self._wake.set()

    @property
    def has_work(self) -> bool:
        return bool(self._inbox or self._live or self._in_flight)

    def stats(self) -> Stats:
        n_running = self._limits.max_seqs - len(self._tables.free_rows)
        return Stats(
            n_running=n_running,
            n_waiting=max(self._n_open - n_running, 0),
            n_blocks_used=self._pool.n_usable - self._pool.n_free,
            n_blocks=self._pool.n_usable,
            n_steps=self._counters["steps"],
            n_prompt_tokens=self._counters["prompt_tokens"],
            n_generated_tokens=self._counters["generated_tokens"],
            n_preemptions=self._counters["preemptions"],
            n_prefix_queries=self._counters["prefix_queries"],
            n_prefix_hits=self._counters["prefix_hits"],
            last_step_time=self._last_step_time,
        )

    # The engine's thread.

    def run(self, deliver: Callable[[list[Output]], None]) -> None:
        """Steps until `stop`, handing the outputs of each step to `deliver`; waits while there is no work.

        Raises whatever made the engine give up, after every live request has ended with "error".
        """
        try:
            while not self._stopping:
                self._wake.clear()
                if not self.has_work and not self._stopping:
                    self._last_step_time = time.monotonic()
                    self._wake.wait()
                    continue
                outputs = self.step()
                if outputs:
                    deliver(outputs)
            deliver(self._end_all("abort", None))
        except BaseException as error:
            self.stop("the engine has failed; the server must be restarted")
            deliver(self._end_all("error", f"the engine failed: {type(error).__name__}"))
            raise

    def step(self) -> list[Output]:
        """Plans and dispatches the next batch, then reads the tokens of the one before."""
        outputs: list[Output] = []
        while self._inbox:
            self._inbox.popleft()(outputs)
        previous, self._in_flight = self._in_flight, None
        try:
            self._in_flight = self._dispatch(self._plan())
            if previous:
                self._commit(previous, outputs)
            self._n_failed_steps = 0
        except (RuntimeError, ValueError) as error:  # XLA's errors are RuntimeErrors
            self._recover(error, [previous, self._in_flight], outputs)
        self._last_step_time = time.monotonic()
        return outputs

    def _plan(self) -> Plan:
        started = time.perf_counter()
        attached = self._attach_prefixes()
        plan = schedule(
            list(self._live.values()),
            self._pool.n_free,
            self._limits,
            lambda s: self._pool.n_exclusive(s.block_ids),
        )
        if attached:
            admitted = {chunk.sequence.id for chunk in plan.chunks}
            for sequence in attached:
                if sequence.id not in admitted:
                    self._forget_cache(sequence)
        self.timings["plan"] += time.perf_counter() - started
        return plan

    def _dispatch(self, plan: Plan) -> InFlight | None:
        """Applies a plan: blocks, rows and counts change here, then the device gets its batch."""
        for sequence in plan.preempted:
            self._forget_cache(sequence)
            self._tables.leave(sequence)
            self._counters["preemptions"] += 1
        for sequence in plan.bypassed:
            sequence.n_bypassed += 1
        if not plan.chunks:
            return None
        started = time.perf_counter()
        for sequence, _, n_blocks in plan.chunks:
            if sequence.row < 0:
                self._admit(sequence)
            if n_blocks:
                self._tables.extend(sequence, self._pool.allocate(n_blocks))
        n_tokens = sum(chunk.n_new for chunk in plan.chunks)
        shape = shape_for(n_tokens, self._runner.shapes)
        batch = pack(plan.chunks, self._tables, shape, self._limits.block_size)
        for sequence, n_new, _ in plan.chunks:
            sequence.n_cached += n_new
            if sequence.n_cached == sequence.n_tokens:
                sequence.n_tokens += 1
                if sequence.n_tokens == sequence.max_tokens:
                    self._retire(sequence)
        packed = time.perf_counter()
        result = self._runner.dispatch(batch, self._tables)
        self._counters["steps"] += 1
        self.timings["pack"] += packed - started
        self.timings["dispatch"] += time.perf_counter() - packed
        return InFlight(batch, result)

    def _commit(self, step: InFlight, outputs: list[Output]) -> None:
        """Reads a step's tokens, extends the sequences that still live, ends those that are done."""
        started = time.perf_counter()
        result = self._runner.fetch(step.result)
        fetched = time.perf_counter()
        tokens, is_finite = result.token_ids.tolist(), result.is_finite.tolist()
        for i, sequence in enumerate(step.batch.sampled):
            if sequence.finish_reason is not None:
                continue  # it ended while this step ran
            if not is_finite[i]:
                self._fail(sequence, "the model produced non-finite logits", outputs)
                continue
            token = tokens[i]
            sequence.output_ids.append(token)
            logprobs = None if sequence.params.logprobs is None else _logprobs(result, i, sequence)
            reason: FinishReason | None = None
            stop_reason = None
            if token in sequence.ending_ids:
                reason = "stop"
                stop_reason = token if token in sequence.params.stop_token_ids else None
            elif sequence.n_prompt + len(sequence.output_ids) == sequence.max_tokens:
                reason = "length"
            outputs.append(
                Output(sequence.request_id, sequence.index, token, logprobs, reason, stop_reason)
            )
            self._publish(sequence)
            if len(sequence.output_ids) == 1:
                self._counters["prompt_tokens"] += sequence.n_prompt
            if reason:
                self._end(sequence, reason)
        self._counters["generated_tokens"] += len(step.batch.sampled)
        self.timings["wait"] += fetched - started
        self.timings["commit"] += time.perf_counter() - fetched

    # Life of a sequence.

    def _enter(self, request_id: int, request: Request, total: int):
        """The command that makes a submitted request live."""
        prompt = np.array(request.prompt_token_ids, np.int32)
        seeds = sample_seeds(self.config.seed, request_id, request.params)

        def apply(outputs: list[Output]) -> None:
            samples = self._requests[request_id] = []
            for index, seed in enumerate(seeds):
                sequence = Sequence(
                    id=next(self._sequence_ids),
                    request_id=request_id,
                    index=index,
                    prompt_ids=prompt,
                    params=request.params,
                    seed=seed,
                    max_tokens=total,
                    ending_ids=ending_ids(request.params, self.eos_token_ids),
                    n_tokens=len(prompt),
                )
                samples.append(sequence)
                self._live[sequence.id] = sequence

        return apply

    def _admit(self, sequence: Sequence) -> None:
        self._tables.enter(sequence)
        if not sequence.output_ids:
            self._count_dequeued(sequence)
            if self._may_share(sequence):
                self._counters["prefix_queries"] += sequence.n_prompt
                self._counters["prefix_hits"] += sequence.n_cached

    def _count_dequeued(self, sequence: Sequence) -> None:
        if not sequence.is_counted:
            sequence.is_counted = True
            with self._lock:
                self._n_queued_tokens -= sequence.n_prompt

    def _retire(self, sequence: Sequence) -> None:
        """Gives back row and blocks: no further step needs them."""
        if sequence.row >= 0:
            self._forget_cache(sequence)
            self._tables.leave(sequence)
        self._live.pop(sequence.id, None)

    def _forget_cache(self, sequence: Sequence) -> None:
        self._pool.release(sequence.block_ids)
        sequence.block_ids = []
        sequence.n_cached = sequence.n_published = 0
        sequence.digest = b""

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        self._retire(sequence)
        self._count_dequeued(sequence)
        samples = self._requests[sequence.request_id]
        samples.remove(sequence)
        if not samples:
            del self._requests[sequence.request_id]
            with self._lock:
                self._n_open -= 1

    def _fail(self, sequence: Sequence, error: str, outputs: list[Output]) -> None:
        self._end(sequence, "error")
        outputs.append(
            Output(sequence.request_id, sequence.index, None, finish_reason="error", error=error)
        )

    def _end_all(self, reason: FinishReason, error: str | None) -> list[Output]:
        outputs: list[Output] = []
        while self._inbox:
            self._inbox.popleft()(outputs)
        for samples in list(self._requests.values()):
            for sequence in list(samples):
                self._end(sequence, reason)
                outputs.append(
                    Output(
                        sequence.request_id,
                        sequence.index,
                        None,
                        finish_reason=reason,
                        error=error,
                    )
                )
        self._in_flight = None
        return outputs

    def _recover(
        self, error: Exception, steps: list[InFlight | None], outputs: list[Output]
    ) -> None:
        """After a step that failed: its requests end with an error, the others recompute in a new cache."""
        self._n_failed_steps += 1
        if self._n_failed_steps >= MAX_FAILED_STEPS:
            raise error
        failed = next((step for step in steps if step), None)
        for sequence in failed.batch.sampled if failed else ():
            if not sequence.is_finished:
                self._fail(sequence, f"the step failed: {type(error).__name__}", outputs)
        for sequence in list(self._live.values()):
            if sequence.row >= 0:
                self._forget_cache(sequence)
                self._tables.leave(sequence)
            sequence.n_tokens = sequence.n_prompt + len(sequence.output_ids)
        self._in_flight = None
        self._pool = BlockPool(self._pool.n_blocks)
        self._runner.reset()

    # Prefix cache.

    def _may_share(self, sequence: Sequence) -> bool:
        """Penalties need every token of the prompt on the device, so such requests compute it all."""
        p = sequence.params
        has_penalty = p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty
        return self.config.enable_prefix_caching and not has_penalty

    def _attach_prefixes(self) -> list[Sequence]:
        """Lets the first waiting sequences hold what the cache has of them, for `schedule` to see."""
        n_free = len(self._tables.free_rows)
        if not n_free or self._pool.n_free < 2 * (self._limits.max_seqs - n_free):
            return []
        waiting = (s for s in self._live.values() if s.row < 0 and self._may_share(s))
        attached = []
        for s in itertools.islice(waiting, min(n_free, MAX_PREFIX_LOOKUPS)):
            tokens = np.concatenate([s.prompt_ids, np.array(s.output_ids, np.int32)])
            n_full = (len(tokens) - 1) // self._limits.block_size  # the last token must be computed
            s.block_ids, s.digest = self._pool.match(self._split(tokens, 0, n_full))
            s.n_published = len(s.block_ids)
            s.n_cached = s.n_published * self._limits.block_size
            if s.block_ids:
                attached.append(s)
        return attached

    def _publish(self, sequence: Sequence) -> None:
        """Offers the blocks that have become full of known tokens."""
        n_known = sequence.n_prompt + len(sequence.output_ids)
        n_full = min(n_known, sequence.n_cached) // self._limits.block_size
        if n_full <= sequence.n_published or not self.config.enable_prefix_caching:
            return
        tokens = np.concatenate([sequence.prompt_ids, np.array(sequence.output_ids, np.int32)])
        new = self._split(tokens, sequence.n_published, n_full)
        for block, content in zip(
            sequence.block_ids[sequence.n_published : n_full], new, strict=True
        ):
            sequence.digest = self._pool.publish(block, sequence.digest, content)
        sequence.n_published = n_full

    def _split(self, tokens: np.ndarray, start: int, end: int) -> list[bytes]:
        """Bytes of the tokens of blocks start..end."""
        size = self._limits.block_size
        return [tokens[i * size : (i + 1) * size].tobytes() for i in range(start, end)]

    # Admission.

    def _command(self, apply: Callable[[list[Output]], None]) -> None:
        with self._lock:
            self._inbox.append(apply)
        self._wake.set()

    def _check_room(self, n_requests: int, n_tokens: int) -> None:
        limit = self.config.max_queued_requests
        if self._n_open + n_requests > limit:
            raise QueueFull(
                f"{self._n_open} requests run or wait, the limit is {limit}; try again later"
            )
        pool = self._pool.n_usable * self._limits.block_size
        most = max(QUEUED_POOLS * pool, QUEUED_CONTEXTS * self.max_total_tokens)
        if self._n_queued_tokens and self._n_queued_tokens + n_tokens > most:
            raise QueueFull(
                f"{self._n_queued_tokens} prompt tokens wait, the limit is {most}; try again later"
            )

    def _too_long(self, n_prompt: int, n_output: int) -> str:
        bound = self.max_total_tokens
        text = (
            f"This model's maximum context length is {bound} tokens. However, you requested "
            f"{n_prompt + n_output} tokens ({n_prompt} in the messages, {n_output} in the "
            "completion). Please reduce the length of the messages or completion."
        )
        assert self.config.max_model_len
        if bound < self.config.max_model_len:
            text += (
                f" (The KV cache of {self._pool.n_usable} blocks holds {bound} tokens; raise "
                "--num-kv-blocks or --memory-fraction.)"
            )
        return text


def _check_ids(name: str, ids, vocab_size: int) -> None:
    for token in ids:
        is_integer = isinstance(token, int | np.integer) and not isinstance(token, bool)
        if not is_integer or not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"{name} holds {token!r:.40}; token ids are integers from 0 to {vocab_size - 1}",
                param=name,
            )


def _logprobs(result: StepResult, i: int, sequence: Sequence) -> TokenLogprobs:
    k = sequence.params.logprobs or 0
    ids, logprobs = result.top_ids[i, :k].tolist(), result.top_logprobs[i, :k].tolist()
    return TokenLogprobs(float(result.logprobs[i]), list(zip(ids, logprobs, strict=True)))


def ending_ids(params: SamplingParams, eos_token_ids: frozenset[int]) -> frozenset[int]:
    """Token ids that end a sample."""
    eos = frozenset() if params.ignore_eos else eos_token_ids
    return eos | frozenset(params.stop_token_ids)


def sample_seeds(engine_seed: int, request_id: int, params: SamplingParams) -> list[int]:
    """One 32-bit seed per sample: from the request's seed where it has one, else from its number."""
    if params.seed is None:
        entropy = [engine_seed, request_id]
    else:
        entropy = [params.seed % 2**64]
    return np.random.SeedSequence(entropy).generate_state(params.n, np.uint32).tolist()


def default_params(generation_config: dict[str, Any]) -> dict[str, Any]:
    """SamplingParams fields that a model's generation_config.json sets."""
    if not generation_config.get("do_sample", True):
        return {"temperature": 0.0}
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {n: generation_config[n] for n in names if generation_config.get(n) is not None}


def eos_token_ids(started: startup.Started) -> frozenset[int]:
    """End-of-sequence ids: those of generation_config.json, else those of config.json."""
    value = started.generation_config.get("eos_token_id")
    ids = [value] if isinstance(value, int) else value or started.model_config.eos_token_ids
    return frozenset(list(ids)[:MAX_EOS])
