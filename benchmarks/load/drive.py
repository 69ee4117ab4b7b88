"""When requests are sent: by clients who ask again when they are answered, or at drawn times.

INVARIANT: every turn of every conversation ends in one record. Once several requests running found
nobody listening, the rest are recorded as not sent: a server that died does not hold the run up.
"""

import asyncio
import math
import resource
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.load.client import NO_CONNECTION, NOT_SENT, Asker, Record
from benchmarks.load.workloads import Conversation, Prompt

MAX_IN_VAIN = 5  # requests running that find nobody before the server counts as gone
STAGGER = 0.01  # seconds for each client, within which clients begin; as in FastGen's benchmark


class Run:
    """The conversations that were held, a record for each turn."""

    def __init__(self, asker: Asker):
        self.asker = asker
        self.records: list[Record] = []
        self._n_in_vain = 0

    @property
    def is_server_gone(self) -> bool:
        return self._n_in_vain >= MAX_IN_VAIN

    async def converse(self, conversation: Conversation, due: float | None = None) -> None:
        """Asks turn by turn. Where one fails, the later ones are not sent.

        Args:
            due: when the first one should be sent; now, if that is not said.
        """
        history: list[tuple[Prompt, Prompt]] = []
        is_going = True
        for turn in conversation:
            now = time.perf_counter()
            record = Record(turn.n_prompt, due=now if due is None else due, sent=now)
            due = None
            self.records.append(record)
            if not is_going or self.is_server_gone:
                record.error, record.end = NOT_SENT, now
                continue
            await self.asker.ask(self.asker.body(history, turn), record)
            is_in_vain = record.error == NO_CONNECTION
            self._n_in_vain = self._n_in_vain + 1 if is_in_vain else 0
            is_going = not record.error
            as_ids = isinstance(turn.prompt, list)
            history.append((turn.prompt, record.token_ids if as_ids else record.text))


async def closed(
    run: Run, conversations: Sequence[Conversation], n_clients: int, *, seed: int = 0
) -> None:
    """So many clients, who begin at random within n_clients * STAGGER seconds."""
    starts = np.random.default_rng(seed).uniform(0, STAGGER * n_clients, n_clients)
    left = iter(conversations)

    async def client(start: float) -> None:
        await asyncio.sleep(start)
        for conversation in left:
            await run.converse(conversation)

    await asyncio.gather(*(client(start) for start in starts))


async def opened(
    run: Run,
    conversations: Sequence[Conversation],
    gaps: Sequence[float],
    max_concurrency: int | None = None,
) -> None:
    """Each so many seconds after the one before, whatever becomes of that; those over
    max_concurrency wait, and their time counts from when they are sent.
    """
    room = asyncio.Semaphore(max_concurrency or len(conversations))

    async def converse(conversation: Conversation, due: float) -> None:
        async with room:
            await run.converse(conversation, due)

    due = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for conversation, gap in zip(conversations, gaps, strict=True):
            due += gap
            if not run.is_server_gone:
                await asyncio.sleep(max(due - time.perf_counter(), 0))
            group.create_task(converse(conversation, due))


def cpu_seconds() -> float:
    """What this process has taken."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def arrival_gaps(n: int, rate: float, *, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """Seconds before each of n arrivals: gamma with mean 1 / rate and shape `burstiness`, as vLLM
    draws them. 1 is a Poisson process, less is burstier, more is steadier; an infinite rate is all
    at once.
    """
    if math.isinf(rate):
        return [0.0] * n
    scale = 1 / (rate * burstiness)
    return np.random.default_rng(seed).gamma(burstiness, scale, n).tolist()
