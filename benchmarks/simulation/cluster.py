"""Replicas behind a router: discrete events by a virtual clock.

Three things happen: a request arrives and is placed, a step of a replica ends, a replica is lost or
comes back. What happens at the same time happens in the order in which it was foreseen.
"""

import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.simulation.replica import Job, Replica, Step
from fastgen_jax.cluster.policy import Placement, choose
from fastgen_jax.cluster.ticket import Ticket


class Router(NamedTuple):
    """Chooses a replica for each request, and hears of its end."""

    place: Callable[[Job, Sequence[Replica]], Replica]
    tell_end: Callable[[Job], None] = lambda job: None


def round_robin(seed: int) -> Router:
    turns = itertools.count()
    return Router(lambda _, replicas: replicas[next(turns) % len(replicas)])


def least_outstanding(seed: int) -> Router:
    """The one with the fewest tokens open, prompts and answers."""
    return Router(lambda _, replicas: min(replicas, key=lambda r: r.n_outstanding))


def two_choices(seed: int) -> Router:
    """The product's `choose`: of two drawn at random the one with fewer tokens open."""
    rng = random.Random(seed)

    def place(_: Job, replicas: Sequence[Replica]) -> Replica:
        pair = {r.name: r for r in rng.sample(replicas, min(2, len(replicas)))}
        outstanding = {name: r.n_outstanding for name, r in pair.items()}
        return pair[choose(list(pair), outstanding, holder=None, n_saved=0, rng=rng)]

    return Router(place)


def fewest_requests(seed: int) -> Router:
    """Ray's default: of two drawn at random the one with fewer requests open, known at once."""
    rng = random.Random(seed)
    return Router(
        lambda _, replicas: min(
            rng.sample(replicas, min(2, len(replicas))), key=lambda r: len(r.jobs)
        )
    )


def tokens_and_prefixes(seed: int) -> Router:
    """The product's placement of tickets: who was sent a prompt's prefix, if it is not too busy."""
    placement = Placement(random.Random(seed))

    def place(job: Job, replicas: Sequence[Replica]) -> Replica:
        known = {replica.name: replica for replica in replicas}
        ticket: Ticket = job.ticket
        first = placement.rank(list(known), ticket)[0]
        placement.place(str(id(job)), first, ticket)
        return known[first]

    return Router(place, lambda job: placement.end(str(id(job))))


ROUTERS = {
    "round-robin": round_robin,
    "least-tokens": least_outstanding,
    "two-choices": two_choices,
}


class Failure(NamedTuple):
    """A replica that is lost, and back, empty, so many seconds later."""

    time: float
    index: int
    seconds: float


class Cluster:
    """Runs jobs to their ends. What a lost replica had not begun to answer goes to another one,
    what it had begun has failed, as in the product.

    Args:
        on_end: hears of every job that has ended or failed.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        router: Router,
        on_end: Callable[[Job], None],
        failures: Sequence[Failure] = (),
    ):
        self.replicas = list(replicas)
        self.now = 0.0
        self.n_resent = 0
        self._up = list(replicas)
        self._router, self._on_end = router, on_end
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._jobs: Iterator[Job] = iter(())
        self._is_closed_loop = False
        for failure in failures:
            self._at(failure.time, self._lose, failure)

    def run(self, jobs: Iterable[Job], n_clients: int | None = None) -> None:
        """Each job at its time, in order; or by clients, each of whom asks when it is answered, for
        the first time at its job's time.
        """
        self._jobs, self._is_closed_loop = iter(jobs), n_clients is not None
        for job in itertools.islice(self._jobs, n_clients or 1):
            self._at(job.time, self._arrive, job)
        events = self._events
        while events:
            self.now, _, happen, subject = heapq.heappop(events)
            happen(*subject)

    def _at(self, time: float, happen: Callable[..., None], *subject: Any) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), happen, subject))

    def _arrive(self, job: Job) -> None:
        if not self._is_closed_loop and (after := next(self._jobs, None)):
            self._at(after.time, self._arrive, after)
        self._place(job)

    def _place(self, job: Job) -> None:
        if not self._up:
            self._end(job, has_failed=True)
            return
        replica = self._router.place(job, self._up)
        replica.add(job)
        if replica.due is None:
            self._turn(replica)

    def _turn(self, replica: Replica) -> None:
        time = replica.turn(self.now)
        if time is not None:
            self._at(time, self._take_in, replica, replica.due)

    def _take_in(self, replica: Replica, step: Step) -> None:
        if replica.due is not step:
            return  # it was lost meanwhile
        ended = replica.commit()
        for job in ended:
            self._end(job)
        if ended and self._is_closed_loop:  # who asks again at once is in the next plan
            self._at(self.now, self._turn_again, replica, step)
        else:
            self._turn(replica)

    def _turn_again(self, replica: Replica, step: Step) -> None:
        if replica.due is step:
            self._turn(replica)

    def _end(self, job: Job, *, has_failed: bool = False) -> None:
        job.has_failed = has_failed
        self._router.tell_end(job)
        self._on_end(job)
        if self._is_closed_loop and (after := next(self._jobs, None)):
            after.time = self.now
            self._at(self.now, self._arrive, after)

    def _lose(self, failure: Failure) -> None:
        replica = self.replicas[failure.index]
        self._up.remove(replica)
        self._at(self.now + failure.seconds, self._up.append, replica)
        for job in replica.fail():
            if job.times:
                self._end(job, has_failed=True)
            else:
                self.n_resent += 1
                self._place(job)
