"""Service: the one bridge between the event loop and the engine's thread.

The engine's thread loads the model, then runs Engine.run; each step's outputs cross to the event
loop in one call_soon_threadsafe. All else here runs on the event loop: detokenising, stop strings,
deadlines, latencies. A request ends in exactly one of: its finish reasons, or one ApiError.
"""

import asyncio
import contextlib
import contextvars
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from fastgen_jax.engine.blocks import BlockMap
from fastgen_jax.engine.types import Output, Request, Stats
from fastgen_jax.errors import ContextLengthExceeded, QueueFull, RequestError
from fastgen_jax.sampling_params import Pooling, SamplingParams
from fastgen_jax.server import origin
from fastgen_jax.server.attainment import Attainment
from fastgen_jax.server.config import METRICS_PREFIXES, ServerConfig
from fastgen_jax.server.errors import CLIENT_GONE, ApiError, from_engine, internal, unavailable
from fastgen_jax.server.generation import PLAIN, SILENT, Choice, Generation, Voice
from fastgen_jax.server.journal import Journal, tracer_to
from fastgen_jax.server.limits import Limits
from fastgen_jax.server.metrics import Metrics, cache_labels
from fastgen_jax.server.profiler import Profiler
from fastgen_jax.server.trial import Trial
from fastgen_jax.server.uploads import Uploads
from fastgen_jax.tokenizer import Constrainer, Constraints, TextStream, Tokenizer, needs_words

if TYPE_CHECKING:
    from fastgen_jax.engine.engine import Engine

log = logging.getLogger("fastgen_jax.server")

INLINE_BYTES = 2000  # a body up to this size is read on the event loop: 0.5 ms, 10 at worst
LOAD_RETRY_AFTER = 5
ENGINE_EXIT_TIMEOUT = 2.0
N_COMPILING = 4  # requests whose form is compiled at once; those that are tried take turns
UPDATING = "updating"  # the engine's weights
NONFINITE_SHARE = 0.5  # of the rows sampled lately; more of them and the server is not ready

UNCONSTRAINED = Constraints()

Result = TypeVar("Result")
OnPhase = Callable[[str, int, int], None]


class Backend(NamedTuple):
    """What a load yields: an engine that can serve, and the text side of its model."""

    engine: "Engine"
    tokenizer: Tokenizer


class Phase(NamedTuple):
    """Where the server stands: starting, loading, compiling, ready, draining or failed."""

    name: str
    done: int = 0
    total: int = 0


