"""OpenAI's response objects as bytes. Streamed chunks are joined from encoded pieces."""

import time
import uuid
from collections.abc import Iterator
from typing import Any

import orjson
from starlette.types import Send

from fastgen_jax.engine.types import TokenLogprobs
from fastgen_jax.server.errors import ApiError
from fastgen_jax.server.generation import Choice, Generation
from fastgen_jax.tokenizer import Tokenizer

LOGPROB_FLOOR = -9999.0  # JSON has no infinity
PIECE_ENTRIES = 2000  # logprobs whose events are built in one go
PIECE_TOKENS = 100  # of them in one event
DONE = b"data: [DONE]\n\n"


# What OpenAI's first API said of each model, and some clients still look for.
PERMISSION = {
    "object": "model_permission", "organization": "*", "group": None, "is_blocking": False,
    "allow_create_engine": False, "allow_sampling": True, "allow_logprobs": True,
    "allow_search_indices": False, "allow_view": True, "allow_fine_tuning": False,
}  # fmt: skip


class ResponseFormat:
    """How one request's choices become bytes; holds what every chunk of one response shares."""

    def __init__(
        self,
        *,
        is_chat: bool,
        model: str,
        tokenizer: Tokenizer,
        include_usage: bool = False,
        continuous_usage: bool = False,
        logprobs: int | None = None,
        tokens_as_ids: bool = False,
        return_token_ids: bool = False,
        echo: list[str] | None = None,
    ):
        self.is_chat = is_chat
        self.tokenizer = tokenizer
        self.include_usage = include_usage
        self.continuous_usage = continuous_usage
        self.logprobs = logprobs
        self.tokens_as_ids = tokens_as_ids
        self.return_token_ids = return_token_ids
        self.echo = echo
        self._started: set[int] = set()  # choices whose first chunk is out
        self._ended: set[int] = set()  # choices whose finish_reason is out
        self._offsets: dict[int, int] = {}  # where each choice's next token starts in its text
        prefix, name = ("chatcmpl-", "chat.completion") if is_chat else ("cmpl-", "text_completion")
        self._fields = {
            "id": prefix + uuid.uuid4().hex,
            "object": name,
            "created": int(time.time()),
            "model": model,
        }
        chunk_fields = self._fields | ({"object": name + ".chunk"} if is_chat else {})
        self._head = b"data: " + orjson.dumps(chunk_fields)[:-1] + b',"choices":['

    def chunks(self, generation: Generation) -> Iterator[bytes]:
        """Events for all that is new, joined into pieces that take a few milliseconds to build: the
        backlog of a slow reader can be long.
        """
        usage = b""
        if self.continuous_usage:
            usage = b',"usage":' + orjson.dumps(usage_of(generation))
        elif self.include_usage:
            usage = b',"usage":null'
        events: list[bytes] = []
        n_left = PIECE_ENTRIES
        for choice in generation.choices:
            while choice.has_pending or self._owes_end(choice):
                n_left -= len(choice.pending_logprobs[:PIECE_TOKENS]) * (1 + (self.logprobs or 0))
                events.append(self._chunk(choice, generation, usage))
                if n_left <= 0:
                    yield b"".join(events)
                    events, n_left = [], PIECE_ENTRIES
        if any(events):
            yield b"".join(events)

    def usage_chunk(self, generation: Generation) -> bytes:
        return self._head + b'],"usage":' + orjson.dumps(usage_of(generation)) + b"}\n\n"

    def result(self, generation: Generation) -> bytes:
        """The body of a response that does not stream. It may be built beside the event loop, and
        is, choice by choice, so that other threads run in between.
        """
        choices = [orjson.dumps(self._final(c, generation)) for c in generation.choices]
        head, usage = orjson.dumps(self._fields)[:-1], orjson.dumps(usage_of(generation))
        return b"".join((head, b',"choices":[', b",".join(choices), b'],"usage":', usage, b"}"))

    def n_entries(self, generation: Generation) -> int:
        """What the cost of `result` grows with: tokens, their rivals, and what repeats prompts."""
        n_tokens = generation.n_tokens * ((self.logprobs or 0) + 1)
        repeated = sum(map(len, self.echo or ()))
        if self.return_token_ids:
            repeated += generation.n_prompt_tokens
        return n_tokens + repeated * (len(generation.choices) // len(generation.prompts))

    def _owes_end(self, choice: Choice) -> bool:
        return choice.finish_reason is not None and choice.index not in self._ended

    def _chunk(self, choice: Choice, generation: Generation, usage: bytes) -> bytes:
        is_first = choice.index not in self._started
        text, ids, entries = choice.take(PIECE_TOKENS if choice.wants_logprobs else None)
        if is_first:
            self._started.add(choice.index)
            text = self._echoed(choice, generation) + text
        finish_reason = None if choice.has_pending else choice.finish_reason
        if finish_reason is not None:
            self._ended.add(choice.index)
        elif not (text or entries or (is_first and self.is_chat) or self.return_token_ids):
            return b""  # a piece of a character, or what may become a stop string
        content = orjson.dumps(text)
        if self.is_chat:
            role = b'"role":"assistant",' if is_first else b""
            delta = b'"delta":{' + role + b'"content":' + content + b"}"
        else:
            delta = b'"text":' + content
        logprobs = self._logprobs(choice, ids, entries)
        extra = b""
        if self.return_token_ids:
            extra = b',"token_ids":' + orjson.dumps(ids)
        return b"".join((
            self._head, b'{"index":%d,' % choice.index, delta,
            b',"logprobs":', b"null" if logprobs is None else orjson.dumps(logprobs),
            b',"finish_reason":', orjson.dumps(finish_reason),
            b',"stop_reason":', orjson.dumps(finish_reason and choice.stop_reason),
            extra, b"}]", usage, b"}\n\n",
        ))  # fmt: skip

    def _final(self, choice: Choice, generation: Generation) -> dict[str, Any]:
        text, ids, entries = choice.take()
        fields: dict[str, Any] = {"index": choice.index}
        if self.is_chat:
            fields["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            fields["text"] = self._echoed(choice, generation) + text
        fields["logprobs"] = self._logprobs(choice, ids, entries)
        fields["finish_reason"] = choice.finish_reason
        fields["stop_reason"] = choice.stop_reason
        if self.return_token_ids:
            fields["token_ids"] = ids
            fields["prompt_token_ids"] = generation.prompts[_prompt_of(choice, generation)]
        return fields

    def _echoed(self, choice: Choice, generation: Generation) -> str:
        return self.echo[_prompt_of(choice, generation)] if self.echo else ""

    def _logprobs(self, choice: Choice, ids: list[int], entries: list[TokenLogprobs]) -> Any:
        if self.logprobs is None:
            return None
        if self.is_chat:
            content = [self._chat_entry(*pair) for pair in zip(ids, entries, strict=False)]
            return {"content": content, "refusal": None}
        return self._completion_logprobs(choice, ids, entries)

    def _chat_entry(self, token_id: int, entry: TokenLogprobs) -> dict[str, Any]:
        top = [self._token(id, logprob) for id, logprob in entry.top[: self.logprobs]]
        return self._token(token_id, entry.logprob) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._text(token_id),
            "logprob": max(logprob, LOGPROB_FLOOR),
            "bytes": list(self.tokenizer.token_bytes(token_id)),
        }

    def _completion_logprobs(
        self, choice: Choice, ids: list[int], entries: list[TokenLogprobs]
    ) -> dict[str, Any]:
        result: dict[str, list] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
        }  # fmt: skip
        offset = self._offsets.get(choice.index, 0)
        for token_id, entry in zip(ids, entries, strict=False):
            text, logprob = self._text(token_id), max(entry.logprob, LOGPROB_FLOOR)
            top: dict[str, float] = {}
            for id, value in entry.top[: self.logprobs]:
                top.setdefault(self._text(id), max(value, LOGPROB_FLOOR))
            top[text] = logprob  # lm-eval compares this entry with the token's own
            result["tokens"].append(text)
            result["token_logprobs"].append(logprob)
            result["top_logprobs"].append(top)
            result["text_offset"].append(offset)
            offset += len(text)
        self._offsets[choice.index] = offset
        return result

    def _text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.tokens_as_ids else self.tokenizer.token_text(token_id)


def event(body: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + body + b"\n\n"


async def send_error(error: ApiError, send: Send, *, more_body: bool = False):
    """A response that is the error object; `more_body` leaves its end to the caller."""
    body = error.body()
    fields = {"content-type": "application/json", "content-length": str(len(body))} | error.headers
    headers = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": more_body})


def usage_of(generation: Generation) -> dict[str, Any]:
    prompt, completion = generation.n_prompt_tokens, generation.n_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": generation.n_reused_tokens},
    }


def model_object(name: str, created: int, max_model_len: int | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "fastgen_jax",
        "root": name,
        "parent": None,
        "max_model_len": max_model_len,
        "permission": [PERMISSION | {"id": f"modelperm-{name}", "created": created}],
    }


def _prompt_of(choice: Choice, generation: Generation) -> int:
    return choice.index // (len(generation.choices) // len(generation.prompts))
