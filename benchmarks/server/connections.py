"""Ten thousand connections that say nothing beside two hundred that stream: what they cost.

    python -m benchmarks.server.connections --idle 10000 --active 200

Prints KiB of the server's memory per idle connection, times of /livez, idle connections that the
server closed, and streams that did not end in an answer; exit code 1 if there are any. Both ends
need a descriptor a connection: `ulimit -Hn` must allow that. The server may close what has been
idle for 75 s, so a longer run than that counts what is no fault.
"""

import argparse
import asyncio
import resource
import sys
import time
from collections import Counter

from benchmarks.server import load
from benchmarks.server.checks import MAX_LIVEZ_P99, quantile, verdict
from benchmarks.server.child import Child
from benchmarks.server.client import ANSWER, Call, connect, perform
from benchmarks.server.probe import Probe
from benchmarks.wire import Address, get, read_body, read_head

MAX_KIB = 40.0  # of memory for an idle connection
DEADLINE = 300.0
AT_ONCE = 100  # connections that are opened together
GET = get("/livez")
FLAGS = (
    *("--dtype", "float32", "--max-model-len", "512", "--num-kv-blocks", "400"),
    *("--max-num-seqs", "64", "--max-queued-requests", "400", "--log-level", "warning"),
)
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def open_idle(address: Address, n_connections: int) -> list[Connection]:
    """Connections that were answered once and are kept alive."""
    many = asyncio.Semaphore(AT_ONCE)

    async def open_one() -> Connection:
        async with many:
            reader, writer = await connect(address)
            writer.write(GET)
            _, headers = await read_head(reader)
            async for _ in read_body(reader, headers):
                pass
            return reader, writer

    return await asyncio.gather(*(open_one() for _ in range(n_connections)))


async def stream_for(address: Address, seconds: float, n_clients: int) -> Counter[str]:
    """How the streams of so many clients ended."""
    end = time.monotonic() + seconds
    body = {"prompt": "Once upon a time", "max_tokens": 100, "ignore_eos": True, "stream": True}
    call = Call(load.COMPLETIONS, load.encode(body), load.ANSWERED, is_stream=True)
    kinds: Counter[str] = Counter()

    async def client() -> None:
        while time.monotonic() < end:
            kinds[(await perform(address, call, DEADLINE)).kind] += 1

    await asyncio.gather(*(client() for _ in range(n_clients)))
    return kinds


async def measure(child: Child, *, n_idle: int, n_active: int, seconds: float) -> list[str]:
    """Prints the figures; returns what is wrong with them."""
    await stream_for(child.address, 2.0, 8)  # warm
    before = child.footprint().n_bytes
    started = time.monotonic()
    idle = await open_idle(child.address, n_idle)
    opened = time.monotonic() - started
    kib = (child.footprint().n_bytes - before) / 1024 / max(n_idle, 1)
    with Probe(child.address) as probe:
        kinds = await stream_for(child.address, seconds, n_active)
    n_closed = sum(reader.at_eof() for reader, _ in idle)
    for _, writer in idle:
        writer.close()
    p50, p99 = (quantile(probe.seconds, share) * 1e3 for share in (0.5, 0.99))
    longest = max(probe.seconds, default=0) * 1e3
    print(f"idle         {n_idle} connections, opened in {opened:.1f} s, {kib:.1f} KiB each")
    print(f"active       {n_active} clients for {seconds:g} s: {dict(kinds)}")
    print(f"/livez       p50 {p50:.0f} ms, p99 {p99:.0f} ms, max {longest:.0f} ms")
    print(f"closed       {n_closed} idle connections, {probe.n_failures} probes of /livez")
    n_bad = kinds.total() - kinds[ANSWER]
    problems = {
        f"{kib:.1f} KiB for an idle connection, more than {MAX_KIB:g}": kib > MAX_KIB,
        f"{n_closed} idle connections were closed": n_closed > 0,
        f"{n_bad} streams did not end in an answer": n_bad > 0,
        f"/livez failed {probe.n_failures} times": probe.n_failures > 0,
        f"/livez took {p99:.0f} ms at p99": p99 > MAX_LIVEZ_P99 * 1e3,
    }
    return [text for text, is_so in problems.items() if is_so]


def main() -> int:
    parser = argparse.ArgumentParser(description="What idle connections cost beside active ones.")
    parser.add_argument("--idle", type=int, default=10000)
    parser.add_argument("--active", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=30.0, help="of streaming")
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the child inherits it
    if args.idle + args.active + 100 > hard:
        parser.error(f"{args.idle} connections need more than the {hard} files of `ulimit -Hn`")
    with Child(FLAGS) as child:
        problems = asyncio.run(
            measure(child, n_idle=args.idle, n_active=args.active, seconds=args.seconds)
        )
    return verdict(problems)


if __name__ == "__main__":
    sys.exit(main())
