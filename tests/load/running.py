"""A stub server in a thread, for tests of the load generator."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator

from benchmarks.load.client import Asker, Record
from benchmarks.load.stub import Stub
from benchmarks.load.workloads import Turn
from benchmarks.wire import Target


@contextlib.contextmanager
def stubbed(stub: Stub) -> Iterator[int]:
    """Yields the port; the thread is gone at the end."""
    loop, started, port = asyncio.new_event_loop(), threading.Event(), []

    async def serve() -> None:
        async with stub.listening() as found:
            port.append(found)
            started.set()
            await is_over.wait()

    async def begin() -> None:
        await serve()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    is_over = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(begin(),))
    thread.start()
    try:
        assert started.wait(10)
        yield port[0]
    finally:
        loop.call_soon_threadsafe(is_over.set)
        thread.join(10)
        loop.close()
        assert not thread.is_alive()


def asker(port: int, backend: str = "openai", **options) -> Asker:
    return Asker(Target(("127.0.0.1", port)), backend, "stub", {}, {}, **options)


def ask(stub: Stub, n_output: int = 6, **options) -> Record:
    """One request to the stub."""
    turn = Turn("one two three", 3, n_output)

    async def run() -> Record:
        async with stub.listening() as port:
            one = asker(port, **options)
            return await one.ask(one.body([], turn), Record(3))

    return asyncio.run(run())
