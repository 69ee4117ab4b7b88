"""Where a request goes, and how many replicas there should be. Pure: counts in, names out."""

import math
import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from fastgen_jax.cluster.ticket import BYTES_PER_TOKEN, Ticket, prefix_bytes

BUSIER = 0.5  # share by which the holder of a prefix may be busier and still be chosen
MAX_PREFIXES = 50_000  # remembered


def choose(
    candidates: Sequence[str],
    outstanding: Mapping[str, int],
    *,
    holder: str | None,
    n_saved: int,
    rng: random.Random,
) -> str:
    """The candidate with fewer outstanding tokens of two drawn at random, or `holder`, which has
    `n_saved` tokens of the prompt, unless these saved it would be more than BUSIER busier.
    """
    pair = rng.sample(candidates, min(2, len(candidates)))
    best = min(pair, key=lambda name: outstanding.get(name, 0))
    if holder is None or holder not in candidates:
        return best
    most = (1 + BUSIER) * outstanding.get(best, 0)
    return holder if outstanding.get(holder, 0) - n_saved <= most else best


class Placement:
    """What was sent where.

    INVARIANT: outstanding[r] is the sum of the costs of the open requests at r, and more than 0.
    """

    def __init__(self, rng: random.Random):
        self.outstanding: dict[str, int] = {}
        self._open: dict[str, tuple[str, int]] = {}  # request -> replica, cost
        self._holders: OrderedDict[bytes, str] = OrderedDict()  # prefix -> replica, newest last
        self._rng = rng

    def rank(self, candidates: Sequence[str], ticket: Ticket) -> list[str]:
        """All candidates, the one to take first; those that the ticket has tried come last."""
        fresh = [name for name in candidates if name not in ticket.tried] or list(candidates)
        holder, n_saved = self._holder(ticket)
        first = choose(fresh, self.outstanding, holder=holder, n_saved=n_saved, rng=self._rng)
        rest = [name for name in candidates if name != first]
        rest.sort(key=lambda name: (name in ticket.tried, self.outstanding.get(name, 0)))
        return [first, *rest]

    def place(self, request: str, replica: str, ticket: Ticket):
        """Notes that the request goes there."""
        self.end(request)
        self._open[request] = replica, ticket.cost
        self.outstanding[replica] = self.outstanding.get(replica, 0) + ticket.cost
        for prefix in ticket.prefixes:
            self._holders[prefix] = replica
            self._holders.move_to_end(prefix)
        while len(self._holders) > MAX_PREFIXES:
            self._holders.popitem(last=False)

    def end(self, request: str, replica: str | None = None):
        """Notes that the request is over; if `replica` is given, only if it is still there."""
        there, cost = self._open.get(request, (None, 0))
        if there is None or replica not in (None, there):
            return
        del self._open[request]
        self.outstanding[there] -= cost
        if not self.outstanding[there]:
            del self.outstanding[there]

    def _holder(self, ticket: Ticket) -> tuple[str | None, int]:
        """Who was sent the longest prefix of the prompt, and its tokens."""
        for i in reversed(range(len(ticket.prefixes))):
            if ticket.prefixes[i] in self._holders:
                return self._holders[ticket.prefixes[i]], prefix_bytes(i) // BYTES_PER_TOKEN
        return None, 0


class Budget:
    """How many requests may be sent a second time: SHARE of them, and `burst` at once.

    INVARIANT: 0 <= n_left <= burst.
    """

    SHARE = 0.2

    def __init__(self, burst: int):
        self.burst = burst
        self.n_left = float(burst)

    def earn(self):
        """Called once for each request."""
        self.n_left = min(self.n_left + self.SHARE, self.burst)

    def spend(self) -> bool:
        """Whether one may be sent again; it is counted then."""
        if self.n_left < 1:
            return False
        self.n_left -= 1
        return True


def wanted_replicas(
    *, n_waiting_tokens: float, n_requests: float, waiting_tokens: int, max_num_seqs: float
) -> int:
    """Enough that no more than `waiting_tokens` wait at each and that all requests can run; 0 if
    there is no request.
    """
    to_read = math.ceil(n_waiting_tokens / waiting_tokens)
    return max(to_read, math.ceil(n_requests / max_num_seqs), int(n_requests > 0))
