"""Engine: submit, cancel, step, run. The one owner of sequences, rows and blocks.

A step plans and dispatches batch k+1 before it reads the tokens of batch k, so that the device
never waits for the host: counts advance at dispatch, values arrive one step later. A sequence that
turns out to have ended wastes at most one token, which is discarded. Rows and blocks are released
as soon as no later step needs them: the device runs steps in order, so that a stray write of a step
in flight lands before the next owner's first.
"""

import itertools
import logging
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import wait
from functools import partial
from typing import Any, NamedTuple

from flax import nnx

from fastgen_jax.engine import startup
from fastgen_jax.engine.admission import Admission
from fastgen_jax.engine.batch import Batch
from fastgen_jax.engine.blocks import BlockMap
from fastgen_jax.engine.changes import Change
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.exchange import GIVEN_AWAY, Exchange, check_level
from fastgen_jax.engine.faults import Faults, Trials
from fastgen_jax.engine.history import History
from fastgen_jax.engine.masks import MaskMaker
from fastgen_jax.engine.phases import Phases
from fastgen_jax.engine.placement import Placement
from fastgen_jax.engine.readings import has_finite_readings, read, readings
from fastgen_jax.engine.requests import default_params, eos_token_ids, known_eos, make_sequences
from fastgen_jax.engine.scoring import Scores, token_logprobs
from fastgen_jax.engine.step import StepResult
from fastgen_jax.engine.types import (
    STEP_SIZES,
    FinishReason,
    Output,
    Plan,
    Request,
    Sequence,
    Stats,
    TokenLogprobs,
)
from fastgen_jax.errors import EngineStopped
from fastgen_jax.sampling_params import SamplingParams

log = logging.getLogger("fastgen_jax.engine")

CLOSED = "the engine is closed; make a new one"
PATIENCE = 0.05  # seconds between looks at who steps, and that a step of a sleeping engine takes
NOT_FINITE = "the model produced non-finite logits"
NOTHING_LEFT = "logits processors and what else constrains the output left no token, or NaN or inf"
NOTHING_ALLOWED = "no token is allowed by all of what constrains the output"


class InFlight(NamedTuple):
    """A dispatched step whose tokens have not been read."""

    batch: Batch
    launched: Any


