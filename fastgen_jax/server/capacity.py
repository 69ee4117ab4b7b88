"""How many connections the process can hold, and which one leaves when another comes."""

import asyncio
import contextlib
import logging
import os
import resource
import time

log = logging.getLogger("fastgen_jax.server")

N_WANTED = 10_200  # connections: 10,000 idle and 200 that work
RESERVE = 96  # descriptors for files, libraries and connections that are being refused
SPARE = 32  # of them, connections beyond the limit that are told why before they close
LOG_EVERY = 1.0  # seconds
UNLIMITED = 2**20  # descriptors, where there is no limit


class Capacity:
    """At most max_connections; the one that has waited longest makes room for one more.

    Without that a full table of descriptors would silence the server: the event loop closes what
    it cannot accept, unheard.

    INVARIANT: `waiting` holds the connections without a request, the longest waiting first; n_open
    counts all.
    """

    def __init__(self, max_connections: int):
        self.max_connections = max_connections
        self.waiting: dict[asyncio.Transport, None] = {}
        self.n_open = 0
        self._n_closed = self._n_refused = 0
        self._logged = float("-inf")

    def make_room(self) -> bool:
        """Whether the newest connection, counted in n_open already, may stay."""
        if self.n_open <= self.max_connections:
            return True
        longest = next(iter(self.waiting), None)
        if longest is None or self.n_open > self.max_connections + SPARE:
            self._n_refused += 1
            self._report()
            return False
        del self.waiting[longest]
        longest.close()
        self._n_closed += 1
        self._report()
        return True

    def _report(self):
        now = time.monotonic()
        if now - self._logged < LOG_EVERY:
            return
        self._logged = now
        log.warning(
            "%d connections are the most that the descriptors allow (ulimit -n): %d idle closed, "
            "%d new refused",
            self.max_connections, self._n_closed, self._n_refused,
        )  # fmt: skip
        self._n_closed = self._n_refused = 0


def of_process() -> Capacity:
    """What this process's descriptors allow, once their limit is raised as far as it goes."""
    n_free = max(2, raise_limit() - len(os.listdir("/dev/fd")))
    max_connections = n_free - min(RESERVE, n_free // 2)
    if max_connections < N_WANTED:
        log.warning(
            "the descriptors allow %d connections; raise the hard limit (ulimit -Hn) for %d",
            max_connections, N_WANTED,
        )  # fmt: skip
    return Capacity(max_connections)


def raise_limit() -> int:
    """The number of descriptors that this process may hold from now on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (hard, N_WANTED + RESERVE):  # some kernels grant less than an unlimited hard limit
        if soft == resource.RLIM_INFINITY or soft == hard or 0 <= limit <= soft:
            break
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            soft = limit
            break
    return soft if soft != resource.RLIM_INFINITY else UNLIMITED


class DescriptorAlarm:
    """Says once a second that no descriptor is left: the event loop itself does not."""

    def __init__(self):
        self._due = 0.0

    def tick(self):
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + LOG_EVERY
        try:
            os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            log.warning("new connections are not accepted: %s (ulimit -n)", error.strerror)
