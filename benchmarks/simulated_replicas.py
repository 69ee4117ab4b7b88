"""Replicas on devices of their own, by a simulated clock: what placement does, without noise.

Each replica runs Dynamic SplitFuse in steps of STEP + TOKEN * tokens seconds, and keeps the
documents that its newest prompts began with. Placement sees what a router sees: bodies.
"""

import dataclasses
import heapq
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import orjson

from fastgen_jax.cluster.policy import Placement
from fastgen_jax.cluster.ticket import Ticket, read_ticket

STEP, TOKEN = 0.010, 30e-6  # seconds: about an 8B model on one accelerator
MAX_TOKENS, MAX_SEQS = 512, 128  # of a step
N_CACHED = 16  # documents in a replica's prefix cache
N_DOCUMENTS, DOCUMENT = 64, 2000  # and tokens of one
LETTERS = 4  # of a token

IN_TIME = 0.25  # seconds to the first token that goodput counts


@dataclass(eq=False)
class Request:
    """INVARIANT: it has its first token once n_prompt is 0."""

    name: str
    time: float
    document: int | None
    n_prompt: int  # tokens still to read
    n_output: int  # and to write
    ticket: Ticket
    first: float = 0.0  # seconds until its first token


class Replica:
    """One engine: `step` plans the next step, `end` takes in its tokens."""

    def __init__(self, name: str):
        self.name = name
        self.open: list[Request] = []
        self.chunks: list[tuple[Request, int]] = []
        self.n_hits = 0
        self._documents: OrderedDict[int, None] = OrderedDict()

    def add(self, request: Request):
        self.open.append(request)
        if request.document is None:
            return
        if request.document in self._documents:
            request.n_prompt -= DOCUMENT
            self.n_hits += 1
        self._documents[request.document] = None
        self._documents.move_to_end(request.document)
        if len(self._documents) > N_CACHED:
            self._documents.popitem(last=False)

    def step(self) -> float:
        """Its seconds: a token of each who owes one, then chunks in order of arrival."""
        running = self.open[:MAX_SEQS]
        self.chunks = [(request, 1) for request in running if request.n_prompt == 0]
        n_left = MAX_TOKENS - len(self.chunks)
        for request in running:
            n_new = min(request.n_prompt, n_left)
            if n_new:
                self.chunks.append((request, n_new))
                n_left -= n_new
        return STEP + TOKEN * (MAX_TOKENS - n_left)

    def end(self, now: float) -> list[Request]:
        """Those that have all their tokens now."""
        for request, n_new in self.chunks:
            was_read = request.n_prompt == 0
            request.n_prompt -= 0 if was_read else n_new
            if request.n_prompt == 0:
                request.first = request.first if was_read else now - request.time
                request.n_output -= 1
        done = [request for request, _ in self.chunks if request.n_output == 0]
        self.open = [request for request in self.open if request.n_output]
        self.chunks = []
        return done


def requests(n: int, rate: float, seed: int) -> list[Request]:
    """Half of the prompts continue one of N_DOCUMENTS; one answer of ten is long."""
    rng, now, made = random.Random(seed), 0.0, []
    for i in range(n):
        now += rng.expovariate(rate)
        document = rng.randrange(N_DOCUMENTS) if rng.random() < 0.5 else None
        n_own = min(int(rng.lognormvariate(5, 1)) + 1, 8000)
        n_output = 1000 if rng.random() < 0.1 else 50
        start = "" if document is None else f"{document:04}" * DOCUMENT
        text = start + f"{i:06}".rjust(n_own * LETTERS, ".")
        ticket = read_ticket(orjson.dumps({"prompt": text, "max_tokens": n_output}))
        n_prompt = n_own + (0 if document is None else DOCUMENT)
        made.append(Request(str(i), now, document, n_prompt, n_output, ticket))
    return made


class Router(NamedTuple):
    """Chooses a replica for each request, and hears of its end."""

    place: Callable[[Request, Sequence[Replica]], Replica]
    tell_end: Callable[[Request], None] = lambda request: None


def by_tokens_and_prefixes(seed: int, *, sees_prefixes: bool = True) -> Router:
    """Ours."""
    placement = Placement(random.Random(seed))

    def place(request: Request, replicas: Sequence[Replica]) -> Replica:
        ticket = request.ticket
        if not sees_prefixes:
            ticket = dataclasses.replace(ticket, prefixes=())
        known = {replica.name: replica for replica in replicas}
        first = placement.rank(list(known), ticket)[0]
        placement.place(request.name, first, ticket)
        return known[first]

    return Router(place, lambda request: placement.end(request.name))


def by_tokens(seed: int) -> Router:
    """Ours without affinity."""
    return by_tokens_and_prefixes(seed, sees_prefixes=False)


def by_requests(seed: int) -> Router:
    """Ray's default: the one with fewer open requests of two, known here without delay."""
    rng = random.Random(seed)
    return Router(lambda _, replicas: min(rng.sample(replicas, 2), key=lambda r: len(r.open)))


def simulate(asked: list[Request], n_replicas: int, router: Router) -> tuple[float, int]:
    """Runs all; each request's `first` is filled in. Seconds until the last end, and cache hits."""
    replicas = [Replica(str(i)) for i in range(n_replicas)]
    events: list[tuple[float, int, Request | Replica]] = [
        (request.time, i, request) for i, request in enumerate(asked)
    ]
    heapq.heapify(events)
    now, n_events = 0.0, len(events)
    while events:
        now, _, subject = heapq.heappop(events)
        if isinstance(subject, Request):
            replica = router.place(subject, replicas)
            is_idle = not replica.open
            replica.add(subject)
        else:
            replica, is_idle = subject, True
            for request in replica.end(now):
                router.tell_end(request)
        if is_idle and replica.open:
            n_events += 1
            heapq.heappush(events, (now + replica.step(), n_events, replica))
    return now, sum(replica.n_hits for replica in replicas)


def print_table(n_requests: int, n_replicas: int, rates: Sequence[float]):
    print("| requests/s | placed by | TTFT P50, s | P95, s | in time, answers/s | cache hits |")
    print("|---|---|---|---|---|---|")
    for rate in rates:
        for name, make in (
            ("tokens and prefixes", by_tokens_and_prefixes),
            ("tokens", by_tokens),
            ("requests (Ray's default)", by_requests),
        ):
            asked = requests(n_requests, rate, seed=1)
            seconds, n_hits = simulate(asked, n_replicas, make(2))
            first = np.array([request.first for request in asked])
            p50, p95 = np.percentile(first, [50, 95])
            goodput = np.count_nonzero(first <= IN_TIME) / seconds
            print(f"| {rate:g} | {name} | {p50:.3f} | {p95:.3f} | {goodput:.1f} | {n_hits} |")
