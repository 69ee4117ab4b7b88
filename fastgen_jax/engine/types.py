"""The nouns that travel between the rooms of the engine, in the order in which a request meets
them.

Read these and you know the program: a Request becomes one Sequence per sample; `schedule` turns the
counts of the live sequences into a Plan of Chunks; `pack` turns the Plan into a Batch of arrays; a
step yields Outputs.
"""

from __future__ import annotations

import collections.abc
import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from fastgen_jax.engine.constraint import Constraint
from fastgen_jax.engine.pooling import Pooled
from fastgen_jax.engine.scoring import Scoring, TokenLogprobs
from fastgen_jax.engine.states import States
from fastgen_jax.grammar import Grammar
from fastgen_jax.sampling_params import Pooling, SamplingParams

PRIORITIES = range(-(2**63), 2**63)
FinishReason = Literal["stop", "length", "abort", "error"]


def one_token() -> SamplingParams:
    """Params of those who want none."""
    return SamplingParams(max_tokens=1, temperature=0.0)


@dataclass(frozen=True)
class Request:
    """What a caller asks for: token ids in, `params.n` samples or one embedding out. The engine
    never sees text.

    Cached prefixes are shared among requests of the same salt only.

    Args:
        grammar: what `params.structured_outputs` says, as GrammarCompiler makes it.
        bad_words: what `params.bad_words` says, as runs of token ids.
        pooling: of which hidden states the embedding is made; None: samples are wanted.
        priority: the lower, the earlier its turn; equals take turns as they came.
        scored_from: first position whose token `params.prompt_logprobs` scores; None: 1.
        states_at: positions whose hidden states are wanted, of the layers that the engine's config
            names; None: samples are wanted.
    """

    prompt_token_ids: list[int]
    params: SamplingParams
    cache_salt: bytes = b""
    grammar: Grammar | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    pooling: Pooling | None = None
    priority: int = 0
    scored_from: int | None = None
    states_at: tuple[int, ...] | None = None

    @classmethod
    def to_embed(
        cls,
        prompt_token_ids: list[int],
        pooling: Pooling,
        cache_salt: bytes = b"",
        priority: int = 0,
    ) -> Request:
        """What a caller asks who wants a prompt's embedding."""
        return cls(prompt_token_ids, one_token(), cache_salt, pooling=pooling, priority=priority)

    @classmethod
    def to_read(cls, prompt_token_ids: list[int], positions: tuple[int, ...]) -> Request:
        """What a caller asks who wants hidden states."""
        return cls(prompt_token_ids, one_token(), states_at=positions)

    @property
    def is_silent(self) -> bool:
        """Whether nothing is wanted but what the prompt leaves."""
        wants_vectors = self.pooling is not None or self.states_at is not None
        return wants_vectors or self.params.max_tokens == 0


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample being generated, or one prompt being embedded. The engine is its only writer.

    INVARIANT: n_cached < n_tokens. It owes n_tokens - n_cached tokens to the cache; a chunk that
    pays all of them yields one more token. n_tokens counts a sampled token as soon as its step is
    dispatched; its value reaches `output_ids` one step later. Of one that wants no token the one
    after the prompt is counted too, which ends it, and dropped.
    """

    id: int  # arrival order, never reused
    request_id: int
    index: int  # which of the request's n samples
    prompt_ids: np.ndarray  # i32
    params: SamplingParams
    seed: int  # u32
    max_tokens: int  # prompt and output together, never exceeded by n_tokens
    ending_ids: frozenset[int]  # tokens that end it
    n_tokens: int
    priority: int = 0
    cache_salt: bytes = b""
    constraint: Constraint | None = None
    pooled: Pooled | None = None  # its embedding; None: tokens are wanted
    scoring: Scoring | None = None  # of its prompt
    states: States | None = None  # those wanted; None: tokens are
    is_silent: bool = False  # it ends with its prompt: no token of its own is wanted
    n_cached: int = 0
    row: int = -1  # line of the host tables; -1: waiting
    block_ids: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    n_published: int = 0  # leading blocks offered to the prefix cache
    n_dropped: int = 0  # leading blocks given back, behind every window: 0 in block_ids
    prefix: int = 0  # the pool's number of what these blocks hold; 0: nothing
    is_dequeued: bool = False  # its prompt no longer counts as waiting
    n_bypassed: int = 0  # times one behind it was admitted before it
    n_reused: int = 0  # prompt tokens that the prefix cache held when it was admitted
    start_time: float = 0.0  # time.monotonic() of its first step
    finish_reason: FinishReason | None = None

    @property
    def turn(self) -> tuple[int, int]:
        """The lower of two goes first, and gives way last."""
        return self.priority, self.id

    @property
    def n_prompt(self) -> int:
        return len(self.prompt_ids)

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None


class Chunk(NamedTuple):
    """The next `n_new` tokens of one sequence, for which `n_blocks` further KV blocks are taken."""

    sequence: Sequence
    n_new: int
    n_blocks: int


class Plan(NamedTuple):
    """What one step does: preempt these, then run these chunks (those that owe one token come
    first).
    """

    chunks: list[Chunk]
    preempted: list[Sequence]
    bypassed: list[Sequence]  # waiting ones that one behind them was admitted before


class Output(NamedTuple):
    """One event of one sample: a token, the end, or both. Exactly one event carries a
    finish_reason. An embedding comes with its end; a prompt's scores, from `scored_from` on, come
    with the first event of the first sample.
    """

    request_id: int
    index: int
    token_id: int | None
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None  # the stop token, when one ended it
    error: str | None = None
    n_reused: int = 0  # prompt tokens that came from the prefix cache
    start_time: float = 0.0  # time.monotonic() of its first step
    embedding: np.ndarray | None = None  # f32[D], of any length but finite
    prompt_logprobs: collections.abc.Sequence[TokenLogprobs] | None = None
    hidden_states: np.ndarray | None = None  # f32[L, P, D], finite


# Upper bounds on the tokens of a step, by which Stats counts steps.
STEP_SIZES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Stats:
    """A snapshot of the engine for metrics: gauges of this moment, counters since the start."""

    n_running: int
    n_waiting: int
    n_blocks_used: int
    n_blocks: int
    n_steps: int
    n_step_tokens: int  # that all steps computed
    steps_by_size: tuple[int, ...]  # up to each of STEP_SIZES and above the one before; the rest
    n_prompt_tokens: int
    n_generated_tokens: int
    n_preemptions: int
    n_prefix_queries: int
    n_prefix_hits: int  # tokens
    n_failed_steps: int
    n_nonfinite: int  # samples that ended because their logits were not finite
    nonfinite_share: float  # of the rows sampled lately, from 0 to 1
    n_programs: int  # compiled so far
    n_programs_wanted: int
    n_programs_failed: int  # could not be compiled; larger ones do their work
    last_step_time: float  # time.monotonic() of the newest finished step

    @property
    def kv_usage(self) -> float:
        return self.n_blocks_used / max(self.n_blocks, 1)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