class Service:
    """Owns the engine thread and every live Generation.

    INVARIANT: `_live` holds exactly the request ids that are neither finished nor cancelled.

    Args:
        load: makes the backend; called in the engine's thread with a callback for its progress.
        model_names: what clients see; the first is the answer's `model` where a request names none.
        model_aliases: further names that requests may use.
        hub_id: where clients find the model, and its tokenizer, if it has such a place.
        on_phase: called at each change of phase, in the thread where it happens.
    """

    def __init__(
        self,
        load: Callable[[OnPhase], Backend],
        config: ServerConfig,
        *,
        model_names: Sequence[str],
        model_aliases: Sequence[str] = (),
        hub_id: str | None = None,
        on_phase: OnPhase = lambda name, done, total: None,
    ):
        self.config = config
        self.model_names = list(model_names)
        self.hub_id = hub_id
        self.accepted_models = frozenset((*model_names, *model_aliases))
        self.metrics = Metrics(
            self.model_names[0],
            METRICS_PREFIXES[config.metrics_prefix],
            Attainment(config.sla, config.sla_window),
        )
        self.journal = Journal(
            self.metrics,
            tells_requests=config.log_format == "json",
            tracer=tracer_to(config.otlp_traces_endpoint, self.model_names[0]),
        )
        self.backend: Backend | None = None
        self.phase = Phase("starting")
        self.load_error: BaseException | None = None
        self.failure: str | None = None  # why the engine has given up
        self.change = ""  # what is being done to the engine, which is well; see admin
        self.limits = Limits(
            config.max_requests_per_key or None,
            config.max_tokens_per_minute or None,
            self.metrics.n_limited,
        )
        self.uploads = Uploads(config.max_upload_bytes)
        self.profiler = Profiler(config.profile)
        self.n_inflight = 0  # HTTP requests that may use the engine
        self.created = int(time.time())
        self._load = load
        self._on_phase = on_phase
        self._started = time.monotonic()
        self._busy_since = 0.0
        self._live: dict[int, tuple[Generation, int]] = {}  # request id -> its first choice
        self._loop: asyncio.AbstractEventLoop | None = None
        self._attached = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fastgen-engine", daemon=True)
        self._tokenizing = ThreadPoolExecutor(2, thread_name_prefix="fastgen-tokenize")
        self._compiling = ThreadPoolExecutor(N_COMPILING, thread_name_prefix="fastgen-grammar")
        self._trial: Trial | None = None
        self._constrainer: Constrainer | None = None

    def start(self):
        """Begins to load, in the engine's thread."""
        self._thread.start()

    def attach(self, loop: asyncio.AbstractEventLoop):
        """Names the event loop that outputs go to. Until then the engine does not run."""
        self._loop = loop
        self._attached.set()

    def drain(self):
        """Refuses new work from now on."""
        self._set_phase("draining", 0, 0)

    def abort_all(self, error: ApiError):
        """Ends every live request with `error`."""
        for generation in {id(g): g for g, _ in self._live.values()}.values():
            self.fail(generation, error)

    def stop(self) -> bool:
        """Ends the engine's threads; False if one still loads or compiles, which nothing can
        interrupt.
        """
        self._attached.set()
        self.journal.close()
        for pool in (self._tokenizing, self._compiling):
            pool.shutdown(wait=False, cancel_futures=True)
        if self._trial is not None:
            self._trial.close()
        if self.backend is not None:
            self.backend.engine.stop()
            self._thread.join(ENGINE_EXIT_TIMEOUT)
            if self.backend.engine.is_compiling:
                return False
        return not self._thread.is_alive()

    def _run(self):
        """The engine's thread. Catches all: whatever happens here, every waiter hears of it."""
        try:
            backend = self._load(self._set_phase)
        except BaseException as error:
            self.load_error = error
            self._set_phase("failed", 0, 0)
            return
        self._attached.wait()
        self._call(self._become_ready, backend)
        error = None
        try:
            backend.engine.run(self._deliver)
        except BaseException as caught:
            error = caught
            log.critical("the engine has given up: %s", type(error).__name__, exc_info=error)
        self._call(self._engine_ended, error)

    def _deliver(self, outputs: list[Output]):
        if outputs:
            self._call(self._take, outputs)

    def _call(self, function: Callable, *args):
        """Runs `function` on the event loop; nothing if that is closed already."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(function, *args)

    def _set_phase(self, name: str, done: int, total: int):
        if name == "ready":  # the engine is; the server is once its loop runs
            return
        if self.phase.name != "draining" or name == "failed":
            self.phase = Phase(name, done, total)
        self._on_phase(name, done, total)

    def _become_ready(self, backend: Backend):
        engine, tokenizer = self.backend = backend
        engine.end_at(tokenizer.eos_token_ids)
        vocab_size = engine.model_config.vocab_size
        self._constrainer = Constrainer(tokenizer, vocab_size, engine.eos_token_ids)
        self._trial = Trial(tokenizer.as_json, vocab_size, engine.eos_token_ids)
        self.metrics.cache = cache_labels(engine.config)
        if self.phase.name != "draining":
            self.phase = Phase("ready")
        self._on_phase("ready", 0, 0)

    def _engine_ended(self, error: BaseException | None):
        """The engine's loop is over: after stop() that is the end, else a failure."""
        if error is not None:
            stats = self.stats()
            n_failed = stats.n_failed_steps if stats else 0
            name = type(error).__name__
            self.failure = f"the engine gave up after {n_failed} failed steps, the last with {name}"
        if error is not None or self.phase.name != "draining":
            self._set_phase("failed", 0, 0)
        self.abort_all(internal("the engine stopped while it worked on this request"))

    @property
    def must_exit(self) -> bool:
        """Whether only another process can serve: one that a supervisor starts."""
        has_failed = self.failure is not None and self.config.on_engine_failure == "exit"
        return has_failed or self.load_error is not None

    @property
    def is_stalled(self) -> bool:
        """Whether requests wait and no step has finished for step_timeout."""
        stats = self.stats()
        if stats is None or not self._live:
            return False
        newest = max(stats.last_step_time, self._busy_since)
        return time.monotonic() - newest > self.config.step_timeout

    def stats(self) -> Stats | None:
        return self.backend.engine.stats() if self.backend is not None else None

    def map_blocks(self, receive: Callable[[BlockMap], None]):
        """Has the engine tell, soon and on the event loop, which KV block is what."""
        if self.backend is not None:
            self.backend.engine.map_blocks(lambda found: self._call(receive, found))

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether the next request can be served, and the reason if not."""
        name, done, total = self.phase
        if name == "ready":
            return self._health_when_ready()
        if self.failure is not None:
            return False, {"phase": "failed", "reason": self.failure}
        elapsed = round(time.monotonic() - self._started, 1)
        return False, {"phase": name, "done": done, "of": total, "elapsed_s": elapsed}

    def _health_when_ready(self) -> tuple[bool, dict[str, Any]]:
        stats = self.stats()
        if self.change not in ("", UPDATING):  # requests wait, for who knows how long
            return False, {"phase": self.change}
        if self.is_stalled:
            reason = f"no step has ended for {self.config.step_timeout:g} s"
            return False, {"phase": "stalled", "reason": reason}
        if stats and stats.nonfinite_share > NONFINITE_SHARE:
            share = (
                f"{stats.nonfinite_share:.0%} of the newest tokens had logits that are not finite"
            )
            return False, {"phase": "failing", "reason": f"{share}: are the weights damaged?"}
        state: dict[str, Any] = {"phase": self.change or "ready"}
        return True, state if stats is None else state | _programs(stats)

    def refusal(self) -> ApiError | None:
        """Why new work is refused now; None if it is welcome."""
        name, done, total = self.phase
        if name == "ready":
            return None
        if name == "draining":
            return unavailable("the server is shutting down", "draining", 1, close=True)
        if name == "failed":
            return unavailable("the engine has failed; the server needs a restart", "failed", 30)
        progress = f" ({done}/{total})" if total else ""
        message = f"the model is not ready yet: {name}{progress}"
        return unavailable(message, "loading", LOAD_RETRY_AFTER)

    def require_backend(self) -> Backend:
        """The backend.

        Raises:
            ApiError: new work is refused.
        """
        refusal = self.refusal()
        if refusal is not None:
            raise refusal
        assert self.backend is not None, self.phase
        return self.backend

    def check_queue(self):
        """Refuses a request that the engine could not take now, whatever it asks for; any thread.

        Raises:
            ApiError: the queue is full.
        """
        if self.backend is not None and self.backend.engine.is_full:
            raise from_engine(QueueFull("the queue is full; try again later"))

    async def run_text(self, n_bytes: int, function: Callable[[], Result]) -> Result:
        """Runs what reads that much text, beside the event loop if it is long.

        Raises:
            ApiError: the tokenizer or the chat template refused the text.
        """
        try:
            if n_bytes <= INLINE_BYTES:
                return function()
            loop, context = asyncio.get_running_loop(), contextvars.copy_context()
            return await loop.run_in_executor(self._tokenizing, context.run, function)
        except RequestError as error:
            raise from_engine(error) from None

    async def constraints(self, params: SamplingParams) -> Constraints:
        """What these params constrain; a form is compiled beside the event loop, once it has passed
        its trial.

        Raises:
            ApiError: it cannot be compiled.
        """
        if not needs_words(params):
            return Constraints()
        assert self._constrainer is not None
        assert self._trial is not None
        loop = asyncio.get_running_loop()
        constraints, read = self._constrainer.constraints, self._trial.grammar_text
        try:
            return await loop.run_in_executor(self._compiling, constraints, params, read)
        except RequestError as error:
            raise from_engine(error) from None

    def submit(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        is_streaming: bool,
        param: str = "prompt",
        cache_salt: bytes = b"",
        owner: bytes = b"",
        priority: int = 0,
        constraints: Constraints = UNCONSTRAINED,
        voice: Voice = PLAIN,
        timeout: float | None = None,
    ) -> Generation:
        """Hands the prompts, which the field `param` held, to the engine: all or none. They share
        cached prefixes with requests of the same salt only. Answers are read as `voice` says.

        Args:
            owner: who asks, and is charged for it.
            timeout: seconds that the request may take from now on; request_timeout is the most.

        Raises:
            ApiError: the engine refused.
        """
        fields = {"params": params, "cache_salt": cache_salt, "priority": priority}
        fields |= constraints._asdict()
        requests = [Request(prompt, **fields) for prompt in prompts]
        return self._enter(
            requests,
            is_streaming=is_streaming,
            param=param,
            voice=voice,
            owner=owner,
            timeout=timeout,
        )

    def embed(
        self,
        prompts: list[list[int]],
        cache_salt: bytes = b"",
        *,
        owner: bytes = b"",
        priority: int = 0,
        timeout: float | None = None,
    ) -> Generation:
        """Hands the prompts to the engine, which makes the embedding of each: all or none. `owner`
        and `timeout` are as in `submit`.

        Raises:
            ApiError: the engine refused.
        """
        pooling = cast(Pooling, self.config.embedding_pooling)
        requests = [Request.to_embed(prompt, pooling, cache_salt, priority) for prompt in prompts]
        return self._enter(
            requests,
            is_streaming=False,
            param="input",
            voice=SILENT,
            owner=owner,
            timeout=timeout,
        )

    def _enter(
        self,
        requests: list[Request],
        *,
        is_streaming: bool,
        param: str,
        voice: Voice,
        owner: bytes,
        timeout: float | None,
    ) -> Generation:
        account = self.limits.of(owner)
        account.check()
        # Admitted first: what a refusal costs must not depend on what the request asks for.
        ids, n_samples = self._admit(requests, param), requests[0].params.n
        with contextlib.ExitStack() as undo:
            undo.callback(self._cancel, ids)
            generation = self._generation(requests, is_streaming, voice)
            undo.pop_all()
        generation.account = account
        account.enter(generation.n_prompt_tokens)
        # Outputs reach _dispatch by the event loop, which runs here: none can come before this.
        if not self._live:
            self._busy_since = generation.arrival
        generation.request_ids = list(ids)
        for i, request_id in enumerate(ids):
            self._live[request_id] = (generation, i * n_samples)
        self._set_deadlines(generation, timeout)
        if (asker := origin.current.get()) is not None:
            asker.generation, generation.request_id = generation, asker.request_id
        return generation

    def _admit(self, requests: list[Request], param: str) -> list[int]:
        try:
            return self.require_backend().engine.submit_all(requests)
        except RequestError as error:
            refused = from_engine(error)
            if error.param == "prompt":  # as the engine calls what came in that field
                refused.param = param
            if isinstance(error, ContextLengthExceeded):
                refused.message = refused.message.replace("the prompt", f"the {param}")
            raise refused from None

    def _generation(self, requests: list[Request], is_streaming: bool, voice: Voice) -> Generation:
        prompts = [request.prompt_token_ids for request in requests]
        params, pooling = requests[0].params, requests[0].pooling
        tokenizer = self.require_backend().tokenizer
        streams = TextStream.of_samples(tokenizer, prompts, params, voice.shown_ids)
        wants_logprobs = params.logprobs is not None
        choices = [Choice(i, stream, wants_logprobs, voice) for i, stream in enumerate(streams)]
        max_tokens = params.max_tokens if pooling is None else None
        return Generation(choices, prompts, is_streaming=is_streaming, max_tokens=max_tokens)

    def _cancel(self, request_ids: list[int]):
        for request_id in request_ids:
            if self.backend is not None:
                self.backend.engine.cancel(request_id)

    def fail(self, generation: Generation, error: ApiError):
        """Ends the request with `error`, unless it has ended; the engine stops working on it."""
        if not generation.is_done:
            generation.error = error
            reason = "abort" if error.status in (CLIENT_GONE, 503) else "error"
            self.metrics.finished[reason] += generation.n_open
            self.metrics.observe_failure(generation, is_fault=reason == "error")
            generation.notify()
        self.release(generation)

    def release(self, generation: Generation):
        """Forgets the request and cancels what the engine still does for it. Idempotent."""
        self._cancel(self._forget(generation))

    def _forget(self, generation: Generation) -> list[int]:
        """Ends the request's bookkeeping; returns its ids that were live."""
        for timer in generation.timers:
            timer.cancel()
        live = [id for id in generation.request_ids if id in self._live]
        for request_id in live:
            del self._live[request_id]
        if live and generation.account is not None:
            generation.account.leave()
        return live

    def _set_deadlines(self, generation: Generation, timeout: float | None):
        def fail_in(seconds: float, message: str) -> asyncio.TimerHandle:
            message = f"{message} within {seconds:g} s"
            error = ApiError(504, message, type="timeout_error", code="deadline_exceeded")
            return loop.call_later(seconds, self.fail, generation, error)

        loop = asyncio.get_running_loop()
        generation.first_token_timer = fail_in(self.config.queue_timeout, "no first token came")
        generation.timers = [generation.first_token_timer]
        limits = [t for t in (timeout, self.config.request_timeout) if t is not None]
        if limits:
            generation.timers.append(fail_in(min(limits), "the request did not finish"))

    def _take(self, outputs: list[Output]):
        with self.profiler.event("text"):
            self._dispatch(outputs)

    def _dispatch(self, outputs: list[Output]):
        """Takes in one step's outputs and wakes the readers, each once."""
        now = time.monotonic()
        touched: dict[int, Generation] = {}
        for output in outputs:
            entry = self._live.get(output.request_id)
            if entry is None:  # finished, failed or cancelled meanwhile
                continue
            generation, first_choice = entry
            choice = generation.choices[first_choice + output.index]
            if choice.finish_reason is None:
                self._push(generation, choice, output, now)
                touched[id(generation)] = generation
        for generation in touched.values():
            generation.notify()
            if generation.n_open == 0:
                self._forget(generation)

    def _push(self, generation: Generation, choice: Choice, output: Output, now: float):
        if output.finish_reason in ("error", "abort"):
            message = output.error or "the engine stopped this request"
            failed = internal if output.finish_reason == "error" else _stopped
            return self.fail(generation, failed(message))
        try:
            if output.prompt_logprobs is not None:
                generation.score(choice, output.prompt_logprobs)
            choice.push(output)
        except Exception as error:  # a fault in one request's text must not reach the others
            fields = {"request_id": generation.request_id}
            message = "reading the output of request %s failed: %s"
            log.error(
                message, fields["request_id"], error, exc_info=error, extra={"fields": fields}
            )
            return self.fail(generation, internal("the output could not be read"))
        if output.token_id is not None:
            self._observe_token(generation, choice, now)
        if choice.finish_reason is not None:
            self._finish(generation, choice, output, now)
        return None

    def _observe_token(self, generation: Generation, choice: Choice, now: float):
        if generation.account is not None and choice.n_tokens:  # none that nobody is told
            generation.account.charge(1)
        if choice.n_tokens <= 1:
            if generation.first_token_timer is not None:
                generation.first_token_timer.cancel()
            choice.first_time = now
            self.metrics.observe("time_to_first_token_seconds", now - generation.arrival)
        else:
            seconds = now - choice.last_time
            self.metrics.observe("inter_token_latency_seconds", seconds)
            choice.pace.add(seconds)
        choice.last_time = now

    def _finish(self, generation: Generation, choice: Choice, output: Output, now: float):
        assert self.backend is not None
        if output.finish_reason is None:  # a stop string, which the engine does not know
            self.backend.engine.finish(output.request_id, output.index)
        generation.n_open -= 1
        self.metrics.finished[choice.finish_reason or "error"] += 1
        self.metrics.observe_sample(generation, choice, now)
        if generation.n_open == 0:
            self.metrics.observe_requests(generation)


def _programs(stats: Stats) -> dict[str, Any]:
    """How many are there: until all are, some batches take longer than they will."""
    counts = {"compiled": stats.n_programs, "of": stats.n_programs_wanted}
    failed = {"failed": stats.n_programs_failed} if stats.n_programs_failed else {}
    return {"programs": counts | failed}


_stopped = functools.partial(unavailable, code="engine_stopped", retry_after=5)
