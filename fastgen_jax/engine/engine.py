"""Engine: submit, cancel, step, run. What any thread asks of it is done by the one that steps.

Requests enter through an inbox, live in `lives`, are computed by `pipeline`, and leave as Outputs.
What must not meet a step on its way to the device (other weights, sleep) waits its turn between
two of them.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import wait
from functools import partial
from typing import Any

from flax import nnx

from fastgen_jax.engine import startup
from fastgen_jax.engine.admission import Admission
from fastgen_jax.engine.blocks import BlockMap
from fastgen_jax.engine.changes import Change
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.exchange import Exchange, check_level
from fastgen_jax.engine.lives import Lives
from fastgen_jax.engine.pipeline import Pipeline
from fastgen_jax.engine.placement import Placement
from fastgen_jax.engine.requests import default_params, eos_token_ids, known_eos, make_sequences
from fastgen_jax.engine.scheduler import Policy
from fastgen_jax.engine.types import FinishReason, Output, Request, Stats
from fastgen_jax.errors import EngineStopped

CLOSED = "the engine is closed; make a new one"
PATIENCE = 0.05  # seconds between looks at who steps, and that a step of a sleeping engine takes

Command = Callable[[list[Output]], None]  # run by the engine's thread before its next step


class Engine:
    """Generates tokens for requests; see the module's docstring for the order of things. `close`
    it, use it in a `with` statement, or drop it: each frees the device's memory and the programs.

    Thread-safe: check, submit, submit_all, cancel, finish, stop, close, stats, is_full, map_blocks,
    history, update_weights, sleep, wake_up, reset_prefix_cache. One thread at a time may call step
    or run.

    Args:
        config: what to load and its limits; `self.config` is the same with nothing left None.
        on_phase: called with (phase, done, total) while loading and compiling.
        module: of fastgen_jax.models, in place of the config's model; its arrays are shared.
        policy: plans steps in place of `schedule`, for experiments.

    Raises:
        ConfigError, CheckpointError, WeightsError: the model cannot be served so; the message says
        what to change.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_phase: startup.OnPhase | None = None,
        module: nnx.Module | None = None,
        policy: Policy | None = None,
    ):
        on_phase = on_phase or (lambda phase, done, total: None)
        started = startup.start(config, on_phase, module)
        self.config = c = started.config
        self.model_config = started.model_config
        self.default_params = default_params(started.generation_config)
        self.eos_token_ids = eos_token_ids(started.generation_config, started.model_config)
        self._runner = started.runner
        self._programs = started.runner.programs
        self._exchange = Exchange(
            started.runner, started.config, started.model_config, started.reload
        )
        self._placement = Placement(c, self.model_config.longest_window, policy)
        self._admission = Admission(
            max_requests=c.max_queued_requests,
            max_model_len=c.max_model_len,
            n_blocks=self._placement.n_usable_blocks,
            block_size=c.block_size,
            vocab_size=self.model_config.vocab_size,
            has_layers=bool(c.return_hidden_states),
            processors=c.processors,
        )
        self._lives = Lives(self._placement, self._admission)
        self._pipeline = Pipeline(
            started.runner, self._placement, self._lives, vocab_size=self.model_config.vocab_size
        )
        self.timings, self.history = self._pipeline.phases.seconds, self._pipeline.history
        self._last_step_time = time.monotonic()
        self._inbox: deque[Command] = deque()
        self._changes: deque[Change] = deque()
        self._undelivered: list[Output] = []  # of what a change did outside of `step`
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._is_stopping = self._is_closed = False
        self._stepping = threading.RLock()  # held by the engine's thread: `close` waits for it
        self._request_ids, self._sequence_ids = itertools.count(), itertools.count()
        self._programs.compile(c.compile, partial(on_phase, "compiling"))
        self._programs.go_on()
        on_phase("ready", 1, 1)

    # Any thread.

    @property
    def max_total_tokens(self) -> int:
        """The longest sequence, prompt and output together, that can be served."""
        return self._admission.max_total_tokens

    @property
    def is_full(self) -> bool:
        """Whether even the smallest request would be refused with QueueFull now."""
        return self._admission.is_full

    @property
    def n_queued_tokens(self) -> int:
        """Prompt tokens of requests that wait for their first token."""
        return self._admission.n_queued_tokens

    @property
    def has_work(self) -> bool:
        is_asked = self._inbox or self._changes
        is_busy = self._pipeline.in_flight or not self._lives.is_empty
        return bool(is_asked or is_busy or self._undelivered)

    @property
    def is_compiling(self) -> bool:
        """Whether a thread makes further programs, which nothing can interrupt."""
        return self._programs.is_compiling

    @property
    def is_sleeping(self) -> bool:
        """Whether requests wait until `wake_up`."""
        return self._exchange.level > 0

    def end_at(self, token_ids: Iterable[int]) -> None:
        """Counts these as end-of-sequence too, in requests that are submitted from now on; not
        those that the model lacks.
        """
        ids = self.eos_token_ids.union(token_ids)
        self.eos_token_ids = known_eos(ids, self.model_config.vocab_size)

    def check(self, request: Request) -> None:
        """Raises what `submit` would, but for QueueFull and EngineStopped; queues nothing."""
        self._admission.check(request)

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
        totals = [self._admission.check(request) for request in requests]
        with self._lock:  # whoever is let in reaches the inbox before a closed engine empties it
            self._admission.enter(requests)
            ids = [next(self._request_ids) for _ in requests]
            for request_id, request, total in zip(ids, requests, totals, strict=True):
                self._command(self._enter(request_id, request, total))
        return ids

    def cancel(self, request_id: int) -> None:
        """Ends what is left of a request with "abort". Unknown and ended ids are ignored."""

        def apply(outputs: list[Output]) -> None:
            for sequence in self._lives.samples(request_id):
                self._lives.end_with(sequence, "abort", None, outputs)

        self._command(apply)

    def finish(self, request_id: int, index: int) -> None:
        """Ends one sample quietly: its caller has seen enough (a stop string)."""

        def apply(outputs: list[Output]) -> None:
            for sequence in self._lives.samples(request_id):
                if sequence.index == index:
                    self._lives.end(sequence, "stop")

        self._command(apply)

    def update_weights(self, source: Any, *, in_flight: str = "recompute") -> None:
        """Replaces weights between two steps, and forgets cached prefixes; returns when both are
        done. Nothing is compiled. Arrays that are on the engine's devices in its dtype and layout
        are shared, others are moved one by one.

        Args:
            source: a module of fastgen_jax.models or a checkpoint's directory, which have all
                weights; a state of such a module, or any tree of arrays by its paths; or a dict of
                arrays by Hugging Face's names. Of the last three some will do. A tree has its
                arrays as one device would (see models.layout), wherever they are.
            in_flight: what becomes of requests that have begun; see changes.IN_FLIGHT.

        Raises:
            WeightsError, CheckpointError, ConfigError: lists everything that does not fit; nothing
                was changed. Only if a weight that does fit cannot be read or moved the engine has
                none afterwards, says so, and sleeps.
            EngineStopped: the engine is closed.
        """
        found = self._exchange.read(source)
        self._change(Change(partial(self._exchange.put, found), in_flight))

    def sleep(self, level: int = 1) -> None:
        """Frees the KV cache, and the device of the weights: level 1 keeps them on the host, level
        2 nowhere. Requests wait until `wake_up`; those that run then compute again what they had
        cached. Where a program shares its arrays with the engine, they stay as long as it holds
        them.

        Raises:
            ConfigError: there is no such level.
            EngineStopped: the engine is closed.
        """
        level = check_level(level)
        self._change(Change(partial(self._exchange.sleep, level)))

    def wake_up(self) -> None:
        """Ends a sleep. Weights of level 2 are those that update_weights has brought meanwhile, or
        else read from the model's directory again, whatever update_weights had made of them.

        Raises:
            WeightsError: there are no weights, and no directory; it sleeps on.
            EngineStopped: the engine is closed.
        """
        self._change(Change(self._exchange.wake_up))

    def reset_prefix_cache(self) -> None:
        """Forgets what is cached of prompts; requests that run keep their own, for themselves.

        Raises:
            EngineStopped: the engine is closed.
        """
        self._change(Change(lambda: None, "keep"))

    def _change(self, change: Change) -> None:
        """Has a change made between two steps, in this thread if no other one steps."""
        self._changes.append(change)
        self._wake.set()
        try:
            while not change.done.done():
                if not self._stepping.acquire(blocking=False):
                    wait([change.done], PATIENCE)
                    continue
                try:
                    self._check_open()
                    self._obey(self._undelivered)
                    if not change.done.done():
                        self._advance(self._undelivered)
                finally:
                    self._stepping.release()
        finally:
            change.done.cancel()  # unless it is done
        change.done.result()

    def stop(self, reason: str = "the engine has stopped") -> None:
        """Accepts no more requests and makes `run` return, ending live requests with "abort"."""
        self._admission.close(reason)
        self._is_stopping = True
        self._programs.stop()
        self._wake.set()

    def close(self) -> None:
        """Stops and, once a step or `run` of another thread has returned, frees weights, cache and
        programs; later steps raise EngineStopped. A program that is being compiled is waited
        for. Idempotent.
        """
        self.stop(CLOSED)
        self._is_closed = True  # whoever steps one step after another stops, and we get the lock
        with self._stepping:
            self._pipeline.in_flight = None
            self._runner.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def stats(self) -> Stats:
        placement, lives, pipeline = self._placement, self._lives, self._pipeline
        return Stats(
            n_running=lives.n_running,
            n_waiting=lives.n_waiting,
            n_blocks_used=placement.n_used_blocks,
            n_blocks=placement.n_usable_blocks,
            n_steps=pipeline.n_steps,
            n_step_tokens=pipeline.n_tokens,
            steps_by_size=tuple(pipeline.steps_by_size),
            n_prompt_tokens=lives.n_prompt_tokens,
            n_generated_tokens=lives.n_generated_tokens,
            n_preemptions=placement.n_preemptions,
            n_prefix_queries=lives.n_prefix_queries,
            n_prefix_hits=lives.n_prefix_hits,
            n_failed_steps=pipeline.faults.n_failed_steps,
            n_nonfinite=pipeline.faults.n_nonfinite,
            nonfinite_share=pipeline.faults.nonfinite_share,
            n_programs=self._programs.n_made,
            n_programs_wanted=self._programs.n_wanted,
            n_programs_failed=self._programs.n_failed,
            last_step_time=self._last_step_time,
        )

    def map_blocks(self, receive: Callable[[BlockMap], None]) -> None:
        """Has the engine's thread tell between two steps, soon, which KV block is what."""
        self._command(lambda outputs: receive(self._placement.blocks.pool.map()))

    def _command(self, apply: Command) -> None:
        self._inbox.append(apply)
        self._wake.set()

    # The engine's thread.

    def run(self, deliver: Callable[[list[Output]], None]) -> None:
        """Steps until `stop`, handing each step's outputs to `deliver`; waits while there is no
        work.

        Raises whatever made the engine give up, after every live request has ended with "error".
        """
        with self._stepping:
            self._run(deliver)

    def _run(self, deliver: Callable[[list[Output]], None]) -> None:
        try:
            while not self._is_stopping:
                self._wake.clear()
                if not self.has_work and not self._is_stopping:
                    self._last_step_time = time.monotonic()
                    self._wake.wait()
                    continue
                outputs = self._step()
                if outputs:
                    deliver(outputs)
            deliver(self._end_all("abort", None))
        except BaseException as error:
            self.stop("the engine has failed; the server must be restarted")
            deliver(self._end_all("error", f"the engine failed: {type(error).__name__}"))
            raise

    def step(self) -> list[Output]:
        """Plans and dispatches the next batch, then reads the tokens of the one before.

        Raises:
            EngineStopped: the engine is closed.
            Exception: what made the last of too many steps fail; see `faults`.
        """
        with self._stepping:
            self._check_open()
            return self._step()

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineStopped(CLOSED)

    def _step(self) -> list[Output]:
        outputs, self._undelivered = self._undelivered, []
        self._obey(outputs)
        if self.is_sleeping:
            self._rest()
        else:
            self._advance(outputs)
        return outputs

    def _rest(self) -> None:
        """What a step is while the engine sleeps: it waits for a while, or until it is asked."""
        self._wake.clear()
        if not (self._inbox or self._changes or self._is_stopping):
            self._wake.wait(PATIENCE)
        self._last_step_time = time.monotonic()

    def _obey(self, outputs: list[Output]) -> None:
        """Does what other threads have asked for."""
        while self._inbox:
            self._inbox.popleft()(outputs)
        while self._changes and self._is_due(self._changes[0]):
            self._pipeline.settle(self._changes[0].in_flight, outputs)
            self._changes.popleft().run()

    def _is_due(self, change: Change) -> bool:
        """Whether all have ended that end before it."""
        if change.in_flight != "drain" or self.is_sleeping:
            return True
        if change.last is None:
            change.last = self._lives.begun()
        return self._lives.are_over(change.last)

    def _advance(self, outputs: list[Output]) -> None:
        draining = self._changes[0].last if self._changes else None  # all others wait for it
        self._pipeline.advance(outputs, draining)
        self._last_step_time = time.monotonic()

    def _enter(self, request_id: int, request: Request, total: int) -> Command:
        """The command that makes a submitted request live."""
        samples = make_sequences(
            request,
            request_id,
            self._sequence_ids,
            max_tokens=total,
            engine_seed=self.config.seed,
            eos_token_ids=self.eos_token_ids,
            vocab_size=self.model_config.vocab_size,
        )

        return lambda outputs: self._lives.enter(samples)

    def _end_all(self, reason: FinishReason, error: str | None) -> list[Output]:
        outputs: list[Output] = []
        with self._lock:
            while self._inbox:
                self._inbox.popleft()(outputs)
        self._lives.end_all(reason, error, outputs)
        self._pipeline.in_flight = None
        return outputs
