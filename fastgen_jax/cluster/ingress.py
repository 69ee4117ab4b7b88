"""Ingress: takes a request in, sends it to a replica, and to another one if that is lost.

What a request may do is its replica's business; only what is held here is bounded here, and held
for nobody without a key. A request that no byte has been answered to is sent again, once and within
a Budget; a stream that had begun ends with an error event and without [DONE].
"""

import asyncio
import logging
from typing import TYPE_CHECKING

import orjson
from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]
from ray.serve.exceptions import BackPressureError, RayServeException  # pyright: ignore[reportMissingImports]
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from fastgen_jax.cluster.policy import Budget
from fastgen_jax.cluster.ticket import Ticket, read_ticket
from fastgen_jax.errors import QueueFull
from fastgen_jax.server.config import ServerConfig
from fastgen_jax.server.door import Keys
from fastgen_jax.server.errors import ApiError, from_engine, unavailable
from fastgen_jax.server.formats.format import event
from fastgen_jax.server.responses import send_error
from fastgen_jax.server.stream import read_json
from fastgen_jax.server.uploads import Uploads

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator  # pyright: ignore[reportMissingImports]

log = logging.getLogger("fastgen_jax.cluster")

BODY = "http.response.body"
EVENTS = "text/event-stream"
REQUEST_ID = b"x-request-id"  # Ray's proxy adds it, as it came or anew
HEAD = ("type", "http_version", "method", "scheme", "query_string", "headers", "client", "server")


class Ingress:
    """The deployment; Ray asks it for the application."""

    def __init__(self, replicas: "DeploymentHandle", config: ServerConfig, burst: int):
        self.forwarder = Forwarder(replicas, config, Budget(burst))

    def __serve_build_asgi_app__(self) -> "Forwarder":
        return self.forwarder


class Forwarder:
    """ASGI app in front of all replicas."""

    def __init__(self, replicas: "DeploymentHandle", config: ServerConfig, budget: Budget):
        self.config = config
        self.budget = budget
        self._replicas = replicas.options(method_name="respond", stream=True)
        self._uploads = Uploads(config.max_upload_bytes)
        self._keys = Keys(config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        if scope["type"] != "http":
            return None
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        head = {key: scope[key] for key in HEAD if key in scope} | {"path": path}
        try:
            reply = await self._answered(head, Request(scope, receive))
        except ApiError as error:
            return await send_error(error, send)
        try:
            await reply.pass_on(send)
        finally:
            reply.cancel()

    async def _answered(self, head: Scope, request: Request) -> "Reply":
        """A reply that has begun, of the second replica if the first one was lost."""
        with self._uploads.open() as upload:
            body = b""
            if request.method == "POST":
                self._keys.client_of(request.headers.get("authorization", ""))
                body = bytes(await read_json(request, self.config.max_body_bytes, upload))
            ticket = read_ticket(body)
            self.budget.earn()
            reply = await self._begun(head, body, ticket)
            if reply.is_lost and self.budget.spend():
                reply.cancel()
                reply = await self._begun(head, body, ticket)
        return reply

    async def _begun(self, head: Scope, body: bytes, ticket: Ticket) -> "Reply":
        reply = Reply(self._replicas.remote(ticket, head, body), head["path"])
        try:
            await reply.begin(self.config.queue_timeout)
        except BaseException:
            reply.cancel()
            raise
        return reply


class Reply:
    """What a replica sends.

    Args:
        messages: lists of ASGI messages, the first of them empty: the request has arrived.
    """

    def __init__(self, messages: "DeploymentResponseGenerator", path: str):
        self.cancel = messages.cancel
        self.is_lost = False
        self._messages = messages
        self._path = path
        self._first: list[Message] = []

    async def begin(self, timeout: float):
        """Waits until a replica has begun to answer, or is lost.

        Raises:
            ApiError: none took the request: 504 in time, 429 for all the others that wait.
        """
        try:
            async with asyncio.timeout(timeout):
                await anext(self._messages)
            self._first = await anext(self._messages)
        except TimeoutError:
            message = f"no replica could take the request within {timeout:g} s"
            raise ApiError(504, message, type="timeout_error", code="deadline_exceeded") from None
        except BackPressureError:
            raise from_engine(QueueFull("the queue is full; try again later")) from None
        except RayServeException:
            raise unavailable("the replicas cannot start", "failed", 30) from None
        except (RayError, StopAsyncIteration) as error:
            log.warning("a replica was lost before it answered: %s", type(error).__name__)
            self._first = await _messages_of(_lost())
        self.is_lost = self._first[0]["status"] == 503

    async def pass_on(self, send: Send):
        """Sends what comes, to its end or to the replica's."""
        start = self._first[0]
        is_events = Headers(raw=start["headers"]).get("content-type", "").startswith(EVENTS)
        start["headers"] = [pair for pair in start["headers"] if pair[0] != REQUEST_ID]
        messages, is_whole = self._first, False
        try:
            while messages:
                for message in messages:
                    is_whole = not message.get("more_body", message["type"] != BODY)
                    await send(message)
                messages = await anext(self._messages)
        except StopAsyncIteration:
            pass
        except RayError as error:
            log.warning("a replica was lost while it answered: %s", type(error).__name__)
            if is_events and not is_whole:
                await send({"type": BODY, "body": self._failure(), "more_body": True})

    def _failure(self) -> bytes:
        """The event that ends a stream; the connection is cut after it."""
        error = _lost()
        if self._path != "/v1/responses":
            return event(error.body())
        fields = {"type": "error", "code": error.code, "message": error.message, "param": None}
        return b"event: error\n" + event(orjson.dumps(fields | {"sequence_number": 0}))


def _lost() -> ApiError:
    return unavailable("the replica that worked on this request is gone", "replica_lost", 1)


async def _messages_of(error: ApiError) -> list[Message]:
    messages: list[Message] = []

    async def keep(message: Message):
        messages.append(message)

    await send_error(error, keep)
    return messages
