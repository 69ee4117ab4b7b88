"""Minutes of mixed load on a real server while something fails every second; nothing may be lost.

    python -m benchmarks.server.soak --minutes 3       # exit code 1 and a line per broken promise
    python -m benchmarks.server.soak --seed-leak       # only shows that a leak is found

The server (demo model, float32, a pool so small that sequences are preempted) runs in a process of
its own, faulty_worker.py. Callers ask for all that it offers, leave, read slowly, send nonsense,
come in bursts. Faults by turns: a step fails in dispatch or in fetch, a sampled row is not finite,
a client dies in the middle of its answer, a program is compiled while the cache's disk is full. A
second, short soak of a server that leaks must fail, or the first one's word means nothing.
"""

import argparse
import asyncio
import itertools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable

from benchmarks.server import load
from benchmarks.server.checks import (
    AT_REST,
    Record,
    broken_promises,
    growth,
    quantile,
    verdict,
)
from benchmarks.server.child import Child, Footprint
from benchmarks.server.client import (
    ANSWER,
    CANCELLED,
    WRONG,
    Call,
    Outcome,
    connect,
    perform,
)
from benchmarks.server.probe import Probe
from benchmarks.wire import post, reset

N_CALLERS = 14
DEADLINE = 60.0  # seconds that any request may take
REST_TIMEOUT = 20.0
BURST_EVERY, BURST_SIZE = 5.0, 40  # seconds; requests, more than the server queues
FAULTS = ("dispatch", "nan", "client", "fetch", "disk")
FAULT_EVERY = 1.0  # seconds
LAST_FAULT = 3.0  # seconds before the end: what is ordered must still happen
LEAK_MINUTES = 0.5


class Soak:
    """Load, faults and measurements on one child; `record` is what it saw.

    Args:
        make_call: what callers ask next.
        faults: kinds that are ordered by turns.
    """

    def __init__(self, child: Child, make_call: Callable[[], Call], faults: tuple[str, ...]):
        self.child = child
        self.record = Record()
        self._make_call = make_call
        self._faults = faults
        self._known: dict[str, str] = {}

    async def run(self, seconds: float) -> None:
        """A third to warm up, a rest, two thirds that count, a rest."""
        await self._learn()
        await self._drive(seconds / 3)
        self.record.rest_before = await self._rest()
        n_before = len(self.record.outcomes)
        with Probe(self.child.address) as probe:
            await self._drive(seconds * 2 / 3, is_measured=True)
        self.record.n_measured = len(self.record.outcomes) - n_before
        self.record.livez, self.record.n_livez_failures = probe.seconds, probe.n_failures
        self.record.rest_after = await self._rest()
        self.record.gauges = await asyncio.to_thread(self.child.metrics)
        self.record.n_preemptions = self.record.gauges.get("num_preemptions_total", 0)
        self.record.happened.update(await asyncio.to_thread(self.child.faults))
        self.record.is_alive = self.child.exit_code is None

    async def _learn(self) -> None:
        """The answers of the idle server, each asked for alone."""
        for call in load.references():
            outcome = await self._do(call)
            assert outcome.kind == ANSWER, outcome
            self._known[call.known] = outcome.digest

    async def _drive(self, seconds: float, *, is_measured: bool = False) -> None:
        """Everything at once, until the time is over and the last request has ended."""
        started = time.monotonic()
        end = started + seconds
        async with asyncio.TaskGroup() as group:
            for _ in range(N_CALLERS):
                group.create_task(self._caller(end))
            group.create_task(self._bursts(end))
            group.create_task(self._break(end - LAST_FAULT))
            if is_measured:
                group.create_task(self._measure(end))
        self.record.seconds += time.monotonic() - started

    async def _caller(self, end: float) -> None:
        while time.monotonic() < end and self.child.exit_code is None:
            await self._do(self._make_call())

    async def _bursts(self, end: float) -> None:
        while time.monotonic() + BURST_EVERY < end:
            await asyncio.sleep(BURST_EVERY)
            await asyncio.gather(*(self._do(load.small()) for _ in range(BURST_SIZE)))

    async def _measure(self, end: float) -> None:
        while time.monotonic() < end:
            await asyncio.sleep(1)
            footprint = self.child.footprint()
            self.record.memory.append((time.monotonic(), footprint.n_bytes))

    async def _break(self, end: float) -> None:
        """A fault a second, round robin."""
        kinds = itertools.cycle(self._faults)
        while self._faults and time.monotonic() < end:
            kind = next(kinds)
            self.record.ordered[kind] += 1
            if kind == "client":
                await self._kill_client()
            else:
                self.child.order(kind)
            await asyncio.sleep(FAULT_EVERY)

    async def _kill_client(self) -> None:
        """Resets a connection of which part of the answer has come; again if there was none."""
        for _ in range(20):
            call = load.victim()
            self.record.n_started += 1
            reader, writer = await connect(self.child.address)
            writer.write(post(call.path, call.body))
            is_in_the_middle = b"data: " in await reader.read(1000)
            reset(writer)
            writer.close()
            self.record.outcomes.append(Outcome(CANCELLED))
            if is_in_the_middle:
                self.record.happened["client"] += 1
                return
            await asyncio.sleep(0.1)

    async def _do(self, call: Call) -> Outcome:
        """One request, recorded and compared with what is known."""
        self.record.n_started += 1
        outcome = await perform(self.child.address, call, DEADLINE)
        if outcome.kind == ANSWER and call.known in self._known:
            self.record.n_checked += 1
            if outcome.digest != self._known[call.known]:
                self.record.n_wrong += 1
                outcome = outcome._replace(kind=WRONG, note=call.known)
        self.record.outcomes.append(outcome)
        return outcome

    async def _rest(self) -> Footprint:
        """The footprint once nothing runs and the last connections are closed."""
        deadline, n_files = time.monotonic() + REST_TIMEOUT, -1
        while True:
            metrics = await asyncio.to_thread(self.child.metrics)
            await asyncio.sleep(1)  # the connection that brought them closes
            now = self.child.footprint()
            is_idle = all(metrics.get(name) == 0 for name in AT_REST)
            if (is_idle and now.n_files == n_files) or time.monotonic() > deadline:
                return now
            n_files = now.n_files


