"""What every form of an answer can do, and the pieces that all of them are made of."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from fastgen_jax.server.errors import ApiError
from fastgen_jax.server.generation import Generation

DONE = b"data: [DONE]\n\n"


class Format(ABC):
    """How one request's choices become bytes: one answer, or events of a stream."""

    @abstractmethod
    def chunks(self, generation: Generation) -> Iterator[bytes]:
        """Events for all that is new, joined into pieces that take a few milliseconds to build: the
        backlog of a slow reader can be long.
        """

    @abstractmethod
    def end(self, generation: Generation) -> bytes:
        """The events that close a stream, once every choice is finished and its chunks are out."""

    @abstractmethod
    def error(self, error: ApiError) -> bytes:
        """The event that ends a stream which has begun, and failed."""

    @abstractmethod
    def result(self, generation: Generation) -> bytes:
        """The body of a response that does not stream. It may be built beside the event loop."""

    @abstractmethod
    def n_entries(self, generation: Generation) -> int:
        """What the cost of `result` grows with: tokens, their rivals, and what repeats prompts."""


def event(body: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + body + b"\n\n"


def usage_of(generation: Generation) -> dict[str, Any]:
    prompt, completion = generation.n_prompt_tokens, generation.n_tokens
    usage: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": generation.n_reused_tokens},
    }
    if n_thought := generation.n_thought_tokens:
        usage["completion_tokens_details"] = {"reasoning_tokens": n_thought}
    return usage
