"""The real engine on a device of integers, whose tokens are wrong when anything of the host is.

A KV cell holds a hash of the cell before it (read through the block table), its token and its
position. The next token is a hash of all cells of the sequence and of its line of sampling
parameters; a hidden state is made of its cell, a score of it and of the token that follows. So a
wrong slot, a stale block, a shared block that is written, a wrong chunk or the wrong seed change
tokens; `oracle` says in a plain loop what they must be.
"""

import dataclasses
import itertools
import math
from collections import deque
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from fastgen_jax.engine import startup
from fastgen_jax.engine.batch import FLOAT_PARAMS, UNKNOWN, Batch, MaskedShape, Shape, unpack
from fastgen_jax.engine.blocks import BlockPool
from fastgen_jax.engine.changes import Change
from fastgen_jax.engine.constraint import mask_width
from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.programs import Programs
from fastgen_jax.engine.requests import sample_seeds
from fastgen_jax.engine.runner import make_shapes
from fastgen_jax.engine.scheduler import Policy
from fastgen_jax.engine.scoring import Scores
from fastgen_jax.engine.step import StepResult
from fastgen_jax.engine.types import Output, Request, Sequence
from fastgen_jax.errors import QueueFull
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.sampling_params import MAX_LOGPROBS, Pooling, SamplingParams

N_WORDS = 2  # tokens 0 and 1, so that prefixes collide
EOS = 2
VOCAB_SIZE = 4
ENGINE_SEED = 11
SALT = b"salt"
MASK = 2**64 - 1
POISON = -1  # in place of a cell: what follows is not finite


def mix(*values: int) -> int:
    """A 64-bit hash of integers, in order."""
    h = 0x9E3779B97F4A7C15
    for value in values:
        h = ((h ^ (value & MASK)) * 0xBF58476D1CE4E5B9) & MASK
        h ^= h >> 29
    return h


def cell(before: int, token: int, position: int) -> int:
    return mix(before, token, position)


