"""POST /v1/embeddings: from a body to prompts, from vectors to the answer.

The vectors are the engine's, of Euclidean length 1; here they are cut, spelled and counted.
"""

import asyncio
import base64
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response

from fastgen_jax.engine.pooling import normalized
from fastgen_jax.server import protocol
from fastgen_jax.server.config import ServerConfig
from fastgen_jax.server.door import Client
from fastgen_jax.server.errors import ApiError, internal, invalid
from fastgen_jax.server.reader import Body, Reader
from fastgen_jax.server.service import Service
from fastgen_jax.server.stream import cancelled_by_disconnect, read_json

MAX_NUMBERS = 4_000_000  # of all vectors of one answer
INLINE_NUMBERS = 20_000  # up to which an answer is built on the event loop: 1 ms


class EmbeddingRequest(BaseModel):
    """Body of POST /v1/embeddings. null means: not given."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    input: Any = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None
    add_special_tokens: bool | None = None
    cache_salt: str | None = None
    priority: protocol.Priority | None = None

    def entries(self, max_prompts: int) -> list[str | list[int]]:
        """What each vector is of: a text or a list of token ids.

        Raises:
            ApiError: none, too many, or of the wrong type.
        """
        kinds = "a string, token ids, or a list of strings or of token ids"
        return protocol.entries_of(self.input, "input", kinds, max_prompts)


class EmbeddingAsk(NamedTuple):
    """What a body asks for, and the form of the answer."""

    prompts: list[list[int]]
    model: str
    is_base64: bool
    n_dimensions: int
    cache_salt: str | None = None
    priority: int = 0

    @property
    def n_numbers(self) -> int:
        return len(self.prompts) * self.n_dimensions


class EmbeddingReader(Reader):
    """Reads bodies of POST /v1/embeddings; raises ApiError for a bad one."""

    def embedding(self, body: Body) -> EmbeddingAsk:
        self.service.check_queue()
        spec = protocol.parse(EmbeddingRequest, body)
        self.check_model(spec.model)
        extras = spec.model_extra or {}
        if extras.get("truncate_prompt_tokens") is not None:
            raise invalid("truncate_prompt_tokens is not supported here", "truncate_prompt_tokens")
        protocol.check_extras(extras)
        protocol.check_salt(spec.cache_salt)
        entries = spec.entries(self.config.max_prompts)
        n_dimensions = self._dimensions(spec.dimensions, len(entries))
        self._check_texts([entry for entry in entries if isinstance(entry, str)], "input")
        prompts = [self._tokens_of(i, entry, spec) for i, entry in enumerate(entries)]
        return EmbeddingAsk(
            prompts,
            spec.model or self.service.model_names[0],
            spec.encoding_format == "base64",
            n_dimensions,
            spec.cache_salt,
            spec.priority or 0,
        )

    def _dimensions(self, asked: int | None, n_entries: int) -> int:
        size = self.service.require_backend().engine.model_config.hidden_size
        kept = size if asked is None else asked
        if not 1 <= kept <= size:
            raise invalid(f"dimensions must be from 1 to {size}, got {kept}", "dimensions")
        if n_entries * kept > MAX_NUMBERS:
            raise invalid(
                f"{n_entries} vectors of {kept} numbers are asked for, at most {MAX_NUMBERS} "
                "numbers in all; send fewer entries, or lower dimensions",
                "input",
            )
        return kept

    def _tokens_of(self, index: int, entry: str | list[int], spec: EmbeddingRequest) -> list[int]:
        ids = entry if isinstance(entry, list) else self._encode(entry, spec.add_special_tokens)
        longest = self.service.require_backend().engine.max_total_tokens
        if not ids:
            raise invalid(f"input[{index}] has no tokens", "input")
        if len(ids) > longest:
            raise ApiError(
                400,
                f"This model's maximum context length is {longest} tokens. However, input[{index}] "
                f"has {len(ids)} tokens. Please shorten it.",
                param="input",
                code="context_length_exceeded",
            )
        self._check_ids(ids, "input")
        return ids


class Embeddings:
    """The endpoint. The work is cancelled when the client leaves or the time is over."""

    def __init__(self, service: Service, config: ServerConfig):
        self.service = service
        self.config = config
        self.reader = EmbeddingReader(service, config)

    async def respond(self, request: Request) -> Response:
        ask = await self._read(request)
        vectors = await self._vectors(request, ask)
        if ask.n_numbers <= INLINE_NUMBERS:
            content = answer(ask, vectors)
        else:
            content = await asyncio.to_thread(answer, ask, vectors)
        return Response(content, media_type="application/json")

    async def _read(self, request: Request) -> EmbeddingAsk:
        with self.service.uploads.open() as upload:
            body = await read_json(request, self.config.max_body_bytes, upload)
            return await self.service.run_text(len(body), lambda: self.reader.embedding(body))

    async def _vectors(self, request: Request, ask: EmbeddingAsk) -> list[np.ndarray]:
        """Of length 1, in the order of the prompts."""
        client: Client = request.scope["state"]["client"]
        generation = self.service.embed(
            ask.prompts,
            protocol.cache_salt(ask.cache_salt, client.tenant),
            owner=client.owner,
            priority=ask.priority,
            timeout=request.scope["state"]["timeout"],
        )
        with cancelled_by_disconnect(request.receive, self.service, generation):
            await generation.changed()
        return [normalized(embedding) for embedding in generation.embeddings]


def answer(ask: EmbeddingAsk, vectors: list[np.ndarray]) -> bytes:
    """The body of the answer.

    Raises:
        ApiError: a vector is not finite, which JSON cannot say.
    """
    kept = [shortened(vector, ask.n_dimensions) for vector in vectors]
    if not all(np.isfinite(vector).all() for vector in kept):
        raise internal("the model produced an embedding that is not finite")
    n_tokens = sum(map(len, ask.prompts))
    data = [
        {"object": "embedding", "index": i, "embedding": spelled(v) if ask.is_base64 else v}
        for i, v in enumerate(kept)
    ]
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    body = {"object": "list", "data": data, "model": ask.model, "usage": usage}
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def shortened(vector: np.ndarray, n_dimensions: int) -> np.ndarray:
    """The first numbers, of length 1 again, in float32."""
    if n_dimensions == len(vector):
        return np.ascontiguousarray(vector, np.float32)
    return normalized(vector[:n_dimensions])


def spelled(vector: np.ndarray) -> str:
    """Base64 of little-endian float32, as OpenAI's client reads it."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
