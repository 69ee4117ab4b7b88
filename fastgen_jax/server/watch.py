"""GET /debug/steps: what the engine does, told to people who watch, as server-sent events.

A watcher's first event holds all there is, and `step_fields`; each later one what has changed:
`steps`, gauges and counters, `latency` in seconds, and `blocks`, the class of each KV block.
Numbers and ids of sequences; nobody's tokens.

A task makes each event once for all watchers, while there are any: at most MAX_RATE a second, each
with all steps that ended meanwhile. Who reads too slowly gets another first event in place of those
that wait.
"""

import asyncio
import contextlib
import dataclasses
import math
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import numpy as np
import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastgen_jax.engine.blocks import EVICTABLE, BlockMap
from fastgen_jax.engine.history import StepRecord
from fastgen_jax.engine.types import Stats
from fastgen_jax.server.errors import ApiError, unavailable
from fastgen_jax.server.formats.format import event
from fastgen_jax.server.responses import send_error
from fastgen_jax.server.service import Service
from fastgen_jax.server.stream import SSE_HEADERS, on_disconnect

MAX_WATCHERS = 16
MAX_RATE = 20  # events a second
IDLE_PERIOD = 1.0  # seconds between events while nothing changes
LATENCY_PERIOD = 0.5  # seconds
N_UNREAD = 8  # events that wait for a watcher
BLOCKS_SHARE = 200  # looking at the blocks takes at most one part in so many of the engine's time
MAX_CELLS = 4096  # of the map of blocks; of a larger pool each cell shows several
QUANTILES = (0.5, 0.9, 0.99)
LATENCIES = {"ttft": "time_to_first_token_seconds", "itl": "inter_token_latency_seconds"}
DIGITS = bytes(range(ord("0"), ord("0") + EVICTABLE + 1)).ljust(256, b"-")
# The chunks of a step are [sequence, new tokens, tokens in the cache, tokens known], one after the
# other: those that owed one token first, then those of prompts.
STEP_FIELDS = (
    "number", "end_time", "seconds", "n_padded", "n_running", "n_waiting", "n_preempted", "chunks",
)  # fmt: skip
LIMITS = ("max_num_batched_tokens", "max_num_seqs", "block_size", "max_model_len")
STATS = (
    "n_running", "n_waiting", "n_blocks", "n_prompt_tokens", "n_generated_tokens", "n_preemptions",
    "n_prefix_queries", "n_prefix_hits", "n_steps", "n_failed_steps",
)  # fmt: skip


