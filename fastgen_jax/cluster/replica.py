"""Replica: one engine with its whole HTTP application, called through Ray in place of a socket."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.types import Message, Scope

from fastgen_jax.cluster.scaling import MAX_NUM_SEQS, WAITING_TOKENS
from fastgen_jax.cluster.ticket import Ticket
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.errors import FastGenError
from fastgen_jax.server import logs
from fastgen_jax.server.app import create_app
from fastgen_jax.server.config import ServerConfig
from fastgen_jax.server.errors import unavailable
from fastgen_jax.server.loading import make_service, model_names
from fastgen_jax.server.report import StartupReport

log = logging.getLogger("fastgen_jax.cluster")

POLL = 0.05  # seconds


class Replica:
    """Ready once it is constructed, so that Ray sends it nothing before."""

    async def __init__(self, engine_config: EngineConfig, server_config: ServerConfig):
        logs.set_up_logging(server_config.log_level, server_config.log_format)
        name = model_names(engine_config.model, server_config)[0]
        report = StartupReport("", name, time.monotonic())
        self.service = make_service(engine_config, server_config, report)
        self.app = create_app(self.service, server_config)
        self._answers: set[asyncio.Task] = set()
        self.service.start()
        self.service.attach(asyncio.get_running_loop())
        while not self.service.health()[0]:
            if self.service.load_error is not None:
                raise self.service.load_error
            await asyncio.sleep(POLL)

    async def respond(
        self, ticket: Ticket, scope: Scope, body: bytes
    ) -> AsyncIterator[list[Message]]:
        """What the application sends, as it comes. First nothing: the request has arrived here.

        Who stops listening is to the application a client that has disconnected.
        """
        answer = Answer(body)
        task = asyncio.create_task(answer.run(self.app, scope))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)
        try:
            yield []
            while messages := await answer.messages():
                yield messages
        finally:
            answer.is_unheard.set()

    async def check_health(self):
        """Ray replaces a replica whose /health is not 200."""
        is_ready, state = self.service.health()
        if not is_ready:
            raise FastGenError(f"{state['phase']}: {state.get('reason', 'not ready')}")

    async def record_autoscaling_stats(self) -> dict[str, int | None]:
        """What TokenPolicy reads."""
        engine = self.service.require_backend().engine
        return {WAITING_TOKENS: engine.n_queued_tokens, MAX_NUM_SEQS: engine.config.max_num_seqs}

    async def __del__(self):
        """Ray has waited for what runs; what is left has had its time."""
        self.service.drain()
        self.service.abort_all(unavailable("the server is shutting down", "draining", 1))
        if self._answers:
            await asyncio.wait(self._answers, timeout=1.0)
        await asyncio.to_thread(self.service.stop)


class Answer:
    """One request's ends of the application: `run` fills what `messages` empties."""

    def __init__(self, body: bytes):
        self.is_unheard = asyncio.Event()
        self._unread_body: bytes | None = body
        self._sent: asyncio.Queue[Message | None] = asyncio.Queue()

    async def run(self, app: Any, scope: Scope):
        """Never raises: the application has answered a fault of its own before it raises it."""
        try:
            await app(scope, self._receive, self._send)
        except Exception as error:
            log.error("answering failed: %s", type(error).__name__, exc_info=error)
        finally:
            self._sent.put_nowait(None)

    async def messages(self) -> list[Message]:
        """All that was sent since the last call, at least one; none at the end."""
        found = [await self._sent.get()]
        while not self._sent.empty():
            found.append(self._sent.get_nowait())
        if found[-1] is None and len(found) > 1:
            self._sent.put_nowait(None)
        return [message for message in found if message is not None]

    async def _receive(self) -> Message:
        if self._unread_body is not None:
            body, self._unread_body = self._unread_body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.is_unheard.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message):
        self._sent.put_nowait(message)
