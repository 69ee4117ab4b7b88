"""What the record of steps, and those who watch it, cost in throughput.

    python -m benchmarks.server.steps

One server under a steady load: as many callers as sequences run. Rounds of four turns, in another
order each: no record, a record, one watcher, eight. A turn's tokens/s are divided by those of the
same round without a record, so that what else the machine does is in both; the table has medians
of these ratios, and their quartiles. Watchers and callers are one process, beside the server's.
Then the same without a server: time to record a step, to map the blocks, and to make an event.
"""

import argparse
import asyncio
import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import orjson

from benchmarks.server import load
from benchmarks.server.child import Child
from benchmarks.server.client import Call, perform
from benchmarks.wire import Address, get
from fastgen_jax.engine.blocks import BlockPool
from fastgen_jax.engine.history import History
from fastgen_jax.engine.types import Chunk, Plan
from fastgen_jax.server.watch import as_row, cells

N_CALLERS = 32
FLAGS = ("--dtype", "float32", "--max-num-seqs", str(N_CALLERS), "--log-level", "warning")
BODY = {"prompt": "Once upon a time", "max_tokens": 128, "temperature": 0, "ignore_eos": True}
SETTLE = 0.3  # seconds at the start of a turn that do not count
GET = get("/debug/steps")


class Mode(NamedTuple):
    name: str
    record: str
    n_watchers: int


OFF = Mode("no record", "off", 0)
MODES = (OFF, Mode("record", "on", 0), Mode("1 watcher", "on", 1), Mode("8 watchers", "on", 8))


@contextlib.asynccontextmanager
async def watching(address: Address, n: int) -> AsyncIterator[None]:
    """Reads what n watchers are told, and drops it."""

    async def watch() -> None:
        reader, writer = await asyncio.open_connection(*address)
        with contextlib.closing(writer):
            writer.write(GET)
            while await reader.read(65536):
                pass

    tasks = [asyncio.create_task(watch()) for _ in range(n)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def call_for_ever(address: Address) -> None:
    call = Call(load.COMPLETIONS, load.encode(BODY), load.MAY_FAIL)
    while True:
        await perform(address, call, 60)


async def turn(child: Child, mode: Mode, seconds: float) -> float:
    """Tokens/s."""
    child.order(mode.record)
    assert child.faults() == {"record": mode.record}
    async with watching(child.address, mode.n_watchers):
        await asyncio.sleep(SETTLE)
        started, n_before = time.monotonic(), await n_generated(child)
        await asyncio.sleep(seconds)
        n = await n_generated(child) - n_before
        return n / (time.monotonic() - started)


async def n_generated(child: Child) -> float:
    return (await asyncio.to_thread(child.metrics))["generation_tokens_total"]


async def measure(child: Child, n_rounds: int, seconds: float) -> list[dict[Mode, float]]:
    callers = [asyncio.create_task(call_for_ever(child.address)) for _ in range(N_CALLERS)]
    await asyncio.sleep(2.0)
    orders = itertools.cycle(itertools.permutations(MODES))
    rounds = [
        {mode: await turn(child, mode, seconds) for mode in order}
        for order in itertools.islice(orders, n_rounds)
    ]
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    return rounds


def show(rounds: list[dict[Mode, float]]) -> None:
    print(f"{'':12}{'tokens/s':>10}{'ratio':>9}{'quartiles':>19}")
    for mode in MODES:
        ratios = [round[mode] / round[OFF] for round in rounds]
        low, middle, high = statistics.quantiles(ratios, n=4)
        speed = statistics.median(round[mode] for round in rounds)
        print(f"{mode.name:12}{speed:10.0f}{middle:9.4f}{low:11.4f}{high:8.4f}")


def show_parts() -> None:
    """Time of each part alone, the best of some runs."""
    print(f"\n{'alone':34}{'microseconds':>14}")
    for n in (32, 256):
        sequence: Any = SimpleNamespace(id=1, n_cached=300, n_tokens=301)
        plan, history = Plan([Chunk(sequence, 1, 0)] * n, [], []), History()

        def record(plan=plan, history=history) -> None:
            history.begin(plan)
            history.end(0.01, n_padded=256, n_running=32, n_waiting=0)

        print(f"{f'record a step of {n} chunks':34}{best(record):14.1f}")
        steps = history.since(history.n_steps - 5)
        line = f"make an event of {len(steps)} such steps"
        print(f"{line:34}{best(lambda s=steps: orjson.dumps([as_row(x) for x in s])):14.1f}")
    for n in (2048, 50_000):
        pool = BlockPool(n + 1)
        pool.allocate(n // 2)
        print(f"{f'map {n} blocks':34}{best(pool.map):14.1f}")
        classes, size = pool.map().classes, -(-n // 4096)
        print(f"{'and make cells of it':34}{best(lambda c=classes, s=size: cells(c, s)):14.1f}")


def best(function: Any, n: int = 20, n_runs: int = 10) -> float:
    """Microseconds."""
    times = []
    for _ in range(n_runs):
        started = time.perf_counter()
        for _ in range(n):
            function()
        times.append((time.perf_counter() - started) / n * 1e6)
    return min(times)


def main() -> int:
    parser = argparse.ArgumentParser(description="What the record of steps costs.")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each turn")
    args = parser.parse_args()
    with Child(FLAGS, module="benchmarks.server.steps_worker") as child:
        show(asyncio.run(measure(child, args.rounds, args.seconds)))
    show_parts()
    return 0


if __name__ == "__main__":
    sys.exit(main())
