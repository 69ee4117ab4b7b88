"""Pipeline: plans, dispatches and reads steps, one step ahead of the tokens that it has read.

Step k+1 is dispatched before the tokens of step k are read, so that the device never waits for the
host: counts advance at dispatch, values arrive one step later. A sequence that turns out to have
ended wastes at most one token, which is discarded. Rows and blocks are released as soon as no later
step needs them: the device runs steps in order, so that a stray write of a step in flight lands
before the next owner's first.
"""

import logging
import time
from bisect import bisect_left
from typing import Any, NamedTuple

from fastgen_jax.engine.batch import Batch
from fastgen_jax.engine.exchange import GIVEN_AWAY, is_lost
from fastgen_jax.engine.faults import Faults
from fastgen_jax.engine.history import History
from fastgen_jax.engine.lives import Lives
from fastgen_jax.engine.masks import MaskMaker
from fastgen_jax.engine.phases import Phases
from fastgen_jax.engine.placement import Placement
from fastgen_jax.engine.readings import has_finite_readings, read
from fastgen_jax.engine.runner import Runner
from fastgen_jax.engine.scoring import Scores, token_logprobs
from fastgen_jax.engine.step import StepResult
from fastgen_jax.engine.types import STEP_SIZES, Output, Plan, TokenLogprobs
from fastgen_jax.sampling_params import SamplingParams

log = logging.getLogger("fastgen_jax.engine")

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


