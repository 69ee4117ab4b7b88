"""Lives: every unfinished sequence, from its entry to the event that ends it.

Who lives has something to compute; who has retired waits for the tokens of a last step; followers
wait for the prompt that they share with the first sample of their request. An end gives back all
that a sequence held, in whatever state it was.
"""

import itertools
import time

from fastgen_jax.engine.admission import Admission
from fastgen_jax.engine.faults import Trials
from fastgen_jax.engine.placement import Placement
from fastgen_jax.engine.readings import readings
from fastgen_jax.engine.types import FinishReason, Output, Sequence, TokenLogprobs


class Lives:
    """One writer: the engine's thread.

    INVARIANT: an open request has samples; each ends once, by an Output with a finish_reason, or
    quietly by `end`. Only live, retired and following sequences are samples of open requests.
    """

    def __init__(self, placement: Placement, admission: Admission):
        self.live: dict[int, Sequence] = {}  # by id, in their turn once `in_turn` was asked
        self.trials = Trials()
        self.n_prompt_tokens = self.n_generated_tokens = 0
        self.n_prefix_queries = self.n_prefix_hits = 0  # tokens of prompts, and those found
        self._placement, self._admission = placement, admission
        self._open: dict[int, list[Sequence]] = {}  # unfinished samples of each request
        self._followers: dict[int, list[Sequence]] = {}  # not live until the first sample's token
        self._has_newcomers = False  # among the live ones, who have no place yet

    @property
    def is_empty(self) -> bool:
        return not self._open

    @property
    def n_running(self) -> int:
        return self._placement.n_running

    @property
    def n_waiting(self) -> int:
        return max(self._admission.n_open - self.n_running, 0)

    def samples(self, request_id: int) -> list[Sequence]:
        """Those that are left of a request."""
        return list(self._open.get(request_id, ()))

    def running(self) -> list[Sequence]:
        """The live ones that have a row."""
        return [sequence for sequence in self.live.values() if sequence.row >= 0]

    def begun(self) -> frozenset[int]:
        """Ids of the requests that have computed something."""
        return frozenset(
            i for i, samples in self._open.items() if any(s.is_dequeued for s in samples)
        )

    def are_over(self, request_ids: frozenset[int]) -> bool:
        return request_ids.isdisjoint(self._open)

    def enter(self, samples: list[Sequence]) -> None:
        """A request begins to live: all of its samples, or the first if the others can share what
        it makes of the prompt.
        """
        first = samples[0]
        self._open[first.request_id] = [*samples]
        n_first = 1 if self._placement.blocks.has_prefix(first) else len(samples)
        self.join(samples[:n_first])
        if n_first < len(samples):
            self._followers[first.request_id] = samples[n_first:]

    def join(self, sequences: list[Sequence]) -> None:
        """Makes these live."""
        self.live |= {sequence.id: sequence for sequence in sequences}
        self._has_newcomers |= bool(sequences)

    def _follow(self, request_id: int) -> None:
        """Lets the other samples of a request in: the prompt that they share is in the cache, or
        never will be.
        """
        self.join(self._followers.pop(request_id, []))

    def in_turn(self) -> dict[int, Sequence]:
        """The live sequences by id, in their turn."""
        if self._has_newcomers:
            turns = sorted(self.live.values(), key=lambda sequence: sequence.turn)
            self.live = {sequence.id: sequence for sequence in turns}
            self._has_newcomers = False
        return self.live

    def dequeue(self, sequence: Sequence) -> None:
        """Its prompt waits no more, the first time that it gets a row, or for ever."""
        if sequence.is_dequeued:
            return
        sequence.is_dequeued = True
        self._admission.dequeue(sequence.n_prompt)
        sequence.start_time = time.monotonic()
        if sequence.row >= 0 and self._placement.blocks.may_share(sequence):
            sequence.n_reused = sequence.n_cached
            self.n_prefix_queries += sequence.n_prompt
            self.n_prefix_hits += sequence.n_reused

    def retire(self, sequence: Sequence) -> None:
        """Its last step is on its way."""
        del self.live[sequence.id]
        self._placement.retire(sequence)

    def revive(self) -> None:
        """All of them live, and nothing of them is in the cache, which the device has lost."""
        held_back = {s.id for followers in self._followers.values() for s in followers}
        sequences = self._all()
        self._placement.lose(sequences)
        for sequence in sequences:
            # Tokens of a lost step were counted; a sequence that had retired lives again.
            sequence.n_tokens = sequence.n_prompt + len(sequence.output_ids)
        self.join([s for s in sequences if s.id not in held_back])

    def extend(
        self,
        sequence: Sequence,
        token: int,
        logprobs: TokenLogprobs | None,
        outputs: list[Output],
    ) -> None:
        """One more token; the end of the sample if it is its last."""
        sequence.output_ids.append(token)
        n_output = len(sequence.output_ids)
        self.n_generated_tokens += 1
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
            self.n_prompt_tokens += sequence.n_prompt
            self._follow(sequence.request_id)
        if reason:
            self.end(sequence, reason)
        elif is_over:
            self.end_grammar(sequence, outputs)

    def end_prompt(self, sequence: Sequence, outputs: list[Output]) -> None:
        """Ends one of which nothing is wanted but what its prompt left."""
        reason: FinishReason = "length" if sequence.params.max_tokens == 0 else "stop"
        outputs.append(
            Output(
                sequence.request_id, sequence.index, None, finish_reason=reason,
                n_reused=sequence.n_reused, start_time=sequence.start_time, **readings(sequence),
            )
        )  # fmt: skip
        self._placement.blocks.publish(sequence)
        self.n_prompt_tokens += sequence.n_prompt
        self.end(sequence, reason)

    def end_grammar(self, sequence: Sequence, outputs: list[Output]) -> None:
        """Ends a sample whose grammar goes no further: it is complete, or it has failed."""
        assert sequence.constraint is not None
        problem = sequence.constraint.problem
        if problem:
            self.end_with(sequence, "error", f"the grammar failed: {problem}", outputs)
        else:
            self.end_with(sequence, "stop", None, outputs)

    def end_with(
        self, sequence: Sequence, reason: FinishReason, error: str | None, outputs: list[Output]
    ) -> None:
        """Ends a sample by an event that carries no token."""
        self.end(sequence, reason)
        outputs.append(
            Output(sequence.request_id, sequence.index, None, finish_reason=reason, error=error)
        )

    def end(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a sample quietly, in whatever state it is."""
        sequence.finish_reason = reason
        self.dequeue(sequence)
        self._placement.release(sequence)
        self.live.pop(sequence.id, None)
        self.trials.drop(sequence)
        self._admission.leave()
        samples = self._open[sequence.request_id]
        samples.remove(sequence)
        followers = self._followers.get(sequence.request_id, [])
        if sequence in followers:
            followers.remove(sequence)
        else:
            self._follow(sequence.request_id)
        if not samples:
            del self._open[sequence.request_id]

    def end_all(self, reason: FinishReason, error: str | None, outputs: list[Output]) -> None:
        for sequence in self._all():
            self.end_with(sequence, reason, error, outputs)

    def _all(self) -> list[Sequence]:
        return list(itertools.chain.from_iterable(self._open.values()))
