"""Answers to POST /v1/chat/completions."""

from typing import Any

import orjson

from fastgen_jax.engine.types import TokenLogprobs
from fastgen_jax.server.formats.choices import LOGPROB_FLOOR, ChoicesFormat
from fastgen_jax.server.generation import Choice, Generation


class ChatFormat(ChoicesFormat):
    def __init__(self, **shared: Any):
        super().__init__(
            id_prefix="chatcmpl-", object="chat.completion", chunk_object="chat.completion.chunk",
            no_delta=b'"delta":{"content":""}', **shared,
        )  # fmt: skip

    def _delta(self, choice: Choice, generation: Generation, text: str, is_first: bool) -> bytes:
        role = b'"role":"assistant",' if is_first else b""
        return b'"delta":{' + role + b'"content":' + orjson.dumps(text) + b"}"

    def _content(self, choice: Choice, generation: Generation, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprob_entries(
        self, choice: Choice, pairs: list[tuple[int, TokenLogprobs]]
    ) -> dict[str, Any]:
        content = [
            self._token(id, entry.logprob)
            | {"top_logprobs": [self._token(*pair) for pair in entry.top[: self.logprobs]]}
            for id, entry in pairs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._token_text(token_id),
            "logprob": max(logprob, LOGPROB_FLOOR),
            "bytes": list(self.tokenizer.token_bytes(token_id)),
        }