def hidden_state(cell: int) -> list[int]:
    """Whole numbers, whose sums are exact in float32."""
    return [cell % 1024, cell // 1024 % 1024]


def score(cell: int, follower: int) -> float:
    """How likely a token is after a cell."""
    return -float(mix(cell, follower) % 4096)


class Draw(NamedTuple):
    """What the fake model says after some cells."""

    token: int
    logprob: float
    is_finite: bool
    is_possible: bool


def draw(
    cells: list[int], line: list[int], bias: list[tuple[int, float]], banned: set[int]
) -> Draw:
    """cells: those that the last token sees."""
    h = mix(*cells, *line, *(mix(token, int(value * 8)) for token, value in bias))
    token = EOS if (h >> 8) % 16 == 0 else (h >> 16) % N_WORDS
    possible = [t for t in range(VOCAB_SIZE) if t not in banned]
    if possible and token in banned:
        token = possible[0]
    is_finite = (h >> 44) % 128 != 0 and POISON not in cells
    return Draw(token, -float((h >> 32) % 4096), is_finite, bool(possible))


BadWords = tuple[tuple[int, ...], ...]


class Ending(NamedTuple):
    """All that one sample must deliver."""

    tokens: list[int]
    logprobs: list[float]
    reason: str
    embedding: np.ndarray | None = None
    states: np.ndarray | None = None
    scores: list[float] | None = None


def forbidden(params: SamplingParams, bad_words: BadWords, output: list[int]) -> set[int]:
    """Tokens that may not follow this output."""
    allowed = params.allowed_token_ids or range(VOCAB_SIZE)
    ends = {w[-1] for w in bad_words if w[:-1] == tuple(output[len(output) - len(w) + 1 :])}
    return set(range(VOCAB_SIZE)) - set(allowed) | ends


def oracle(
    prompt: list[int],
    params: SamplingParams,
    seed: int,
    max_tokens: int,
    window: int | None,
    bad_words: BadWords,
) -> Ending:
    """The tokens of one sample, computed alone and without any cache management."""
    line = [int(np.float32(getattr(params, name)).view(np.int32)) for name in FLOAT_PARAMS]
    line += [max(params.top_k, 0), int(np.uint32(seed).view(np.int32)), params.logprobs or 0]
    line += [len(prompt), len(prompt) + params.min_tokens, bool(params.logit_bias), 0]
    ending = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    bias = sorted((params.logit_bias or {}).items())
    tokens, cells, logprobs = list(prompt), [], []
    while True:
        for position in range(len(cells), len(tokens)):
            cells.append(cell(cells[-1] if cells else 0, tokens[position], position))
        is_early = len(tokens) < len(prompt) + params.min_tokens
        seen = cells[-(window or len(cells)) :]
        banned = forbidden(params, bad_words, tokens[len(prompt) :])
        banned |= ending if is_early else set()
        token, logprob, is_finite, is_possible = draw(seen, line, bias, banned)
        if not is_finite or not is_possible:
            return Ending(tokens[len(prompt) :], logprobs, "error")
        tokens.append(token)
        logprobs.append(logprob)
        if token in ending:
            return Ending(tokens[len(prompt) :], logprobs, "stop")
        if len(tokens) == max_tokens:
            return Ending(tokens[len(prompt) :], logprobs, "length")


def cells_of(prompt: list[int]) -> list[int]:
    tokens = enumerate(prompt)
    return list(itertools.accumulate(tokens, lambda c, t: cell(c, t[1], t[0]), initial=0))[1:]


def silent(request: Request, seed: int, window: int | None) -> Ending:
    """As `oracle`, of one who wants no token."""
    prompt = request.prompt_token_ids
    params = request.params.clone(max_tokens=1, allowed_token_ids=None)
    if oracle(prompt, params, seed, len(prompt) + 1, window, ()).reason == "error":
        return Ending([], [], "error")
    hidden = np.array([hidden_state(c) for c in cells_of(prompt)], np.float32)
    if request.states_at is not None:
        return Ending([], [], "stop", states=hidden[None, request.states_at])
    if request.pooling is None:
        return Ending([], [], "length")
    is_last = request.pooling == "last"
    embedding = hidden[-1] if is_last else hidden.sum(0) / np.float32(len(prompt))
    return Ending([], [], "stop", embedding)


def scores(request: Request) -> list[float]:
    """Of the prompt's tokens, from `scored_from` on."""
    prompt, first = request.prompt_token_ids, request.scored_from or 1
    return list(map(score, cells_of(prompt)[first - 1 :], prompt[first:]))


class Launched(NamedTuple):
    """A dispatched step, with copies of the row tables as the device has them."""

    number: int
    batch: Batch
    row_tables: tuple[np.ndarray, ...]
    masks: np.ndarray | None = None


PHASES = ("dispatch", "draw", "fetch", "pool", "score", "states")


class FakeRunner:
    """The device of integers. It runs a step when its result is fetched: no earlier, in order.

    `fail_next` (one of PHASES) makes the next such call raise, once;
    `failed` is its batch.
    `poison_next` makes one row of the next step that samples non-finite, once, and its newest cell
    too; `poisoned` is its sequence.
    """

    def __init__(self, config: startup.ResolvedConfig, window: int | None = None):
        assert window is None or window >= 2, "a cell is made from the one before"
        self.window = window
        self.block_size = config.block_size
        self.n_rows = config.max_num_seqs
        self.n_cells = config.num_kv_blocks * config.block_size
        self.max_tokens = config.max_model_len
        shapes = make_shapes(
            smallest=1,
            max_batched_tokens=config.max_num_batched_tokens,
            max_seqs=self.n_rows,
            table_width=config.table_width,
            tile=1024,
        )
        self.fails_to_compile = False
        self.programs = Programs(
            self._compile, shapes, lambda shape: MaskedShape(shape.n_hidden, mask_width(VOCAB_SIZE))
        )
        self.is_closed = False
        self.leaves = ()
        self.n_dispatched = self.n_drawn = self.n_fetched = 0
        self.log: list[tuple[str, int]] = []
        self.fail_next: str | None = None
        self.failed: Batch | None = None
        self.poison_next = False
        self.poisoned: Sequence | None = None
        self.row_tables: tuple[np.ndarray, ...] = ()
        self.pooled = np.zeros((0, 2), np.float32)  # these are of the step that was fetched last
        self.states = np.zeros((0, 1, 2), np.float32)
        self.scores = Scores(*np.zeros((3, 0), np.float32))
        self.reset()

    def _compile(self, key: Shape | MaskedShape) -> str:
        if self.fails_to_compile:
            raise RuntimeError("the compiler failed")
        return "a program"

    @property
    def shapes(self) -> list[Shape]:
        return self.programs.ready

    def reset(self) -> None:
        """A new cache, full of junk."""
        junk = mix(self.n_dispatched, 77)
        self.cells = [mix(junk, i) for i in range(self.n_cells)]
        self.token_ids = np.full((self.n_rows + 1, self.max_tokens), junk % 1000, np.int64)
        self.in_flight: deque[Launched] = deque()

    def close(self) -> None:
        self.programs.close()
        self.is_closed = True

    def dispatch(self, batch: Batch, tables) -> Launched:
        assert not self.is_closed
        assert len(self.in_flight) <= 1, "more than one step ahead"
        assert batch.shape in self.programs.made, "there is no such program yet"
        self._check_layout(batch)
        if tables.is_dirty:
            self._upload(tables)
        if self._fails("dispatch", batch):
            raise RuntimeError("the dispatch failed")
        launched = Launched(self.n_dispatched, batch, self.row_tables)
        self.log.append(("dispatch", self.n_dispatched))
        self.n_dispatched += 1
        self.in_flight.append(launched)
        return launched

    def draw(self, batch: Batch, launched: Launched, masks: np.ndarray) -> Launched:
        assert list(self.in_flight) == [launched], "a token that comes before is not known yet"
        assert masks.shape == (batch.shape.n_hidden, mask_width(VOCAB_SIZE))
        assert MaskedShape(*masks.shape) in self.programs.made, "there is no such program yet"
        if self._fails("draw", batch):
            raise RuntimeError("the draw failed")
        self.n_drawn += 1
        self.in_flight[0] = launched._replace(masks=masks)
        return self.in_flight[0]

    def fetch(self, launched: Launched) -> StepResult:
        assert (launched.masks is not None) == launched.batch.is_constrained
        assert self.in_flight.popleft() is launched, "fetched out of order"
        self.log.append(("fetch", launched.number))
        self.n_fetched += 1
        if self._fails("fetch", launched.batch):
            raise RuntimeError("the step failed")
        return self._execute(launched)

    def fetch_pooled(self, launched: Launched) -> np.ndarray:
        assert launched.batch.is_pooled, "hidden states that nobody wants are fetched"
        return self._after_its_run("pool", launched, self.pooled)

    def fetch_scores(self, launched: Launched) -> Scores:
        assert launched.batch.scored, "scores that nobody wants are fetched"
        return self._after_its_run("score", launched, self.scores)

    def fetch_states(self, launched: Launched) -> np.ndarray:
        assert launched.batch.has_states, "hidden states that nobody wants are fetched"
        return self._after_its_run("states", launched, self.states)

    def _after_its_run(self, phase: str, launched: Launched, found: Any) -> Any:
        assert self.log[-1] == ("fetch", launched.number), "it has not run yet"
        if self._fails(phase, launched.batch):
            self.poisoned = None  # nobody hears of it
            raise RuntimeError("the step failed")
        return found

    def _fails(self, phase: str, batch: Batch) -> bool:
        if self.fail_next != phase:
            return False
        self.fail_next, self.failed = None, batch
        return True

    def _upload(self, tables) -> None:
        self.row_tables = tuple(a.copy() for a in (tables.bias_ids, tables.bias, tables.banned_ids))
        tables.is_dirty = False

    def _check_layout(self, batch: Batch) -> None:
        """What every attention kernel is promised."""
        part = unpack(batch.packed, batch.shape)
        n_seqs, n_single, n_samples = part["counts"][:3]
        lengths = np.diff(part["cu_q_lens"])[:n_seqs]
        total = part["cu_q_lens"][n_seqs]
        assert 0 < total <= batch.shape.n_tokens, total
        assert n_seqs <= self.n_rows, n_seqs
        assert (lengths[:n_single] == 1).all(), "chunks of one token come first"
        assert (lengths[n_single:] > 1).all(), lengths
        slots = part["slots"][:total]
        assert len(set(slots.tolist())) == total, "two tokens share a slot"
        assert (slots >= self.block_size).all(), "scratch is written"
        assert not part["slots"][total:].any(), "padding writes outside scratch"
        assert n_samples == (0 if batch.is_constrained else len(batch.sampled))

    def _execute(self, step: Launched) -> StepResult:
        part = unpack(step.batch.packed, step.batch.shape)
        last: dict[int, list[int]] = {}  # a sequence's last token in the batch -> all its cells
        self.pooled = np.zeros((step.batch.shape.n_seqs, 2), np.float32)
        self.states = np.zeros((step.batch.shape.n_tokens, 1, 2), np.float32)
        for i in range(part["counts"][0]):
            start, end = part["cu_q_lens"][i : i + 2].tolist()
            p = np.arange(part["seq_lens"][i])
            blocks = part["block_tables"][i, p // self.block_size]
            slots = (blocks * self.block_size + p % self.block_size).tolist()
            new = part["slots"][start:end].tolist()
            assert slots[-len(new) :] == new, "slots and block table differ"
            for t, slot in zip(range(start, end), new, strict=True):
                self._write(part, t, slot, slots)
                self.states[t, 0] = hidden_state(self.cells[slot])
            for slot in new[part["pooled_from"][i] - start :]:
                self.pooled[i] += hidden_state(self.cells[slot])
            if self.poison_next and end - 1 in part["sample_tokens"][: len(step.batch.sampled)]:
                i = part["sample_tokens"].tolist().index(end - 1)
                self.poison_next, self.poisoned = False, step.batch.sampled[i]
                self.cells[slots[-1]] = POISON
            last[end - 1] = [self.cells[slot] for slot in slots]
        self.scores = self._score(part)
        return self._sample(part, last, step)

    def _write(self, part, t: int, slot: int, slots: list[int]) -> None:
        """Computes the cell of token t of the batch from the cell before it."""
        row, position = int(part["token_rows"][t]), int(part["positions"][t])
        token = int(part["token_ids"][t])
        if token == UNKNOWN:
            token = int(self.token_ids[row, position])
        self.token_ids[row, position] = token
        self.cells[slot] = cell(self.cells[slots[position - 1]] if position else 0, token, position)

    def _score(self, part) -> Scores:
        n_scored, n_tops = part["counts"][3:]
        slots = part["slots"][part["scored_tokens"][:n_scored]].tolist()
        followers = part["scored_ids"][:n_scored].tolist()
        own = np.array([score(self.cells[s], f) for s, f in zip(slots, followers, strict=True)])
        ranks = np.arange(MAX_LOGPROBS)
        top_ids = np.broadcast_to(ranks, (n_scored, MAX_LOGPROBS))
        is_made = ranks < n_tops
        return Scores(own, top_ids, np.where(is_made, own[:, None] - ranks, np.nan))

    def _sample(self, part, last: dict[int, list[int]], step: Launched) -> StepResult:
        bias_ids, bias, banned_ids = step.row_tables
        draws = []
        for i in range(len(step.batch.sampled)):
            row, line = int(part["sample_rows"][i]), part["sample_params"][i].tolist()
            cells = last[int(part["sample_tokens"][i])]
            min_total, has_bias, _ = line[-3:]
            n_biased = np.count_nonzero(bias_ids[row] != UNKNOWN) if has_bias else 0
            pairs = zip(bias_ids[row, :n_biased].tolist(), bias[row].tolist(), strict=False)
            banned = set(banned_ids[row].tolist()) if len(cells) < min_total else set()
            if step.masks is not None:
                banned |= {t for t in range(VOCAB_SIZE) if not step.masks[i, 0] >> t & 1}
            seen = cells[-(self.window or len(cells)) :]
            draws.append(draw(seen, line, sorted(pairs), banned))
            if len(cells) < self.max_tokens:
                self.token_ids[row, len(cells)] = draws[-1].token
        tokens, logprobs, is_finite, is_possible = np.array(draws, float).reshape(-1, 4).T
        ranks = np.arange(MAX_LOGPROBS)
        top_ids = np.broadcast_to(ranks, (len(draws), MAX_LOGPROBS))
        return StepResult(
            tokens.astype(np.int32), logprobs, is_finite != 0, is_possible != 0,
            top_ids, logprobs[:, None] - ranks,
        )  # fmt: skip


def fake_engine(*, window: int | None = None, policy: Policy | None = None, **changes) -> Engine:
    """An Engine on a FakeRunner, small unless told otherwise."""
    sizes = {"max_model_len": 24, "block_size": 2, "num_kv_blocks": 9, "max_num_batched_tokens": 8}
    sizes |= {"max_num_seqs": 4, "max_queued_requests": 1000, "return_hidden_states": (1,)}
    sizes |= changes
    config = startup.ResolvedConfig(
        model="fake", dtype="float32", memory_fraction=0.5, seed=ENGINE_SEED, **sizes
    )
    model_config = ModelConfig(
        family="fake", vocab_size=VOCAB_SIZE, hidden_size=2, n_layers=1, n_heads=1, n_kv_heads=1,
        head_dim=2, ffn_size=2, max_position=1024, eos_token_ids=(EOS,),
        windows=(window,),
    )  # fmt: skip
    started = startup.Started(config, model_config, {}, FakeRunner(config, window))  # type: ignore
    # Whoever wants smaller programs later asks for them.
    no_thread = mock.patch.object(Programs, "go_on")
    with mock.patch.object(startup, "start", return_value=started), no_thread:
        return Engine(config, policy=policy)


class Sample:
    """What one sample has delivered, beside what it must."""

    def __init__(self, expected: Ending):
        self.expected = expected
        self.n_tokens = 0
        self.end: str | None = None  # its terminal event's reason, or "quiet"
        self.is_cancelled = False


class Simulation:
    """Drives an engine, and asserts after every act that all which it must keep true is true."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.runner: FakeRunner = engine._runner  # type: ignore
        self.samples: dict[tuple[int, int], Sample] = {}
        self.bound = 8  # steps that all requests so far may take
        self.n_steps = 0
        self.n_resets = self.n_poisoned = self.n_guilty = 0  # faults that happened
        self.n_gave_way = self.n_outranked = 0  # steps in which some did, and for newcomers
        self.suspects: set[int] = set()  # before the newest step
        self.in_flight: Batch | None = None  # then
        self.n_tokens = 0  # delivered
        self.may_fail = True  # two failures in a row are not simulated
        self.counters: dict[str, float] = {}

    @property
    def pool(self) -> BlockPool:
        return self.engine._placement.blocks.pool  # another one after a failed step

    # Acts.

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        salt: bytes = b"",
        bad_words: BadWords = (),
        priority: int = 0,
        scored_from: int | None = None,
    ) -> None:
        request = Request(prompt, params, salt, bad_words=bad_words, priority=priority)
        self._submit(dataclasses.replace(request, scored_from=scored_from))

    def embed(
        self, prompt: list[int], pooling: Pooling, salt: bytes = b"", priority: int = 0
    ) -> None:
        self._submit(Request.to_embed(prompt, pooling, salt, priority))

    def read(self, prompt: list[int], positions: tuple[int, ...]) -> None:
        self._submit(Request.to_read(prompt, positions))

    def _submit(self, request: Request) -> None:
        n_open = self.engine._admission.n_open
        prompt, params, window = request.prompt_token_ids, request.params, self.runner.window
        try:
            request_id = self.engine.submit(request)
        except QueueFull:
            assert self.engine._admission.n_open == n_open > 0
            return
        bound = self.engine.max_total_tokens
        total = bound if params.max_tokens is None else len(prompt) + params.max_tokens
        for index, seed in enumerate(sample_seeds(ENGINE_SEED, request_id, params)):
            if request.is_silent:
                expected = silent(request, seed, window)
            else:
                expected = oracle(prompt, params, seed, total, window, request.bad_words)
            if index == 0 and params.prompt_logprobs is not None:
                expected = expected._replace(scores=scores(request))
            self.samples[request_id, index] = Sample(expected)
            self.bound += 4 * total + 8
        self.check()

    def cancel(self, request_id: int) -> None:
        self.bound += 1
        self.engine.cancel(request_id)
        for key, sample in self.samples.items():
            sample.is_cancelled |= key[0] == request_id
        self.check()

    def finish(self, request_id: int, index: int) -> None:
        self.bound += 1
        self.engine.finish(request_id, index)
        sample = self.samples.get((request_id, index))
        if sample and not sample.end and not sample.is_cancelled:
            sample.end = "quiet"
        self.check()

    def fail_next(self, phase: str) -> None:
        if self.may_fail:
            self.engine._pipeline.faults._failures.clear()  # the last one was long ago
            self.runner.fail_next = phase
            self.may_fail = False

    def change(self, in_flight: str) -> None:
        """Something happens between two steps, as when other weights come: the same ones. Unless
        cells are kept they are junk afterwards, as when the engine sleeps.
        """
        apply = self.runner.reset if in_flight != "keep" else lambda: None
        self.engine._changes.append(Change(apply, in_flight))
        self.bound += 4 * sum(s.max_tokens for s in self.engine._lives.live.values()) + 1

    def compile_next(self, fails: bool) -> None:
        """One more program is there, or cannot be."""
        programs = self.runner.programs
        n_ready, n_left = len(programs.ready), len(programs._left)
        self.runner.fails_to_compile = fails
        programs.compile_next()
        assert len(programs.ready) == n_ready + (n_left > 0 and not fails)
        assert programs.ready == sorted(programs.ready)

    def step(self) -> None:
        """One step. Unless it fails, something is dispatched while work waits."""
        is_changing = bool(self.engine._changes)
        live, running = list(self.engine._lives.live.values()), self._running()
        self.suspects = set(self.engine._lives.trials._until)
        self.in_flight = self.engine._pipeline.in_flight and self.engine._pipeline.in_flight.batch
        n_dispatched, n_fetched = self.runner.n_dispatched, self.runner.n_fetched
        for output in self.engine.step():
            self._receive(output)
        self.n_steps += bool(live)
        failed = self._check_faults(is_changing)
        for sample in self.samples.values():
            assert sample.end or not sample.is_cancelled, "a cancelled sample goes on"
        if not failed:
            self.may_fail |= self.runner.n_fetched > n_fetched
            is_idle = self.runner.n_dispatched == n_dispatched
            still = [s for s in live if s.id in self.engine._lives.live and not self._is_behind(s)]
            assert not (still and is_idle), "work waits and nothing was dispatched"
            if not self.suspects and not is_changing:
                self._check_turns(running)
        self.check()

    def _is_behind(self, s: Sequence) -> bool:
        """Whether it waits for others to end before a change."""
        last = self.engine._changes[0].last if self.engine._changes else None
        return last is not None and s.request_id not in last

    def drain(self) -> None:
        """Steps until all is done, in a bounded number of steps; then nothing may be held."""
        n_idle = 0
        while self.engine.has_work:
            n_idle = 0 if self.engine._lives.live else n_idle + 1
            assert n_idle < 10, "samples are left and none is live"
            self.step()
            assert self.n_steps <= self.bound, "more steps than the work is worth"
            self.bound += self.runner.fail_next is not None
        for key, sample in self.samples.items():
            assert sample.end, f"sample {key} never ended"
        pool, tables, admission = self.pool, self.engine._placement.tables, self.engine._admission
        assert pool.n_free == pool.n_usable, "blocks are held though all is done"
        assert len(tables.free_rows) == tables.n_rows
        assert admission.n_open == admission.n_queued_tokens == 0
        assert not self.engine._lives._followers and not self.engine._placement.retired
        assert not self.engine._lives.trials._until
        assert self.engine.stats().n_generated_tokens == self.n_tokens

    # What must hold.

    def _receive(self, output: Output) -> None:
        sample = self.samples[output.request_id, output.index]
        expected = sample.expected
        assert sample.end is None, f"event after the end: {output}"
        self._check_scores(output, sample)
        if output.token_id is not None:
            assert sample.n_tokens < len(expected.tokens), f"too many tokens: {output}"
            assert output.token_id == expected.tokens[sample.n_tokens], (output, sample.n_tokens)
            if output.logprobs:
                assert output.logprobs.logprob == expected.logprobs[sample.n_tokens]
                assert all(p == output.logprobs.logprob - i for i, p in output.logprobs.top)
            sample.n_tokens += 1
            self.n_tokens += 1
        sample.end = output.finish_reason
        is_complete = sample.n_tokens == len(expected.tokens)
        if output.finish_reason in ("stop", "length"):
            assert is_complete, output
            assert output.finish_reason == expected.reason
            assert (output.token_id is None) == (not expected.tokens)
            assert np.array_equal(output.embedding, expected.embedding)
            assert np.array_equal(output.hidden_states, expected.states)
        elif output.finish_reason == "abort":
            assert sample.is_cancelled, output
        elif output.finish_reason == "error":
            assert output.error, output
            is_its_own = is_complete and expected.reason == "error"
            assert is_its_own or self._is_struck(output), output

    def _check_scores(self, output: Output, sample: Sample) -> None:
        """They come with the first event, unless the sample fails or is cancelled then."""
        found, is_first = output.prompt_logprobs, sample.n_tokens == 0
        if not is_first or output.finish_reason in ("abort", "error"):
            assert found is None, "scores come late"
        elif sample.expected.scores is None:
            assert found is None, "scores that nobody wants"
        else:
            assert [position.logprob for position in found] == sample.expected.scores, output
            assert all(p == each.logprob - i for each in found for i, p in each.top)

    def _is_struck(self, output: Output) -> bool:
        """Whether a fault that this simulation caused has hit this sample."""
        struck = self._guilty() + [s for s in [self.runner.poisoned] if s]
        return any((s.request_id, s.index) == (output.request_id, output.index) for s in struck)

    def _guilty(self) -> list[Sequence]:
        """Whom a step that failed held alone, because a step with it had failed before."""
        failed = self.runner.failed
        return [s for s in failed.sequences if s.id in self.suspects] if failed else []

    def _check_faults(self, is_changing: bool) -> bool:
        """Whether this step failed; those that a fault struck must have ended."""
        failed, poisoned, guilty = self.runner.failed, self.runner.poisoned, self._guilty()
        self.runner.failed = self.runner.poisoned = None
        self.n_guilty += len(guilty)
        assert not guilty or len(failed.sequences) == 1, "a suspect was not alone"
        if (
            self.in_flight and self.in_flight is not failed
        ):  # it went well, and may have cleared them
            guilty = [s for s in guilty if s not in self.in_flight.sequences]
        for s in [*guilty, *([poisoned] if poisoned else ())]:
            assert self.samples[s.request_id, s.index].end, "a sample that was struck goes on"
        if failed:
            self.n_resets += 1
            assert is_changing or not self._running(), "a sequence relies on the lost cache"
        self.n_poisoned += bool(poisoned)
        return bool(failed)

    def _check_turns(self, running: list[Sequence]) -> None:
        """Who gave way among those that ran before the step: the last in turn, and only for others
        before them; for newcomers only of better priority.
        """
        live = [s for s in running if s.id in self.engine._lives.live]
        kept, gave_way = [s for s in live if s.row >= 0], [s for s in live if s.row < 0]
        if not gave_way:
            return
        first, in_flight = gave_way[0], self.engine._pipeline.in_flight
        newcomers = [s for s in in_flight.batch.sequences if s not in running] if in_flight else []
        assert all(s.turn < first.turn for s in kept), "one gave way to one behind it"
        assert all(s.priority < first.priority for s in newcomers), "one gave way to its equal"
        assert newcomers or first is not running[0], "the first in turn was preempted"
        self.n_gave_way += not newcomers
        self.n_outranked += bool(newcomers)

    def _running(self):
        return sorted(
            (s for s in self.engine._lives.live.values() if s.row >= 0), key=lambda s: s.turn
        )

    def check(self) -> None:
        engine, running = self.engine, self._running()
        self.pool.check()
        self._check_blocks(running)
        self._check_rows(running)
        turns = [s.turn for s in engine._lives.live.values()]
        assert engine._lives._has_newcomers or turns == sorted(turns), "the order of turns is lost"
        for s in engine._lives.live.values():
            assert 0 <= s.n_cached < s.n_tokens < s.max_tokens, s
            assert s.row >= 0 or (s.n_cached == 0 and not s.block_ids), "a waiting one holds blocks"
            sample = self.samples[s.request_id, s.index]
            assert engine._inbox or not sample.end, "it ended, but lives on"
        stats = engine.stats()
        assert stats.n_running == len(running)
        holders = [*running, *engine._placement.retired.values()]
        assert stats.n_blocks_used == len({b for s in holders for b in s.block_ids} - {0})
        gauges = ("n_running", "n_waiting", "n_blocks_used", "nonfinite_share")
        counters = {k: v for k, v in stats.as_dict().items() if k not in gauges}
        assert all(v >= self.counters.get(k, v) for k, v in counters.items()), "a counter fell"
        self.counters = counters

    def _check_blocks(self, running) -> None:
        pool, size, window = self.pool, self.engine._placement.limits.block_size, self.runner.window
        holders = [*running, *self.engine._placement.retired.values()]
        held = [b for s in holders for b in s.block_ids[s.n_dropped :]]
        for block in range(1, pool.n_blocks):
            assert pool._ref[block] == held.count(block), f"reference count of block {block}"
        for s in running:
            assert len(s.block_ids) == math.ceil(s.n_cached / size), "blocks and counts differ"
            n_checked = s.n_prompt + len(s.output_ids) - 1  # cells that led to finite logits
            assert s.n_published * size <= n_checked, "unchecked cells are published"
            assert not any(s.block_ids[: s.n_dropped]), "a dropped block is named"
            assert 0 not in s.block_ids[s.n_dropped :], "scratch is held"
            n_unseen = 0 if window is None else max(s.n_cached - window + 1, 0) // size
            assert s.n_dropped <= n_unseen, "a block was dropped that is still seen"
            if s.n_cached % size:
                tail = s.block_ids[-1]
                assert pool._ref[tail] == 1, "a block that will be written is shared"
                assert tail not in pool._published, "a block that will be written is published"
        behind = {published.prefix for published in pool._published.values()}
        for published in pool._published.values():
            is_first = published.parent not in behind  # or what came before was flushed
            n_salt = len(published.tokens) - 4 * size
            assert n_salt in ((0, len(SALT)) if is_first else (0,)), "a partial block is published"

    def _check_rows(self, running) -> None:
        tables = self.engine._placement.tables
        rows = [s.row for s in running]
        assert sorted(rows + tables.free_rows) == list(range(tables.n_rows)), "rows are lost"
        for s in running:
            line = tables.block_tables[s.row].tolist()
            assert line[: len(s.block_ids)] == s.block_ids, "block table and blocks differ"
            assert not any(line[len(s.block_ids) :]), "stale blocks in the table"
