"""The routes, thin: what they share is in protocol, service, stream and responses."""

import asyncio
from importlib.metadata import version
from typing import Any

import orjson
from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from fastgen_jax.sampling_params import SamplingParams
from fastgen_jax.server import protocol, responses
from fastgen_jax.server.config import ServerConfig
from fastgen_jax.server.errors import ApiError, internal, invalid
from fastgen_jax.server.gate import Gate
from fastgen_jax.server.metrics import CONTENT_TYPE
from fastgen_jax.server.protocol import ChatRequest, CompletionRequest, GenerationRequest
from fastgen_jax.server.responses import ResponseFormat
from fastgen_jax.server.service import Service
from fastgen_jax.server.stream import EventStream, Refusal, cancelled_by_disconnect, read_json

VERSION = version("fastgen-jax")
MAX_CHOICES = 1024  # prompts x n of one body
N_DRAIN_BODIES = 16  # of a refused body, so many times the limit is still read and dropped
INLINE_LOGPROBS = 2000  # entries up to which a body is built on the event loop


def create_app(service: Service, config: ServerConfig) -> ASGIApp:
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
        "/v1/models/{model_id:path}": routes.model,
    }.items():  # fmt: skip
        app.add_api_route(path, handler, methods=["GET"])
        app.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)
    for path, handler, body in (
        ("/v1/completions", routes.completions, CompletionRequest),
        ("/v1/chat/completions", routes.chat, ChatRequest),
        ("/tokenize", routes.tokenize, protocol.TokenizeRequest),
        ("/detokenize", routes.detokenize, protocol.DetokenizeRequest),
    ):
        app.add_api_route(path, handler, methods=["POST"], openapi_extra=_body_schema(body))
    return Gate(app, service, config)