def soak(
    minutes: float, *, seed: int, cache: str, is_leaky: bool = False
) -> tuple[Record, list[str]]:
    """One child, one load; the record and the promises that were broken.

    Args:
        cache: directory of compiled programs.
    """
    with Child([*load.FLAGS, "--compilation-cache", cache], is_leaky=is_leaky) as child:
        # What little each request leaves shows only after many.
        make_call = load.small if is_leaky else load.Mix(seed).call
        run = Soak(child, make_call, () if is_leaky else FAULTS)
        asyncio.run(run.run(minutes * 60))
        problems = broken_promises(run.record)
        if problems and not is_leaky:
            print(child.last_words(), file=sys.stderr)
    if child.exit_code != 0:
        problems.append(f"the server ended with {child.exit_code} after SIGTERM")
    return run.record, problems


def table(record: Record) -> str:
    """What happened, in lines of two columns."""
    statuses = Counter(o.status for o in record.outcomes if o.status)
    seconds = record.memory[-1][0] - record.memory[0][0] if record.memory else 0.0
    before, after = record.rest_before, record.rest_after
    n_tokens = record.gauges.get("generation_tokens_total", 0)
    rows = {
        "requests": f"{record.n_started}: " + counted(record.kinds()),
        "status": counted(statuses),
        "faults": counted(record.happened),
        "answers": f"{record.n_checked} known, {record.n_wrong} wrong",
        "preemptions": f"{record.n_preemptions:.0f}",
        "tokens": f"{n_tokens:.0f}, {n_tokens / max(record.seconds, 1):.0f} a second",
        "/livez": f"p99 {quantile(record.livez, 0.99) * 1e3:.0f} ms, "
        f"max {max(record.livez, default=0) * 1e3:.0f} ms of {len(record.livez)}",
        "memory": f"{before.n_bytes / 2**20:.1f} to {after.n_bytes / 2**20:.1f} MiB at rest; "
        f"{growth(record.memory) / 2**20:+.2f} MiB in {seconds:.0f} s of load, "
        f"{growth(record.memory) / max(record.n_measured, 1):+.0f} B a request",
        "descriptors": f"{before.n_files} to {after.n_files}",
        "threads": f"{before.n_threads} to {after.n_threads}",
    }
    return "\n".join(f"{name:12} {text}" for name, text in rows.items())


def counted(counter: Counter) -> str:
    return ", ".join(f"{n} {key}" for key, n in counter.most_common()) or "none"


def missed_leaks(problems: list[str]) -> list[str]:
    """What the soak of a leaky server should have said and did not."""
    wanted = {"memory grew": "4 KiB a request", "descriptors": "a file in 50 requests"}
    return [
        f"a leak of {what} was not found"
        for start, what in wanted.items()
        if not any(problem.startswith(start) for problem in problems)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Load and faults for minutes; nothing is lost.")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seed-leak", action="store_true", help="only the server that leaks")
    args = parser.parse_args()
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fastgen-soak-") as cache:
        if not args.seed_leak:
            record, problems = soak(args.minutes, seed=args.seed, cache=cache)
            print(table(record), flush=True)
        leaky, found = soak(LEAK_MINUTES, seed=args.seed, cache=cache, is_leaky=True)
    print(f"\nof a server that leaks:\n{table(leaky)}\nfound:\n  " + "\n  ".join(found or ["-"]))
    problems += missed_leaks(found)
    return verdict(problems)


if __name__ == "__main__":
    sys.exit(main())
