"""Bytes in and out of one HTTP request: bodies within limits, server-sent events, disconnects."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastgen_jax.server import answer
from fastgen_jax.server.errors import CLIENT_GONE, ApiError
from fastgen_jax.server.formats.format import Format
from fastgen_jax.server.generation import Generation
from fastgen_jax.server.responses import send_error
from fastgen_jax.server.service import Service
from fastgen_jax.server.uploads import Upload

EVENT_STREAM = "text/event-stream; charset=utf-8"
SSE_HEADERS = [
    (b"content-type", EVENT_STREAM.encode()),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
BODY_TIMEOUT = 30.0


async def read_json(request: Request, max_bytes: int, upload: Upload) -> bytearray:
    """The request's body, which must say that it is JSON, counted in `upload` as it comes.

    Raises:
        ApiError: 415 for another type or encoding, 413 as soon as it is known to be over
            `max_bytes`, 429 as soon as it is known to be more than `upload` takes, 408 if it is
            slow.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"send the header 'Content-Type: application/json', not {kind!r:.80}"
        raise ApiError(415, message, code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "compressed bodies are not accepted", code="unsupported_media_type")
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > max_bytes:
        raise _too_large(max_bytes)
    upload.check(int(declared))
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            return await _read(request, max_bytes, upload)
    except TimeoutError:
        message = f"the body did not arrive within {BODY_TIMEOUT:g} s"
        headers = {"connection": "close"}
        raise ApiError(408, message, code="request_timeout", headers=headers) from None


async def _read(request: Request, max_bytes: int, upload: Upload) -> bytearray:
    body, more = bytearray(), True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ApiError(CLIENT_GONE, "the client disconnected")
        part, more = message.get("body", b""), message.get("more_body", False)
        if len(body) + len(part) > max_bytes:
            raise _too_large(max_bytes)
        upload.take(len(part))
        body += part
    return body


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {max_bytes} bytes; send less or raise --max-body-bytes",
        code="request_too_large",
        headers={"connection": "close"},
    )


@contextlib.contextmanager
def cancelled_by_disconnect(
    receive: Receive, service: Service, generation: Generation
) -> Iterator[None]:
    """Ends `generation` when the client goes away; cancels what is unfinished on leaving."""
    gone = ApiError(CLIENT_GONE, "the client disconnected")
    try:
        with on_disconnect(receive, lambda: service.fail(generation, gone)):
            yield
    finally:
        service.release(generation)


@contextlib.contextmanager
def on_disconnect(receive: Receive, leave: Callable[[], None]) -> Iterator[None]:
    """Calls `leave` if the client goes away meanwhile."""

    async def watch():
        while (await receive())["type"] != "http.disconnect":
            pass
        leave()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


class EventStream(Response):
    """Streams a generation as server-sent events.

    Nothing is sent before the first token, so that a failure until then has its own status. A later
    failure is an error event, and the connection is cut without [DONE]. For a reader that takes
    nothing, see peer.UnreadTimer.
    """

    def __init__(self, generation: Generation, format: Format, service: Service):
        super().__init__()
        self.raw_headers = SSE_HEADERS
        self.generation = generation
        self.format = format
        self.service = service
        self.is_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        with cancelled_by_disconnect(receive, self.service, self.generation):
            try:
                async for events in answer.pieces(self.generation, self.format):
                    await self._send(events, send)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            except ApiError as error:
                await self._send_error(error, send)

    async def _send(self, events: bytes, send: Send):
        if not self.is_started:
            self.is_started = True
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
        await send({"type": "http.response.body", "body": events, "more_body": True})

    async def _send_error(self, error: ApiError, send: Send):
        if error.status == CLIENT_GONE:
            return
        if not self.is_started:
            await send_error(error, send)
            return
        message = {
            "type": "http.response.body",
            "body": self.format.error(error),
            "more_body": True,
        }
        await send(message)  # and no more: the server cuts a response that is not completed


class Refusal(Response):
    """An error object.

    If the body is still on its way, the rest is read and dropped, within limits, before the
    connection closes: a close with unread data would reset it and take the refusal with it.
    """

    def __init__(self, error: ApiError, max_bytes: int = 0):
        super().__init__()
        self.error = error
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        if self.error.status not in (408, 413):
            await send_error(self.error, send)
            return
        await send_error(self.error, send, more_body=True)
        await _drop_body(receive, self.max_bytes)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _drop_body(receive: Receive, max_bytes: int):
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1.0):
            while max_bytes > 0:
                message = await receive()
                max_bytes -= len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return