class Pipeline:
    """One caller at a time, the engine's thread.

    INVARIANT: at most one step is in flight; it holds the newest counts of its sequences.
    """

    def __init__(self, runner: Runner, placement: Placement, lives: Lives, *, vocab_size: int):
        self.in_flight: InFlight | None = None
        self.phases, self.history, self.faults = Phases(), History(), Faults()
        self.n_steps = self.n_tokens = 0  # dispatched
        self.steps_by_size = [0] * (len(STEP_SIZES) + 1)
        self._runner, self._placement, self._lives = runner, placement, lives
        self._masks = MaskMaker(vocab_size)

    def advance(self, outputs: list[Output], only: frozenset[int] | None = None) -> None:
        """One step: plans and dispatches a batch, then reads the tokens of the one before.

        Args:
            only: ids of the requests that may take part; None: all.

        Raises the step's error if that was one too many; see `faults`.
        """
        with self.phases.step(self.n_steps):
            started, previous = time.monotonic(), self.in_flight
            batch, failed = self._start(only)
            if previous:  # the batch launched since has no part in its failure
                failed = self._end(previous, outputs) or failed
            if batch and batch.is_constrained and not failed:
                failed = self._draw(batch, outputs)
            if failed:
                self._recover(failed, outputs)
            elif batch:
                seconds = time.monotonic() - started
                if previous and (newest := self.history.newest):
                    self._placement.took(newest, seconds)
                self.history.end(
                    seconds,
                    n_padded=batch.shape.n_tokens,
                    n_running=self._lives.n_running,
                    n_waiting=self._lives.n_waiting,
                )

    def settle(self, in_flight: str, outputs: list[Output]) -> None:
        """Before a change: nothing is on its way, and nobody shares what was cached before it."""
        previous, self.in_flight = self.in_flight, None
        if previous and (failed := self._end(previous, outputs)):
            self._recover(failed, outputs)
        running = self._lives.running()
        if in_flight != "keep":
            self._placement.preempt(running)
        self._placement.blocks.flush(running)

    def _start(self, only: frozenset[int] | None) -> tuple[Batch | None, Failed | None]:
        """Plans and dispatches the next step."""
        batch = self.in_flight = None
        try:
            with self.phases.plan:
                plan = self._plan(only)
            with self.phases.pack:
                batch = self._prepare(plan)
            if batch:
                with self.phases.dispatch:
                    launched = self._runner.dispatch(batch, self._placement.tables)
                self.in_flight = InFlight(batch, launched)
                self.n_steps += 1
        except Exception as error:  # XLA's or ours: its requests are tried again
            return batch, Failed(error, batch)
        return batch, None

    def _plan(self, only: frozenset[int] | None) -> Plan:
        live = self._lives.in_turn()
        if only is not None:
            live = {id: s for id, s in live.items() if s.request_id in only}
        sequences = self._lives.trials.defendants(live)
        if len(sequences) < len(live):  # on trial, alone
            others = (s for s in live.values() if s is not sequences[0])
            self._placement.preempt(s for s in others if s.row >= 0)
        return self._placement.plan(sequences)

    def _prepare(self, plan: Plan) -> Batch | None:
        """Applies a plan: rows, blocks and counts change here."""
        self.history.begin(plan)
        admitted = [chunk.sequence for chunk in plan.chunks if chunk.sequence.row < 0]
        batch = self._placement.prepare(plan, self._runner.shapes)
        for sequence in admitted:
            self._lives.dequeue(sequence)
        n_tokens = 0
        for sequence, n_new, _ in plan.chunks:
            n_tokens += n_new
            sequence.n_cached += n_new
            if sequence.n_cached == sequence.n_tokens:
                sequence.n_tokens += 1
                if sequence.n_tokens == sequence.max_tokens:
                    self._lives.retire(sequence)
        self.n_tokens += n_tokens
        self.steps_by_size[bisect_left(STEP_SIZES, n_tokens)] += n_tokens > 0
        return batch

    def _draw(self, batch: Batch, outputs: list[Output]) -> Failed | None:
        """Makes the masks of the step in flight, for which all tokens before are known by now."""
        assert self.in_flight is not None
        try:
            with self.phases.mask:
                masks = self._masks.make(batch.sampled, batch.shape.n_hidden)
                for sequence in batch.sampled:
                    constraint = sequence.constraint
                    if constraint and constraint.problem and not sequence.is_finished:
                        self._lives.end_grammar(sequence, outputs)
            with self.phases.dispatch:
                launched = self._runner.draw(batch, self.in_flight.launched, masks)
        except Exception as error:
            return Failed(error, batch)
        self.in_flight = InFlight(batch, launched)
        return None

    def _end(self, step: InFlight, outputs: list[Output]) -> Failed | None:
        """Reads a step's tokens; extends the sequences that live, ends those that are done."""
        try:
            with self.phases.wait:
                result = self._runner.fetch(step.launched)
                read(self._runner, step.batch, step.launched)
            with self.phases.commit:
                self._take(step.batch, result, outputs)
        except Exception as error:
            return Failed(error, step.batch)
        return None

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
                self._lives.end_with(sequence, "error", NOT_FINITE, outputs)
                continue
            if sequence.is_silent:
                self._lives.end_prompt(sequence, outputs)
                continue
            if not is_possible[i]:
                problem = NOTHING_LEFT if sequence.params.extra_args else NOTHING_ALLOWED
                self._lives.end_with(sequence, "error", problem, outputs)
                continue
            self._lives.extend(
                sequence, tokens[i], read_logprobs(result, i, sequence.params), outputs
            )
        self._lives.trials.acquit(batch)
        self.faults.step_succeeded(n_rows, n_bad)

    def _recover(self, failed: Failed, outputs: list[Output]) -> None:
        """After a failed step: everybody recomputes, those who were in it first and alone; who was
        alone in it because of another one ends with an error.

        Raises the step's error if that was one too many.
        """
        error, batch = failed
        if is_lost(self._runner.leaves):  # nobody's fault who is here
            log.error(GIVEN_AWAY)
            self._lives.end_all("error", GIVEN_AWAY, outputs)
            self._lose_everything()
            return
        self.faults.step_failed(error, batch, self._state())
        trials = self._lives.trials
        planned_for = trials.defendants(self._lives.live)
        in_it = batch.reached() if batch else [(s, s.n_tokens) for s in planned_for]
        self._lose_everything()
        for sequence in trials.accuse(in_it):
            problem = f"the step failed twice: {type(error).__name__}"
            self._lives.end_with(sequence, "error", problem, outputs)
        if self.faults.is_final:
            raise error

    def _state(self) -> str:
        lives, placement = self._lives, self._placement
        usage = placement.n_used_blocks / placement.n_usable_blocks
        return f"{lives.n_running} running, {lives.n_waiting} waiting, KV {usage:.0%}"

    def _lose_everything(self) -> None:
        self.in_flight = None
        self._lives.revive()
        self._runner.reset()


def read_logprobs(result: StepResult, i: int, params: SamplingParams) -> TokenLogprobs | None:
    """What a request asked to know of row i."""
    if params.logprobs is None:
        return None
    scores = Scores(result.logprobs, result.top_ids, result.top_logprobs)
    return token_logprobs(scores.cut(i, i + 1), params.logprobs)[0]
