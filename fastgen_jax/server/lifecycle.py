"""The server's life: serve while the model loads, drain on a signal, exit.

First SIGTERM or SIGINT: not ready, no new work, running requests finish for up to drain_timeout,
the rest end with an error. Second: the process exits at once.
"""

import asyncio
import functools
import logging
import os
import socket
import time
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import uvicorn

from fastgen_jax.server import capacity, logs
from fastgen_jax.server.app import create_app
from fastgen_jax.server.certificates import Certificates
from fastgen_jax.server.config import ServerConfig
from fastgen_jax.server.connection import Connection
from fastgen_jax.server.errors import unavailable
from fastgen_jax.server.listen import BACKLOG
from fastgen_jax.server.service import Service
from fastgen_jax.server.tls import TlsProtocol

if TYPE_CHECKING:  # it needs packages that only its users have
    from fastgen_jax.server.rpc.server import RpcServer

log = logging.getLogger("fastgen_jax.server")

POLL = 0.02  # seconds
LAST_WRITES = 1.0  # seconds that the error events of a cut-off drain may take
LOG_EVERY = 10.0  # seconds between lines of throughput


class Server(uvicorn.Server):
    """uvicorn with our start and end. INVARIANT: new work is refused from the first signal on."""

    def __init__(
        self,
        service: Service,
        config: ServerConfig,
        certificates: Certificates | None = None,
        rpc: "RpcServer | None" = None,
    ):
        self.capacity = capacity.of_process()
        self.certificates = certificates
        app = create_app(service, config)
        self._make_connection = functools.partial(
            Connection,
            refuse=app.refusal,
            unread_timeout=config.stream_timeout,
            capacity=self.capacity,
        )
        super().__init__(
            uvicorn.Config(
                app,
                http=self._protocol,  # type: ignore[arg-type]
                backlog=BACKLOG,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=1,
            )
        )
        self.service = service
        self.rpc = rpc
        self.drain_timeout = config.drain_timeout
        self.throughput = ThroughputLog(service)
        self.descriptor_alarm = capacity.DescriptorAlarm()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task | None = None
        self._n_signals = 0

    def _protocol(self, **uvicorns: Any) -> asyncio.Protocol:
        """One connection's."""
        connection, certificates = self._make_connection(**uvicorns), self.certificates
        if certificates is None:
            return connection
        return TlsProtocol(connection, lambda: certificates.context)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self.rpc is not None:
            await self.rpc.start()
        self.service.attach(self._loop)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.rpc is not None:
            await self.rpc.stop()
        await self.service.profiler.close()
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        self.throughput.tick()
        self.descriptor_alarm.tick()
        if self.certificates is not None:
            self.certificates.tick()
        return await super().on_tick(counter) or self.service.must_exit

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._n_signals += 1
        if self._n_signals > 1 or self._loop is None:
            logs.flush()
            os._exit(128 + sig if self._n_signals > 1 else 0)
        self._loop.call_soon_threadsafe(self.begin_drain)

    def begin_drain(self):
        """Starts the orderly end; run on the event loop."""
        if self._draining is None:
            log.info("stopping: %d requests in flight", self.service.n_inflight)
            self.service.drain()
            if self.rpc is not None:
                self.rpc.drain(self.drain_timeout + 2 * LAST_WRITES)
            self._draining = asyncio.create_task(self._drain())

    async def _drain(self):
        try:
            if not await self._idle_within(self.drain_timeout):
                await self._end_all()
        finally:
            self.should_exit = True

    async def _end_all(self):
        error = unavailable("the server is shutting down", "draining", 1, close=True)
        self.service.abort_all(error)
        for connection in self._connections():
            connection.refuse_unfinished(error)
        if not await self._idle_within(LAST_WRITES):
            if self.rpc is not None:
                await self.rpc.stop()
            for connection in self._connections():
                connection.cut()
            await self._idle_within(LAST_WRITES)

    def _connections(self) -> list[Connection]:
        return cast(list[Connection], list(self.server_state.connections))

    async def _idle_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.service.n_inflight and time.monotonic() < deadline:
            await asyncio.sleep(POLL)
        return not self.service.n_inflight


class ThroughputLog:
    """A line about the last seconds' work, none while idle."""

    def __init__(self, service: Service):
        self.service = service
        self.time = time.monotonic()
        self.n_prompt = self.n_generated = 0

    def tick(self):
        elapsed = time.monotonic() - self.time
        if elapsed < LOG_EVERY:
            return
        self.time += elapsed
        stats = self.service.stats()
        if stats is None:
            return
        prompt = stats.n_prompt_tokens - self.n_prompt
        generated = stats.n_generated_tokens - self.n_generated
        self.n_prompt, self.n_generated = stats.n_prompt_tokens, stats.n_generated_tokens
        if prompt or generated or stats.n_running:
            log.info(
                "prompt %.0f tokens/s, generated %.0f tokens/s, running %d, waiting %d, KV %.0f %%",
                prompt / elapsed, generated / elapsed, stats.n_running, stats.n_waiting,
                100 * stats.kv_usage,
            )  # fmt: skip
