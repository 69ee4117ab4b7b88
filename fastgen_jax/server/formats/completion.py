"""Answers to POST /v1/completions."""

from typing import Any

import orjson

from fastgen_jax.engine.types import TokenLogprobs
from fastgen_jax.server.formats.choices import LOGPROB_FLOOR, ChoicesFormat
from fastgen_jax.server.formats.format import prompt_of
from fastgen_jax.server.generation import Choice, Generation, Taken


class CompletionFormat(ChoicesFormat):
    """Args:
    echo: the text of each prompt, where answers begin with it.
    """

    def __init__(self, *, echo: list[str] | None = None, **shared: Any):
        super().__init__(
            id_prefix="cmpl-", object="text_completion", chunk_object="text_completion",
            no_delta=b'"text":""', n_echoed=sum(map(len, echo or ())), **shared,
        )  # fmt: skip
        self.echo = echo
        self._offsets: dict[int, int] = {}  # where each choice's next token starts in its text

    def _deltas(
        self, choice: Choice, generation: Generation, taken: Taken, is_first: bool
    ) -> list[bytes]:
        text = self._echoed(choice, generation, is_first) + taken.text
        return [b'"text":' + orjson.dumps(text)] if text else []

    def _content(self, choice: Choice, generation: Generation, taken: Taken) -> dict[str, Any]:
        return {"text": self._echoed(choice, generation, True) + taken.text}

    def _finish_reason(self, choice: Choice) -> str | None:
        return choice.finish_reason

    def _echoed(self, choice: Choice, generation: Generation, is_first: bool) -> str:
        return self.echo[prompt_of(choice, generation)] if self.echo and is_first else ""

    def _logprob_entries(
        self, choice: Choice, pairs: list[tuple[int, TokenLogprobs]]
    ) -> dict[str, Any]:
        result: dict[str, list] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
        }  # fmt: skip
        offset = self._offsets.get(choice.index, 0)
        for token_id, entry in pairs:
            text, logprob = self._token_text(token_id), max(entry.logprob, LOGPROB_FLOOR)
            top: dict[str, float] = {}
            for id, value in entry.top[: self.logprobs]:
                top.setdefault(self._token_text(id), max(value, LOGPROB_FLOOR))
            top[text] = logprob  # lm-eval compares this entry with the token's own
            result["tokens"].append(text)
            result["token_logprobs"].append(logprob)
            result["top_logprobs"].append(top)
            result["text_offset"].append(offset)
            offset += len(text)
        self._offsets[choice.index] = offset
        return result