class Watcher:
    """Events for one reader. INVARIANT: at most N_UNREAD wait."""

    def __init__(self, first: bytes):
        self._events = deque([first])
        self._has_news = asyncio.Event()
        self._has_news.set()
        self._is_over = False

    @property
    def is_behind(self) -> bool:
        return len(self._events) == N_UNREAD

    def put(self, event: bytes):
        self._events.append(event)
        self._has_news.set()

    def restart(self, first: bytes):
        """In place of what waits."""
        self._events.clear()
        self.put(first)

    def end(self):
        self._is_over = True
        self._has_news.set()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Until `end`."""
        while not self._is_over:
            await self._has_news.wait()
            self._has_news.clear()
            while self._events and not self._is_over:
                yield self._events.popleft()


class Watch:
    """All who watch one service. Used on the event loop only."""

    def __init__(self, service: Service):
        self.service = service
        self.watchers: set[Watcher] = set()
        self._task: asyncio.Task | None = None
        self._n_told = 0  # the newest step that was told
        self._last: dict[str, Any] = {}  # what was told last, steps apart: changes are from there
        self._last_time = 0.0
        self._latency: dict[str, list[float]] = {}
        self._latency_time = -math.inf
        self._seen: Stats | None = None  # when somebody looked at the blocks last
        self._next_look = 0.0
        self._blocks: dict[str, Any] | None = None

    @contextlib.contextmanager
    def join(self) -> Iterator[Watcher]:
        """Raises ApiError: there are too many, or the server ends."""
        if self._is_ending:
            raise unavailable("the server is shutting down", "draining", 1, close=True)
        if len(self.watchers) >= MAX_WATCHERS:
            message = f"{MAX_WATCHERS} readers watch the engine already; close one, or try later"
            headers = {"retry-after": "5"}
            raise ApiError(429, message, code="too_many_watchers", headers=headers)
        if self._task is None:
            self._begin()
        watcher = Watcher(self._first_event())
        self.watchers.add(watcher)
        try:
            yield watcher
        finally:
            self.watchers.discard(watcher)

    @property
    def _is_ending(self) -> bool:
        return self.service.phase.name == "draining" or self.service.must_exit

    def _begin(self):
        backend = self.service.backend
        self._n_told = backend.engine.history.n_steps if backend else 0
        self._seen, self._next_look, self._blocks = None, 0.0, None
        self._last = self._state()
        self._task = asyncio.create_task(self._run())

    async def _run(self):
        try:
            await asyncio.sleep(0)  # until the first has joined
            while self.watchers and not self._is_ending:
                self._tell()
                await asyncio.sleep(1 / MAX_RATE)
            for watcher in self.watchers:
                watcher.end()
        finally:
            self._task = None

    def _tell(self):
        """What has changed, if anything has, or it is time for a sign of life."""
        self._look_at_blocks()
        steps, state = self._new_steps(), self._state()
        now = asyncio.get_running_loop().time()
        if not steps and state == self._last and now - self._last_time < IDLE_PERIOD:
            return
        changed = {name: value for name, value in state.items() if value != self._last.get(name)}
        event = event_of({"time": now, "steps": steps, **changed})
        self._last, self._last_time = state, now
        for watcher in self.watchers:
            if watcher.is_behind:
                watcher.restart(self._first_event())
            else:
                watcher.put(event)

    def _first_event(self) -> bytes:
        backend = self.service.backend
        kept = backend.engine.history.since(0) if backend is not None else []
        first = {
            "time": asyncio.get_running_loop().time(),
            "step_fields": STEP_FIELDS,
            "steps": [as_row(step) for step in kept if step.number <= self._n_told],
        }
        return event_of(first | self._last)

    def _new_steps(self) -> list[list[Any]]:
        if self.service.backend is None:
            return []
        steps = self.service.backend.engine.history.since(self._n_told)
        self._n_told = steps[-1].number if steps else self._n_told
        return [as_row(step) for step in steps]

    def _state(self) -> dict[str, Any]:
        """Gauges and counters of this moment."""
        backend, stats = self.service.backend, self.service.stats()
        state: dict[str, Any] = {"health": self.service.health()[1]}
        if backend is None or stats is None:
            return state
        state |= {name: getattr(stats, name) for name in STATS}
        state |= {"engine": self._limits, "latency": self._newest_latency()}
        return state if self._blocks is None else state | {"blocks": self._blocks}

    @property
    def _limits(self) -> dict[str, Any]:
        """What the engine was started with."""
        assert self.service.backend is not None
        config = self.service.backend.engine.config
        return {name: getattr(config, name) for name in LIMITS}

    def _newest_latency(self) -> dict[str, list[float]]:
        """QUANTILES of the newest values; none before there are any."""
        now = asyncio.get_running_loop().time()
        if now - self._latency_time >= LATENCY_PERIOD:
            self._latency_time = now
            histograms = self.service.metrics.histograms
            self._latency = {k: quantiles(histograms[v].newest) for k, v in LATENCIES.items()}
        return self._latency

    def _look_at_blocks(self):
        """Asks the engine's thread, unless nothing has happened since, or too little time has
        passed; the answer comes with the next event.
        """
        stats, now = self.service.stats(), asyncio.get_running_loop().time()
        if stats is None or self.service.backend is None or now < self._next_look:
            return
        stats = dataclasses.replace(stats, last_step_time=0.0)  # which a look changes
        if stats != self._seen:
            self._seen, self._next_look = stats, math.inf
            self.service.map_blocks(self._saw_blocks)

    def _saw_blocks(self, found: BlockMap):
        now = asyncio.get_running_loop().time()
        self._next_look = now + max(1 / MAX_RATE, BLOCKS_SHARE * found.seconds)
        size = -(-len(found.classes) // MAX_CELLS)
        counts = [found.classes.count(c) for c in range(EVICTABLE + 1)]
        self._blocks = {"counts": counts, "cell_size": size, "cells": cells(found.classes, size)}


class StepStream(Response):
    """The events of one watcher, until it leaves or the server ends."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        try:
            with self.watch.join() as watcher, on_disconnect(receive, watcher.end):
                start = {"type": "http.response.start", "status": 200, "headers": SSE_HEADERS}
                await send(start)
                async for event in watcher:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ApiError as error:
            await send_error(error, send)


def event_of(value: dict[str, Any]) -> bytes:
    return event(orjson.dumps(value))


def as_row(step: StepRecord) -> list[Any]:
    """In the order of STEP_FIELDS, its chunks flat."""
    *fields, chunks = step
    return [*fields, [number for chunk in chunks for number in chunk]]


def quantiles(values: Iterable[float]) -> list[float]:
    """Each of QUANTILES: the smallest value which that share does not exceed."""
    ranked = sorted(values)
    return [ranked[math.ceil(q * len(ranked)) - 1] for q in QUANTILES] if ranked else []


def cells(classes: bytes, size: int) -> str:
    """A digit for each `size` blocks: the class that most of them have."""
    if size > 1:
        padded = np.full(-(-len(classes) // size) * size, 255, np.uint8)
        padded[: len(classes)] = np.frombuffer(classes, np.uint8)
        groups = padded.reshape(-1, size)
        counts = [(groups == c).sum(1) for c in range(EVICTABLE + 1)]
        classes = np.argmax(counts, 0).astype(np.uint8).tobytes()
    return classes.translate(DIGITS).decode()
