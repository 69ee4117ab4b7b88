"""A server without a model: it streams as many tokens as it is asked for, at once or at a pace.

    python -m benchmarks.load.stub --port 8001 --interval 0.02   # for benchmarks.serve
    python -m benchmarks.load.stub --measure     # what the load generator takes of one core

With --measure it streams 5,000 tokens/s, each in an event of its own, from a process of its own to
the load generator, which is kept on one core; printed is the CPU time that this took a token, and
the rate at which one core would be full. Exit code 1 if that is below 5,000 tokens/s.
"""

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import orjson

from benchmarks.load.client import Asker, Record
from benchmarks.load.drive import Run, closed, cpu_seconds
from benchmarks.load.workloads import Turn
from benchmarks.wire import Target, close

RATE = 5000  # tokens/s that the load generator must keep up with
N_STREAMS = 100
HEAD = "HTTP/1.1 200 OK\r\nContent-Type: {}\r\nConnection: close\r\n{}\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n"
ANNOUNCEMENT = "listening on port "


class Stub:
    """Args:
    interval: seconds before each event.
    per_event: tokens that an event brings.
    faults: what befalls requests, by number from 0: a status such as "429", "cut", "silent",
        "error", "nonsense", or "dies": nobody listens any more.
    tells_ids: whether return_token_ids is heeded; False refuses it, as strict servers do.
    """

    def __init__(
        self,
        interval: float = 0.0,
        per_event: int = 1,
        faults: Mapping[int, str] | None = None,
        *,
        tells_ids: bool = True,
    ):
        self.interval = interval
        self.per_event = per_event
        self.faults = faults or {}
        self.tells_ids = tells_ids
        self.bodies: list[dict[str, Any]] = []
        self._listener: asyncio.Server | None = None

    @contextlib.asynccontextmanager
    async def listening(self, port: int = 0) -> AsyncIterator[int]:
        """Yields the port."""
        listener = await asyncio.start_server(self._serve, "127.0.0.1", port, backlog=1000)
        self._listener = listener
        try:
            yield listener.sockets[0].getsockname()[1]
        finally:
            listener.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._answer(reader, writer)
        await close(writer)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("GET "):
            self._reply(writer, 200, {"data": [{"id": "stub"}]})
            return
        length = head.lower().partition("content-length:")[2].split("\r\n")[0]
        body = orjson.loads(await reader.readexactly(int(length)))
        fault = self.faults.get(len(self.bodies), "")
        self.bodies.append(body)
        if body.get("return_token_ids") and not self.tells_ids:
            self._reply(writer, 400, {"error": {"message": "unknown field return_token_ids"}})
        elif fault.isdigit():
            self._reply(writer, int(fault), {"error": {"message": "told so"}})
        elif fault == "nonsense":
            writer.write(b"nonsense\r\n\r\n")
        elif fault == "silent":
            await reader.read()
        elif fault == "dies":
            await self._die()
        else:
            await self._stream(writer, body, fault)

    async def _die(self) -> None:
        """Whom the listener has accepted is served: asyncio would leave him waiting for ever."""
        assert self._listener is not None
        for listening in self._listener.sockets:
            asyncio.get_running_loop().remove_reader(listening.fileno())
        await asyncio.sleep(0)
        self._listener.close()

    def _reply(self, writer: asyncio.StreamWriter, status: int, body: dict[str, Any]) -> None:
        sent = orjson.dumps(body)
        head = HEAD.format("application/json", f"Content-Length: {len(sent)}\r\n")
        writer.write(head.replace("200 OK", f"{status} Told").encode() + sent)

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any], fault: str) -> None:
        writer.write(HEAD.format("text/event-stream", CHUNKED).encode())
        is_chat = "messages" in body
        n = body["max_completion_tokens" if is_chat else "max_tokens"]
        if is_chat:
            writer.write(chunk({"choices": [{"index": 0, "delta": {"role": "assistant"}}]}))
        for n_before in range(0, n, self.per_event):
            n_new = min(self.per_event, n - n_before)
            is_last = n_before + n_new == n
            if fault and n_before >= n // 2:
                if fault == "error":
                    writer.write(chunk({"error": {"message": "told so"}}))
                return
            if self.interval:
                await asyncio.sleep(self.interval)
            choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if is_last else None}
            choice |= {"delta": {"content": " a" * n_new}} if is_chat else {"text": " a" * n_new}
            if body.get("return_token_ids"):
                choice["token_ids"] = [7] * n_new
            writer.write(chunk({"choices": [choice], "usage": None}))
            await writer.drain()
        prompt = body.get("prompt") or " ".join(m["content"] for m in body["messages"])
        n_prompt = len(prompt.split()) if isinstance(prompt, str) else len(prompt)
        usage = {"prompt_tokens": n_prompt, "completion_tokens": n, "total_tokens": n_prompt + n}
        end = chunk({"choices": [], "usage": usage}) + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
        writer.write(end)
        await writer.drain()


def chunk(event: dict[str, Any]) -> bytes:
    """An event in a chunk of its own."""
    shared = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": "stub"}
    data = b"data: " + orjson.dumps(shared | event) + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


async def serve(port: int, stub: Stub) -> None:
    async with stub.listening(port) as port:
        print(f"{ANNOUNCEMENT}{port}", flush=True)
        await asyncio.Event().wait()


async def stream_all(port: int, n_tokens: int) -> list[Record]:
    """So many tokens in N_STREAMS streams at once, as the load generator reads them."""
    asker = Asker(Target(("127.0.0.1", port)), "openai", "stub", {}, {})
    run = Run(asker)
    conversations = [[Turn([1, 2, 3], 3, n_tokens // N_STREAMS)]] * N_STREAMS
    await closed(run, conversations, N_STREAMS)
    return run.records


def measure(n_rounds: int, seconds: float) -> int:
    """Prints the table; the exit code."""
    core = max(os.sched_getaffinity(0))
    interval = N_STREAMS / RATE
    command = [sys.executable, "-m", "benchmarks.load.stub", "--interval", str(interval)]
    n_tokens, costs = int(RATE * seconds), []
    with subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline().removeprefix(ANNOUNCEMENT))
        os.sched_setaffinity(0, {core})
        print("round   tokens/s streamed   CPU us a token   tokens/s of a whole core", flush=True)
        for i in range(n_rounds):
            used, started = cpu_seconds(), time.perf_counter()
            records = asyncio.run(stream_all(port, n_tokens))
            took = time.perf_counter() - started
            n = sum(sum(record.counts) for record in records)
            assert n == n_tokens, (n, [record.error for record in records if record.error])
            costs.append((cpu_seconds() - used) / n)
            row = f"{n / took:>20,.0f}{costs[-1] * 1e6:>17.1f}{1 / costs[-1]:>27,.0f}"
            print(f"{i:5}{row}", flush=True)
        server.kill()
    best = 1 / min(costs)
    print(f"one core can take {best:,.0f} tokens/s; {RATE:,} take {RATE / best:.0%} of it")
    return 0 if best >= RATE else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--interval", type=float, default=0.0, help="seconds before each event")
    parser.add_argument("--tokens-per-event", type=int, default=1)
    parser.add_argument("--measure", action="store_true", help="the load generator's CPU time")
    parser.add_argument("--rounds", type=int, default=5, help="of --measure; the best one counts")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each round")
    args = parser.parse_args()
    if args.measure:
        return measure(args.rounds, args.seconds)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(args.port, Stub(args.interval, args.tokens_per_event)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
