"""Four times the load that the server can take: refusals are quick, and goodput stays.

    python -m benchmarks.server.overload

Capacity is what as many callers get as sequences run at once. Then, closed loop: four callers for
each place in the queue, who pause after a refusal. Open loop: requests at random times, four times
as many a second as capacity, whatever becomes of the earlier ones. Exit code 1 if a request ends in
anything but an answer or a 429, or goodput falls below half.
"""

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple

from benchmarks.server import load
from benchmarks.server.checks import quantile, verdict
from benchmarks.server.child import Child
from benchmarks.server.client import ANSWER, REFUSED, Call, Outcome, perform
from benchmarks.server.probe import Probe

N_RUNNING, N_QUEUED = 16, 48  # sequences at once; requests running and waiting
FLAGS = (
    *("--dtype", "float32", "--max-model-len", "512", "--num-kv-blocks", "400"),
    *("--max-num-seqs", str(N_RUNNING), "--max-queued-requests", str(N_QUEUED)),
    *("--log-level", "warning"),
)
TIMES = 4
PAUSE = 1.0  # seconds after a refusal, as Retry-After asks
DEADLINE = 120.0
MIN_GOODPUT = 0.5  # of capacity
# Answers long enough that four times as many do not wear out the client.
BODY = {"prompt": "Once upon a time", "max_tokens": 128, "temperature": 0, "ignore_eos": True}

Ask = Callable[[], Coroutine[Any, Any, Outcome]]
Load = Callable[[Ask, float], Awaitable[None]]  # until that time


class Phase(NamedTuple):
    """One load for a while."""

    outcomes: list[Outcome]
    seconds: float
    livez: list[float]

    @property
    def goodput(self) -> float:
        """Answers a second."""
        return sum(o.kind == ANSWER for o in self.outcomes) / self.seconds

    def line(self, name: str) -> str:
        refusals = [o.seconds for o in self.outcomes if o.kind == REFUSED]
        n_other = sum(o.kind not in (ANSWER, REFUSED) for o in self.outcomes)
        cells = [quantile(times, share) * 1e3 for times in (refusals, self.livez)
                 for share in (0.5, 0.99)]  # fmt: skip
        figures = "".join(f"{cell:9.1f}" for cell in cells)
        return f"{name:10}{self.goodput:11.1f}{len(refusals):9}{n_other:7}{figures}"


HEAD = f"""\
{"":10}{"":11}{"":9}{"":7}{"429, ms":>18}{"/livez, ms":>18}
{"load":10}{"answers/s":>11}{"refused":>9}{"other":>7}{"p50":>9}{"p99":>9}{"p50":>9}{"p99":>9}"""


def closed(n_callers: int) -> Load:
    """Callers who ask again when they are answered."""

    async def drive(ask: Ask, end: float) -> None:
        async def caller() -> None:
            while time.monotonic() < end:
                if (await ask()).kind == REFUSED:
                    await asyncio.sleep(PAUSE)

        await asyncio.gather(*(caller() for _ in range(n_callers)))

    return drive


def opened(rate: float, seed: int) -> Load:
    """So many requests a second, at random times."""

    async def drive(ask: Ask, end: float) -> None:
        draw, due = random.Random(seed), time.monotonic()
        async with asyncio.TaskGroup() as group:
            while due < end:
                group.create_task(ask())
                due += draw.expovariate(rate)
                await asyncio.sleep(max(due - time.monotonic(), 0))

    return drive


async def run(child: Child, drive: Load, seconds: float) -> Phase:
    """One load; requests that run at its end are waited for, and their time counts."""
    outcomes: list[Outcome] = []
    call = Call(load.COMPLETIONS, load.encode(BODY), load.ANSWERED)

    async def ask() -> Outcome:
        outcomes.append(await perform(child.address, call, DEADLINE))
        return outcomes[-1]

    started = time.monotonic()
    with Probe(child.address) as probe:
        await drive(ask, started + seconds)
    return Phase(outcomes, time.monotonic() - started, probe.seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description="Four times the load that the server can take.")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each load")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    problems = []
    with Child(FLAGS) as child:
        asyncio.run(run(child, closed(N_RUNNING), 3.0))  # warm
        capacity = asyncio.run(run(child, closed(N_RUNNING), args.seconds))
        print(f"{HEAD}\n{capacity.line('capacity')}", flush=True)
        for name, drive in {
            "closed": closed(TIMES * N_QUEUED),
            "open": opened(TIMES * capacity.goodput, args.seed),
        }.items():
            phase = asyncio.run(run(child, drive, args.seconds))
            print(phase.line(name), flush=True)
            if phase.goodput < MIN_GOODPUT * capacity.goodput:
                problems.append(f"{name}: goodput is {phase.goodput / capacity.goodput:.0%}")
            notes = [o for o in phase.outcomes if o.kind not in (ANSWER, REFUSED)]
            problems += [f"{name}: {len(notes)} ended badly: {notes[0]}"] if notes else []
    return verdict(problems)


if __name__ == "__main__":
    sys.exit(main())
