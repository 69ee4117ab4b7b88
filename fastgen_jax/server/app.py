"""The routes, thin: what they share is in reader, service, stream and formats."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from fastgen_jax.server import admin, answer, protocol, responses
from fastgen_jax.server.config import ServerConfig
from fastgen_jax.server.embeddings import EmbeddingRequest, Embeddings
from fastgen_jax.server.errors import ApiError, internal
from fastgen_jax.server.gate import Gate
from fastgen_jax.server.intake import Entered, enter
from fastgen_jax.server.metrics import CONTENT_TYPE
from fastgen_jax.server.protocol import ChatRequest, CompletionRequest
from fastgen_jax.server.protocol_responses import ResponsesRequest
from fastgen_jax.server.reader import Ask, Reader
from fastgen_jax.server.service import Service
from fastgen_jax.server.stream import (
    EVENT_STREAM,
    EventStream,
    Refusal,
    cancelled_by_disconnect,
    read_json,
)
from fastgen_jax.server.watch import StepStream, Watch
from fastgen_jax.server.web import PAGES, Web

VERSION = version("fastgen-jax")
N_DRAIN_BODIES = 16  # of a refused body, so many times the limit is still read and dropped


def create_app(service: Service, config: ServerConfig) -> Gate:
    """The whole HTTP application."""
    app = FastAPI(title="fastgen_jax", version=VERSION, redoc_url=None, redirect_slashes=False)
    routes = Routes(service, config)
    app.add_exception_handler(ApiError, routes.on_api_error)
    app.add_exception_handler(HTTPException, routes.on_http_exception)
    app.add_exception_handler(Exception, routes.on_fault)
    for path, handler in {
        "/livez": routes.livez, "/health/live": routes.livez, "/health": routes.health,
        "/health/ready": routes.health, "/ready": routes.health, "/ping": routes.health,
        "/metrics": routes.metrics, "/version": routes.version, "/v1/models": routes.models,
        "/v1/models/{model_id:path}": routes.model, "/tokenizer_info": routes.tokenizer_info,
    }.items():  # fmt: skip
        app.add_api_route(path, handler, methods=["GET"])
        app.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)
    for path, handler, body in (
        ("/v1/completions", routes.completions, CompletionRequest),
        ("/v1/chat/completions", routes.chat, ChatRequest),
        ("/v1/responses", routes.responses, ResponsesRequest),
        ("/v1/embeddings", routes.embeddings.respond, EmbeddingRequest),
        ("/tokenize", routes.tokenize, protocol.TokenizeRequest),
        ("/detokenize", routes.detokenize, protocol.DetokenizeRequest),
    ):
        app.add_api_route(path, handler, methods=["POST"], openapi_extra=_body_schema(body))
    app.add_api_route(
        "/v1/responses/{response_id}",
        routes.response,
        methods=["GET", "HEAD", "DELETE"],
        include_in_schema=False,  # which would want an operation for each method
    )
    if config.admin_key is not None:
        changes = admin.Admin(service, config)
        for method, paths in (("GET", admin.OF_GET), ("POST", admin.OF_POST)):
            for path in paths:
                app.add_api_route(path, getattr(changes, path[1:]), methods=[method])
    if config.profile is not None:
        app.add_api_route("/start_profile", service.profiler.start, methods=["POST"])
        app.add_api_route("/stop_profile", service.profiler.stop, methods=["POST"])
    if config.web:
        app.add_api_route("/debug/steps", routes.steps, methods=["GET"])
        app.add_api_route(
            "/debug/steps", routes.no_steps, methods=["HEAD"], include_in_schema=False
        )
        web = Web()
        for path in PAGES:
            app.add_api_route(path, web.page, methods=["GET", "HEAD"], include_in_schema=False)
    routed = [route for route in app.routes if isinstance(route, APIRoute)]
    service.metrics.expect([r.path for r in routed if "POST" in (r.methods or ())])
    return Gate(app, service, config)


class Routes:
    """The endpoints of one service."""

    def __init__(self, service: Service, config: ServerConfig):
        self.service = service
        self.config = config
        self.reader = Reader(service, config)
        self.embeddings = Embeddings(service, config)
        self.watch = Watch(service)

    async def livez(self, request: Request) -> Response:
        """The event loop answers; 503 if it can never serve again."""
        if self.service.failure is not None:
            return _json({"status": "failed", "reason": self.service.failure}, status=503)
        return _json({"status": "ok"})

    async def health(self, request: Request) -> Response:
        """200 once the first request can be served; else 503 and the phase."""
        is_ready, state = self.service.health()
        headers = None if is_ready else {"retry-after": "1"}
        return _json(state, status=200 if is_ready else 503, headers=headers)

    async def version(self, request: Request) -> Response:
        return _json({"version": VERSION})

    async def metrics(self, request: Request) -> Response:
        body = self.service.metrics.render(self.service.stats())
        return Response(body, headers={"content-type": CONTENT_TYPE})

    async def steps(self, request: Request) -> Response:
        return StepStream(self.watch)

    async def no_steps(self, request: Request) -> Response:
        return Response(media_type=EVENT_STREAM)

    async def models(self, request: Request) -> Response:
        data = [self._model_object(name) for name in self.service.model_names]
        return _json({"object": "list", "data": data})

    async def model(self, request: Request, model_id: str) -> Response:
        self.reader.check_model(model_id)
        return _json(self._model_object(model_id))

    async def tokenizer_info(self, request: Request) -> Response:
        """What lm-eval's remote tokenizer asks, under vLLM's name."""
        return _json(self.service.require_backend().tokenizer.describe())

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, self.reader.completion)

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, self.reader.chat)

    async def responses(self, request: Request) -> Response:
        owner = request.scope["state"]["client"].owner
        return await self._generate(request, lambda body: self.reader.response(body, owner))

    async def response(self, request: Request, response_id: str) -> Response:
        """A response that was kept for this client, or, deleted, what is left of it."""
        kept, owner = self.reader.kept, request.scope["state"]["client"].owner
        if request.method == "DELETE" and kept.delete(owner, response_id):
            return _json({"id": response_id, "object": "response.deleted", "deleted": True})
        entry = kept.get(owner, response_id)
        if entry is None:
            message = f"there is no response {response_id!r:.80}, or none any more"
            raise ApiError(404, message, param="response_id", code="response_not_found")
        return Response(entry.response, media_type="application/json")

    async def tokenize(self, request: Request) -> Response:
        return await self._convert(request, self.reader.tokens)

    async def detokenize(self, request: Request) -> Response:
        return await self._convert(request, self.reader.text)

    async def on_api_error(self, request: Request, error: Any) -> Response:
        return Refusal(error, N_DRAIN_BODIES * self.config.max_body_bytes)

    async def on_http_exception(self, request: Request, error: Any) -> Response:
        """404 and 405, from the router."""
        message = f"{request.method} {request.url.path}: {error.detail}"[:200]
        if error.status_code != 405:
            return Refusal(ApiError(error.status_code, message, code="not_found"))
        methods = set(error.headers["Allow"].split(", "))
        methods |= {"HEAD"} if "GET" in methods else set()  # which has a route of its own
        allowed = ", ".join(sorted(methods))
        message += f"; allowed: {allowed}"
        headers = {"allow": allowed}
        return Refusal(ApiError(405, message, code="method_not_allowed", headers=headers))

    async def on_fault(self, request: Request, error: Exception) -> Response:
        """A fault of ours: the log gets the traceback, the client an id to quote. The exception
        goes on to uvicorn, which closes the connection; the client must not send on it again.
        """
        error = internal(f"internal error; quote request id {request.scope['state']['request_id']}")
        error.headers |= {"connection": "close"}
        return Refusal(error)

    def _model_object(self, name: str) -> dict[str, Any]:
        backend = self.service.backend
        longest = backend.engine.max_total_tokens if backend else None
        return responses.model_object(name, self.service.created, longest, self.service.hub_id)

    async def _convert(self, request: Request, read: Callable[[bytearray], bytes]) -> Response:
        with self.service.uploads.open() as upload:
            body = await read_json(request, self.config.max_body_bytes, upload)
            reply = await self.service.run_text(len(body), lambda: read(body))
        return Response(reply, media_type="application/json")

    async def _submit(self, request: Request, read: Callable[[bytearray], Ask]) -> Entered:
        """The request in the engine's queue. INVARIANT: the body is counted as long as it lives."""
        with self.service.uploads.open() as upload:
            body = await read_json(request, self.config.max_body_bytes, upload)
            state = request.scope["state"]
            return await enter(
                self.service,
                lambda: read(body),
                n_bytes=len(body),
                client=state["client"],
                timeout=state["timeout"],
            )

    async def _generate(self, request: Request, read: Callable[[bytearray], Ask]) -> Response:
        generation, ask = await self._submit(request, read)
        if ask.is_streaming:
            return EventStream(generation, ask.format, self.service)
        with cancelled_by_disconnect(request.receive, self.service, generation):
            body = await answer.whole(generation, ask.format)
        return Response(body, media_type="application/json")


def _json(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, "application/json")


def _body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """What /docs shows of a body that the route parses itself."""
    schema = model.model_json_schema()
    if definitions := schema.pop("$defs", None):
        schema["properties"]["stream_options"] = definitions["StreamOptions"]
    return {"requestBody": {"content": {"application/json": {"schema": schema}}}}