class Routes:
    """The endpoints of one service."""

    def __init__(self, service: Service, config: ServerConfig):
        self.service = service
        self.config = config

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

    async def models(self, request: Request) -> Response:
        data = [self._model_object(name) for name in self.service.model_names]
        return _json({"object": "list", "data": data})

    async def model(self, request: Request, model_id: str) -> Response:
        self._check_model(model_id)
        return _json(self._model_object(model_id))

    async def completions(self, request: Request) -> Response:
        spec = protocol.parse(CompletionRequest, await self._body(request))
        params = self._params(spec)
        engine_limit = self.service.require_backend().engine.config.max_queued_requests
        entries = spec.prompts(min(self.config.max_prompts, engine_limit))
        if len(entries) * params.n > MAX_CHOICES:
            raise invalid(f"prompts times n must be at most {MAX_CHOICES}", "n")
        prompts = await self._tokenize_prompts(entries, spec)
        echo = self._echoed(entries) if spec.echo else None
        return await self._respond(request, spec, params, prompts, echo=echo)

    async def chat(self, request: Request) -> Response:
        body = await self._body(request)
        spec = protocol.parse(ChatRequest, body)
        params = self._params(spec)
        prompt = await self._tokenize_chat(spec.messages, spec.template_kwargs(), len(body))
        prompt = self._checked(prompt, spec, "messages")
        return await self._respond(request, spec, params, [prompt])

    async def tokenize(self, request: Request) -> Response:
        body = await self._body(request)
        spec = protocol.parse(protocol.TokenizeRequest, body)
        self._check_model(spec.model)
        if (spec.prompt is None) == (spec.messages is None):
            raise invalid("send either prompt or messages", "prompt")
        if spec.prompt is not None:
            ids = await self._encode(spec.prompt, spec.add_special_tokens)
        else:
            variables = {"add_generation_prompt": spec.add_generation_prompt is not False}
            ids = await self._tokenize_chat(spec.messages, variables, len(body))
        backend = self.service.require_backend()
        reply = {"count": len(ids), "max_model_len": backend.engine.max_total_tokens, "tokens": ids}
        if spec.return_token_strs:
            reply["token_strs"] = [backend.tokenizer.token_text(id) for id in ids]
        return _json(reply)

    async def detokenize(self, request: Request) -> Response:
        spec = protocol.parse(protocol.DetokenizeRequest, await self._body(request))
        self._check_model(spec.model)
        if not protocol.is_ids(spec.tokens):
            raise invalid("tokens must be a list of token ids", "tokens")
        backend = self.service.require_backend()
        ids: list[int] = spec.tokens
        protocol.check_token_ids(ids, backend.engine.model_config.vocab_size, "tokens")
        decode = backend.tokenizer.decode
        text = await self.service.run_text(len(ids), lambda: decode(ids, skip_special_tokens=False))
        return _json({"prompt": text})

    async def on_api_error(self, request: Request, error: Any) -> Response:
        return Refusal(error, N_DRAIN_BODIES * self.config.max_body_bytes)

    async def on_http_exception(self, request: Request, error: Any) -> Response:
        """404 and 405, from the router."""
        message = f"{request.method} {request.url.path}: {error.detail}"
        return Refusal(ApiError(error.status_code, message[:200], code="not_found"))

    async def on_fault(self, request: Request, error: Exception) -> Response:
        """A fault of ours: the log gets the traceback, the client an id to quote."""
        request_id = request.scope["state"]["request_id"]
        return Refusal(internal(f"internal error; quote request id {request_id}"))

    async def _body(self, request: Request) -> bytes:
        return await read_json(request, self.config.max_body_bytes)

    def _params(self, spec: CompletionRequest | ChatRequest) -> SamplingParams:
        """The checked parameters of a request for a model that is served."""
        self._check_model(spec.model)
        spec.check_supported()
        return spec.to_params(self.service.require_backend().engine.default_params)

    def _check_model(self, name: str | None):
        if name is not None and name not in self.service.accepted_models:
            message = f"the model {name!r:.100} does not exist; GET /v1/models lists what is served"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _model_object(self, name: str) -> dict[str, Any]:
        backend = self.service.backend
        longest = backend.engine.max_total_tokens if backend else None
        return responses.model_object(name, self.service.created, longest)

    async def _encode(self, text: str, add_special_tokens: bool | None) -> list[int]:
        encode = self.service.require_backend().tokenizer.encode
        special = add_special_tokens is not False
        return await self.service.run_text(
            len(text), lambda: encode(text, add_special_tokens=special)
        )

    async def _tokenize_prompts(
        self, entries: list[str | list[int]], spec: CompletionRequest
    ) -> list[list[int]]:
        prompts = []
        for entry in entries:
            if isinstance(entry, str):
                entry = await self._encode(entry, spec.add_special_tokens)
            prompts.append(self._checked(entry, spec, "prompt"))
        return prompts

    async def _tokenize_chat(
        self, messages: Any, variables: dict[str, Any], body_size: int
    ) -> list[int]:
        parsed = protocol.parse_messages(messages)
        apply = self.service.require_backend().tokenizer.apply_chat_template
        return await self.service.run_text(body_size, lambda: apply(parsed, **variables))

    def _checked(self, ids: list[int], spec: GenerationRequest, param: str) -> list[int]:
        """The prompt's ids, cut at the left if asked, and known to be in the vocabulary."""
        if spec.truncate_prompt_tokens is not None:
            ids = ids[-spec.truncate_prompt_tokens :]
        vocab_size = self.service.require_backend().engine.model_config.vocab_size
        protocol.check_token_ids(ids, vocab_size, param)
        return ids

    def _echoed(self, entries: list[str | list[int]]) -> list[str]:
        decode = self.service.require_backend().tokenizer.decode
        return [entry if isinstance(entry, str) else decode(entry) for entry in entries]

    async def _respond(
        self,
        request: Request,
        spec: CompletionRequest | ChatRequest,
        params: SamplingParams,
        prompts: list[list[int]],
        *,
        echo: list[str] | None = None,
    ) -> Response:
        is_chat = isinstance(spec, ChatRequest)
        format = ResponseFormat(
            is_chat=is_chat,
            model=spec.model or self.service.model_names[0],
            tokenizer=self.service.require_backend().tokenizer,
            include_usage=spec.include_usage,
            continuous_usage=spec.continuous_usage,
            logprobs=params.logprobs,
            tokens_as_ids=bool(spec.return_tokens_as_token_ids),
            return_token_ids=bool(spec.return_token_ids),
            echo=echo,
        )
        param = "messages" if is_chat else "prompt"
        is_streaming = bool(spec.stream)
        salt = protocol.cache_salt(spec.cache_salt, request.scope["state"]["tenant"])
        generation = self.service.submit(
            prompts, params, is_streaming=is_streaming, param=param, cache_salt=salt
        )
        if is_streaming:
            return EventStream(generation, format, self.service)
        with cancelled_by_disconnect(request.receive, self.service, generation):
            await generation.changed()
        n_entries = generation.n_tokens * ((params.logprobs or 0) + 1)
        if params.logprobs is None or n_entries <= INLINE_LOGPROBS:
            body = format.result(generation)
        else:
            body = await asyncio.to_thread(format.result, generation)
        return Response(body, media_type="application/json")


def _json(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, "application/json")


def _body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """What /docs shows of a body that the route parses itself."""
    schema = model.model_json_schema()
    if definitions := schema.pop("$defs", None):
        schema["properties"]["stream_options"] = definitions["StreamOptions"]
    return {"requestBody": {"content": {"application/json": {"schema": schema}}}}
