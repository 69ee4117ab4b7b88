"""The calls of fastgen.v1.FastGen, thin: door, intake and answer are those of HTTP.

Each takes a stream of requests, of which it reads one: that is the same on the wire, and a call
that the door refuses is refused before its message is read.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
from grpc.aio import ServicerContext

from fastgen_jax.server import answer
from fastgen_jax.server.config import ServerConfig
from fastgen_jax.server.door import Client, Door, request_id_of
from fastgen_jax.server.errors import CLIENT_GONE, ApiError, internal, invalid
from fastgen_jax.server.generation import Generation
from fastgen_jax.server.intake import Entered, enter
from fastgen_jax.server.origin import Origin, current
from fastgen_jax.server.reader import Reader
from fastgen_jax.server.rpc import fastgen_pb2 as messages
from fastgen_jax.server.rpc import requests, statuses
from fastgen_jax.server.service import Service
from fastgen_jax.server.stream import BODY_TIMEOUT

log = logging.getLogger("fastgen_jax.server")

NAME = messages.DESCRIPTOR.services_by_name["FastGen"].full_name


class Calls:
    """INVARIANT: service.n_inflight counts those under way, but not the last bytes of a refusal."""

    def __init__(self, service: Service, config: ServerConfig):
        self.service = service
        self.config = config
        self.door = Door(service, config)
        self.reader = Reader(service, config)
        # So many messages may arrive at once as make up what is held of uploads; others wait.
        self._arriving = asyncio.Semaphore(config.max_upload_bytes // config.max_body_bytes)

    def handler(self) -> grpc.GenericRpcHandler:
        """All calls, for a server; messages pass it as bytes."""
        whole, stream = grpc.stream_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
        handlers = {
            "Generate": whole(self.generate),
            "GenerateStream": stream(self.generate_stream),
            "Tokenize": whole(self.tokenize),
            "Models": whole(self.models),
        }
        self.service.metrics.expect([f"/{NAME}/{name}" for name in handlers])
        return grpc.method_handlers_generic_handler(NAME, handlers)

    async def generate(self, _: Any, context: ServicerContext) -> bytes:
        async with self._call(context, "Generate", queues=True) as client:
            generation, ask = await self._enter(context, client, is_streaming=False)
            with self._held(generation):
                return await answer.whole(generation, ask.format)

    async def generate_stream(self, _: Any, context: ServicerContext):
        async with self._call(context, "GenerateStream", queues=True) as client:
            generation, ask = await self._enter(context, client, is_streaming=True)
            with self._held(generation):
                async for piece in answer.pieces(generation, ask.format):
                    await self._write(context, piece)

    async def tokenize(self, _: Any, context: ServicerContext) -> bytes:
        async with self._call(context, "Tokenize", queues=False):
            with self.service.uploads.open() as upload:
                body = await self._read(context)
                upload.take(len(body))
                tokens = await self.service.run_text(
                    len(body), lambda: requests.tokens_of(self.reader, body)
                )
            longest = self.service.require_backend().engine.max_total_tokens
            reply = messages.TokenizeResponse(tokens=tokens, max_model_len=longest)
            return reply.SerializeToString()

    async def models(self, _: Any, context: ServicerContext) -> bytes:
        async with self._call(context, "Models"):
            requests.parsed(messages.ModelsRequest, await self._read(context))
            backend = self.service.backend
            longest = backend.engine.max_total_tokens if backend else 0
            found = [messages.Model(id=n, max_model_len=longest) for n in self.service.model_names]
            return messages.ModelsResponse(models=found).SerializeToString()

    @contextlib.asynccontextmanager
    async def _call(
        self, context: ServicerContext, name: str, *, queues: bool | None = None
    ) -> AsyncIterator[Client]:
        """One call from its door to its status; `queues` is None where the engine has no part.

        What fails within ends it with the status of the failure, once it is no longer in flight: a
        client that reads nothing does not take that either.
        """
        metadata = {name: str(value) for name, value in context.invocation_metadata() or ()}
        request_id = request_id_of(metadata.get("x-request-id", ""))
        context.set_trailing_metadata((("x-request-id", request_id),))
        traces = (metadata.get(name, "") for name in ("traceparent", "tracestate"))
        origin = Origin(request_id, f"POST /{NAME}/{name}", *traces)
        current.set(origin)
        try:
            client = self._admitted(origin, metadata.get("authorization", ""), queues=queues)
            with self._counted(origin):
                yield client
        except ApiError as error:
            trailers = statuses.trailers_of(error, request_id)
            await context.abort(statuses.code_of(error), statuses.message_of(error), trailers)

    def _admitted(self, origin: Origin, authorization: str, *, queues: bool | None) -> Client:
        """Whose call it is. Raises ApiError for one that may not come in."""
        try:
            client = self.door.client_of(authorization)
            if queues is not None:
                self.door.check_work(client, queues=queues)
        except ApiError as error:
            self.service.journal.refused(origin, error)
            raise
        return client

    @contextlib.contextmanager
    def _counted(self, origin: Origin) -> Iterator[None]:
        """Raises ApiError for whatever fails within; a cancelled call counts as one that left."""
        started, status = time.monotonic(), CLIENT_GONE
        self.service.n_inflight += 1
        try:
            yield
            status = 200
        except ApiError as error:
            status = error.status
            raise
        except Exception as error:
            status = 500
            log.error("a call failed: %s", type(error).__name__, exc_info=error)
            raise internal(f"internal error; quote request id {origin.request_id}") from None
        finally:
            self.service.n_inflight -= 1
            self.service.journal.answered(origin, status, time.monotonic() - started)

    async def _enter(
        self, context: ServicerContext, client: Client, *, is_streaming: bool
    ) -> Entered:
        """The request in the engine's queue. Its deadline is the call's own."""
        with self.service.uploads.open() as upload:
            body = await self._read(context)
            upload.take(len(body))
            return await enter(
                self.service,
                lambda: requests.generation_of(self.reader, body, is_streaming=is_streaming),
                n_bytes=len(body),
                client=client,
                timeout=context.time_remaining(),
            )

    async def _read(self, context: ServicerContext) -> bytes:
        """The call's one message. Raises ApiError if none comes, or none in time."""
        try:
            async with asyncio.timeout(BODY_TIMEOUT), self._arriving:
                body = await context.read()
        except TimeoutError:
            message = f"the message did not arrive within {BODY_TIMEOUT:g} s"
            raise ApiError(408, message, code="request_timeout") from None
        if not isinstance(body, bytes):  # the end
            raise invalid("the call ended without a message; send one")
        return body

    async def _write(self, context: ServicerContext, piece: bytes):
        """Waits until the client's window has room. Raises ApiError if it makes none."""
        try:
            async with asyncio.timeout(self.config.stream_timeout):
                await context.write(piece)
        except TimeoutError:
            log.warning("a client left its answer unread; its call is ended")
            seconds = f"{self.config.stream_timeout:g} s"
            raise ApiError(CLIENT_GONE, f"the answer was left unread for {seconds}") from None

    @contextlib.contextmanager
    def _held(self, generation: Generation) -> Iterator[None]:
        """Ends `generation` when its call is cancelled; what is unfinished ends on leaving."""
        try:
            yield
        except asyncio.CancelledError:
            self.service.fail(generation, ApiError(CLIENT_GONE, "the client cancelled"))
            raise
        except ApiError as error:
            self.service.fail(generation, error)
            raise
        finally:
            self.service.release(generation)