class Failed(NamedTuple):
    """A step that failed; no batch: while it was planned."""

    error: Exception
    batch: Batch | None


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

    Raises:
        ConfigError, CheckpointError, WeightsError: the model cannot be served so; the message says
        what to change.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_phase: startup.OnPhase | None = None,
        module: nnx.Module | None = None,
    ):
        on_phase = on_phase or (lambda phase, done, total: None)
        started = startup.start(config, on_phase, module)
        self.config = c = started.config
        self.model_config = started.model_config
        self.default_params = default_params(started.generation_config)
        self.eos_token_ids = eos_token_ids(started.generation_config, started.model_config)
        self._phases = Phases()
        self.timings = self._phases.seconds
        self.history = History()
        self._runner = started.runner
        self._exchange = Exchange(
            started.runner, started.config, started.model_config, started.reload
        )
        self._placement = Placement(c, self.model_config.longest_window)
        self._admission = Admission(
            max_requests=c.max_queued_requests,
            max_model_len=c.max_model_len,
            n_blocks=self._placement.n_usable_blocks,
            block_size=c.block_size,
            vocab_size=self.model_config.vocab_size,
            has_layers=bool(c.return_hidden_states),
            processors=c.processors,
        )
        self._live: dict[int, Sequence] = {}  # by id, in their turn once they are planned
        self._has_newcomers = False  # among them, who have no place yet
        self._requests: dict[int, list[Sequence]] = {}  # unfinished samples of each
        self._followers: dict[int, list[Sequence]] = {}  # not live until the first sample's token
        self._in_flight: InFlight | None = None
        self._faults, self._trials = Faults(), Trials()
        self._masks = MaskMaker(self.model_config.vocab_size)
        self._counters = dict.fromkeys(
            ("steps", "step_tokens", "prompt", "generated", "prefix_queries", "prefix_hits"), 0
        )
        self._steps_by_size = [0] * (len(STEP_SIZES) + 1)
        self._last_step_time = time.monotonic()
        self._inbox: deque[Command] = deque()
        self._changes: deque[Change] = deque()
        self._undelivered: list[Output] = []  # of what a change did outside of `step`
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._is_stopping = self._is_closed = False
        self._stepping = threading.RLock()  # held by the engine's thread: `close` waits for it
        self._request_ids, self._sequence_ids = itertools.count(), itertools.count()
        self._runner.compile(self._placement.tables, partial(on_phase, "compiling"))
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
        return bool(is_asked or self._requests or self._in_flight or self._undelivered)

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
            for sequence in list(self._requests.get(request_id, ())):
                self._end_with(sequence, "abort", None, outputs)

        self._command(apply)

    def finish(self, request_id: int, index: int) -> None:
        """Ends one sample quietly: its caller has seen enough (a stop string)."""

        def apply(outputs: list[Output]) -> None:
            for sequence in list(self._requests.get(request_id, ())):
                if sequence.index == index:
                    self._end(sequence, "stop")

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
        self._wake.set()

    def close(self) -> None:
        """Stops and, once a step or `run` of another thread has returned, frees weights, cache and
        programs; later steps raise EngineStopped. Idempotent.
        """
        self.stop(CLOSED)
        self._is_closed = True  # whoever steps one step after another stops, and we get the lock
        with self._stepping:
            self._in_flight = None
            self._runner.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def stats(self) -> Stats:
        placement, counters = self._placement, self._counters
        return Stats(
            **self._n_open(),
            n_blocks_used=placement.n_used_blocks,
            n_blocks=placement.n_usable_blocks,
            n_steps=counters["steps"],
            n_step_tokens=counters["step_tokens"],
            steps_by_size=tuple(self._steps_by_size),
            n_prompt_tokens=counters["prompt"],
            n_generated_tokens=counters["generated"],
            n_preemptions=placement.n_preemptions,
            n_prefix_queries=counters["prefix_queries"],
            n_prefix_hits=counters["prefix_hits"],
            n_failed_steps=self._faults.n_failed_steps,
            n_nonfinite=self._faults.n_nonfinite,
            nonfinite_share=self._faults.nonfinite_share,
            last_step_time=self._last_step_time,
        )

    def _n_open(self) -> dict[str, int]:
        n_running = self._placement.n_running
        return {"n_running": n_running, "n_waiting": max(self._admission.n_open - n_running, 0)}

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
            with self._phases.step(self._counters["steps"]):
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
            self._settle(self._changes[0].in_flight, outputs)
            self._changes.popleft().run()

    def _is_due(self, change: Change) -> bool:
        """Whether all have ended that end before it."""
        if change.in_flight != "drain" or self.is_sleeping:
            return True
        if change.last is None:
            begun = (
                i for i, samples in self._requests.items() if any(s.is_dequeued for s in samples)
            )
            change.last = frozenset(begun)
        return change.last.isdisjoint(self._requests)

    def _settle(self, in_flight: str, outputs: list[Output]) -> None:
        """Before a change: nothing is on its way, and nobody shares what was cached before it."""
        previous, self._in_flight = self._in_flight, None
        if previous:
            try:
                self._commit(previous, outputs)
            except Exception as error:
                self._recover(Failed(error, previous.batch), outputs)
        running = [sequence for sequence in self._live.values() if sequence.row >= 0]
        if in_flight != "keep":
            self._placement.preempt(running)
        self._placement.blocks.flush(running)

    def _advance(self, outputs: list[Output]) -> None:
        started = time.monotonic()
        previous, self._in_flight = self._in_flight, None
        failed: Failed | None = None
        batch = None
        try:
            with self._phases.plan:
                plan = self._plan()
            with self._phases.pack:
                batch = self._prepare(plan)
            self._in_flight = self._launch(batch) if batch else None
        except Exception as error:  # XLA's or ours: its requests are tried again
            failed = Failed(error, batch)
        if previous:
            try:
                self._commit(previous, outputs)
            except Exception as error:
                failed = Failed(error, previous.batch)  # the batch launched since has no part in it
        if batch and batch.is_constrained and not failed:
            try:
                self._draw(outputs)
            except Exception as error:
                failed = Failed(error, batch)
        if failed:
            self._recover(failed, outputs)
        self._last_step_time = time.monotonic()
        if batch and not failed:
            self.history.end(
                self._last_step_time - started, n_padded=batch.shape.n_tokens, **self._n_open()
            )

    def _plan(self) -> Plan:
        self._line_up()
        live = self._live
        if self._changes and (last := self._changes[0].last) is not None:  # the others wait for it
            live = {id: s for id, s in live.items() if s.request_id in last}
        sequences = self._trials.defendants(live)
        if len(sequences) < len(live):  # on trial, alone
            others = (s for s in live.values() if s is not sequences[0])
            self._placement.preempt(s for s in others if s.row >= 0)
        return self._placement.plan(sequences)

    def _line_up(self) -> None:
        """Puts the live sequences in their turn."""
        if self._has_newcomers:
            turns = sorted(self._live.values(), key=lambda sequence: sequence.turn)
            self._live = {sequence.id: sequence for sequence in turns}
            self._has_newcomers = False

    def _prepare(self, plan: Plan) -> Batch | None:
        """Applies a plan: rows, blocks and counts change here."""
        self.history.begin(plan)
        admitted = [chunk.sequence for chunk in plan.chunks if chunk.sequence.row < 0]
        batch = self._placement.prepare(plan, self._runner.shapes)
        for sequence in admitted:
            self._dequeue(sequence)
        n_tokens = 0
        for sequence, n_new, _ in plan.chunks:
            n_tokens += n_new
            sequence.n_cached += n_new
            if sequence.n_cached == sequence.n_tokens:
                sequence.n_tokens += 1
                if sequence.n_tokens == sequence.max_tokens:
                    del self._live[sequence.id]
                    self._placement.retire(sequence)
        self._counters["step_tokens"] += n_tokens
        self._steps_by_size[bisect_left(STEP_SIZES, n_tokens)] += n_tokens > 0
        return batch

    def _launch(self, batch: Batch) -> InFlight:
        with self._phases.dispatch:
            launched = self._runner.dispatch(batch, self._placement.tables)
        self._counters["steps"] += 1
        return InFlight(batch, launched)

    def _draw(self, outputs: list[Output]) -> None:
        """Makes the masks of the step in flight, for which all tokens before are known by now."""
        assert self._in_flight is not None
        batch, launched = self._in_flight
        with self._phases.mask:
            masks = self._masks.make(batch.sampled, batch.shape.n_hidden)
            for sequence in batch.sampled:
                constraint = sequence.constraint
                if constraint and constraint.problem and not sequence.is_finished:
                    self._end_grammar(sequence, outputs)
        with self._phases.dispatch:
            launched = self._runner.draw(batch, launched, masks)
        self._in_flight = InFlight(batch, launched)

    def _end_grammar(self, sequence: Sequence, outputs: list[Output]) -> None:
        """Ends a sample whose grammar goes no further: it is complete, or it has failed."""
        assert sequence.constraint is not None
        problem = sequence.constraint.problem
        if problem:
            self._end_with(sequence, "error", f"the grammar failed: {problem}", outputs)
        else:
            self._end_with(sequence, "stop", None, outputs)

    def _commit(self, step: InFlight, outputs: list[Output]) -> None:
        """Reads a step's tokens; extends the sequences that live, ends those that are done."""
        with self._phases.wait:
            result = self._runner.fetch(step.launched)
            read(self._runner, step.batch, step.launched)
        with self._phases.commit:
            self._take(step.batch, result, outputs)

    def _take(self, batch: Batch, result: StepResult, outputs: list[Output]) -> None:
        tokens, is_finite = result.token_ids.tolist(), result.is_finite.tolist()
        is_possible = result.is_possible.tolist()
        n_rows = n_bad = 0
        asks_nothing = not (batch.scored or batch.is_pooled or batch.has_states)
        for i, sequence in enumerate(batch.sampled):
            if sequence.finish_reason is not None:
                continue  # it ended while this step ran
            n_rows += 1
            if not is_finite[i] or not (asks_nothing or has_finite_readings(sequence)):
                n_bad += 1
                self._end_with(sequence, "error", NOT_FINITE, outputs)
                continue
            if sequence.is_silent:
                self._end_prompt(sequence, outputs)
                continue
            if not is_possible[i]:
                problem = NOTHING_LEFT if sequence.params.extra_args else NOTHING_ALLOWED
                self._end_with(sequence, "error", problem, outputs)
                continue
            self._extend(sequence, tokens[i], read_logprobs(result, i, sequence.params), outputs)
        self._trials.acquit(batch)
        self._faults.step_succeeded(n_rows, n_bad)

    def _recover(self, failed: Failed, outputs: list[Output]) -> None:
        """After a failed step: everybody recomputes, those who were in it first and alone; who was
        alone in it because of another one ends with an error.

        Raises the step's error if that was one too many.
        """
        error, batch = failed
        if self._exchange.is_lost:  # nobody's fault who is here
            log.error(GIVEN_AWAY)
            outputs += self._end_all("error", GIVEN_AWAY)
            self._lose_everything()
            return
        self._faults.step_failed(error, batch, self.stats())
        planned_for = self._trials.defendants(self._live)
        in_it = batch.reached() if batch else [(s, s.n_tokens) for s in planned_for]
        self._lose_everything()
        for sequence in self._trials.accuse(in_it):
            problem = f"the step failed twice: {type(error).__name__}"
            self._end_with(sequence, "error", problem, outputs)
        if self._faults.is_final:
            raise error

    def _lose_everything(self) -> None:
        """As at the start, but for what is known of the sequences."""
        self._in_flight = None
        held_back = {s.id for followers in self._followers.values() for s in followers}
        sequences = list(itertools.chain.from_iterable(self._requests.values()))
        self._placement.lose(sequences)
        for sequence in sequences:
            # Tokens of a lost step were counted; a sequence that had retired lives again.
            sequence.n_tokens = sequence.n_prompt + len(sequence.output_ids)
        self._join([s for s in sequences if s.id not in held_back])
        self._runner.reset()

    # Life of a sequence.

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

        def apply(outputs: list[Output]) -> None:
            self._requests[request_id] = samples
            n_first = 1 if self._placement.blocks.has_prefix(samples[0]) else len(samples)
            self._join(samples[:n_first])
            if n_first < len(samples):
                self._followers[request_id] = samples[n_first:]

        return apply

    def _join(self, sequences: list[Sequence]) -> None:
        """Makes these live."""
        self._live |= {sequence.id: sequence for sequence in sequences}
        self._has_newcomers |= bool(sequences)

    def _follow(self, request_id: int) -> None:
        """Lets the other samples of a request in: the prompt that they share is in the cache, or
        never will be.
        """
        self._join(self._followers.pop(request_id, []))

    def _dequeue(self, sequence: Sequence) -> None:
        """Its prompt waits no more, the first time that it gets a row, or for ever."""
        if sequence.is_dequeued:
            return
        sequence.is_dequeued = True
        self._admission.dequeue(sequence.n_prompt)
        sequence.start_time = time.monotonic()
        if sequence.row >= 0 and self._placement.blocks.may_share(sequence):
            sequence.n_reused = sequence.n_cached
            self._counters["prefix_queries"] += sequence.n_prompt
            self._counters["prefix_hits"] += sequence.n_reused

    def _extend(
        self,
        sequence: Sequence,
        token: int,
        logprobs: TokenLogprobs | None,
        outputs: list[Output],
    ) -> None:
        """One more token; the end of the sample if it is its last."""
        sequence.output_ids.append(token)
        n_output = len(sequence.output_ids)
        self._counters["generated"] += 1
        reason: FinishReason | None = None
        stop_reason = None
        constraint = sequence.constraint
        is_over = False
        if token in sequence.ending_ids:
            reason = "stop"
            stop_reason = token if token in sequence.params.stop_token_ids else None
        elif constraint is not None and not constraint.advance(token):
            is_over = True
        elif sequence.n_prompt + n_output == sequence.max_tokens:
            reason = "length"
        output = Output(
            sequence.request_id, sequence.index, token, logprobs, reason, stop_reason,
            n_reused=sequence.n_reused, start_time=sequence.start_time,
        )  # fmt: skip
        if n_output == 1 and sequence.scoring is not None:
            output = output._replace(**readings(sequence))
        outputs.append(output)
        self._placement.blocks.publish(sequence)
        if n_output == 1:
            self._counters["prompt"] += sequence.n_prompt
            self._follow(sequence.request_id)
        if reason:
            self._end(sequence, reason)
        elif is_over:
            self._end_grammar(sequence, outputs)

    def _end_prompt(self, sequence: Sequence, outputs: list[Output]) -> None:
        """Ends one of which nothing is wanted but what its prompt left."""
        reason: FinishReason = "length" if sequence.params.max_tokens == 0 else "stop"
        outputs.append(
            Output(
                sequence.request_id, sequence.index, None, finish_reason=reason,
                n_reused=sequence.n_reused, start_time=sequence.start_time, **readings(sequence),
            )
        )  # fmt: skip
        self._placement.blocks.publish(sequence)
        self._counters["prompt"] += sequence.n_prompt
        self._end(sequence, reason)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        self._dequeue(sequence)
        self._placement.release(sequence)
        self._live.pop(sequence.id, None)
        self._trials.drop(sequence)
        self._admission.leave()
        samples = self._requests[sequence.request_id]
        samples.remove(sequence)
        followers = self._followers.get(sequence.request_id, [])
        if sequence in followers:
            followers.remove(sequence)
        else:
            self._follow(sequence.request_id)
        if not samples:
            del self._requests[sequence.request_id]

    def _end_with(
        self, sequence: Sequence, reason: FinishReason, error: str | None, outputs: list[Output]
    ) -> None:
        """Ends a sample by an event that carries no token."""
        self._end(sequence, reason)
        outputs.append(
            Output(sequence.request_id, sequence.index, None, finish_reason=reason, error=error)
        )

    def _end_all(self, reason: FinishReason, error: str | None) -> list[Output]:
        outputs: list[Output] = []
        with self._lock:
            while self._inbox:
                self._inbox.popleft()(outputs)
        for sequence in list(itertools.chain.from_iterable(self._requests.values())):
            self._end_with(sequence, reason, error, outputs)
        self._in_flight = None
        return outputs


def read_logprobs(result: StepResult, i: int, params: SamplingParams) -> TokenLogprobs | None:
    """What a request asked to know of row i."""
    if params.logprobs is None:
        return None
    scores = Scores(result.logprobs, result.top_ids, result.top_logprobs)
    return token_logprobs(scores.cut(i, i + 1), params.logprobs)[0]
