"""Answers to POST /v1/completions."""

from typing import Any

import orjson

from fastgen_jax.engine.types import Output, TokenLogprobs
from fastgen_jax.sampling_params import SamplingParams
from fastgen_jax.server.formats.choices import LOGPROB_FLOOR, ChoicesFormat
from fastgen_jax.server.generation import Choice, Generation, Scored, Taken
from fastgen_jax.tokenizer import TextStream


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
        self._texts: dict[int, TextStream] = {}  # by choice: what its tokens say so far
        self._offsets: dict[int, int] = {}  # how long that is

    def _deltas(
        self, choice: Choice, generation: Generation, taken: Taken, is_first: bool
    ) -> list[bytes]:
        text = self._echoed(choice, generation, is_first) + taken.text
        return [b'"text":' + orjson.dumps(text)] if text else []

    def _content(self, choice: Choice, generation: Generation, taken: Taken) -> dict[str, Any]:
        content: dict[str, Any] = {"text": self._echoed(choice, generation, True) + taken.text}
        if self.prompt_logprobs is not None:
            scores = self._scores_of(generation, generation.prompt_of(choice))
            content["prompt_logprobs"] = orjson.Fragment(scores)
        return content

    def _finish_reason(self, choice: Choice) -> str | None:
        return choice.finish_reason

    def _echoed(self, choice: Choice, generation: Generation, is_first: bool) -> str:
        return self.echo[generation.prompt_of(choice)] if self.echo and is_first else ""

    def _logprob_columns(
        self, choice: Choice, generation: Generation, logprobs: list[Scored]
    ) -> dict[str, list]:
        result: dict[str, list] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
        }  # fmt: skip
        for token_id, entry in logprobs:
            result["tokens"].append(self._token_text(token_id))
            result["token_logprobs"].append(entry and max(entry.logprob, LOGPROB_FLOOR))
            result["top_logprobs"].append(entry and self._top(token_id, entry))
            result["text_offset"].append(self._offset(choice, generation, token_id))
        return result

    def _top(self, token_id: int, entry: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens and the token itself, which lm-eval compares with its own entry."""
        told = dict(entry.top[: self.logprobs]) | {token_id: entry.logprob}
        top: dict[str, float] = {}
        for id, logprob in told.items():
            text = self._token_text(id)  # parts of characters may look the same
            top[f"token_id:{id}" if text in top else text] = max(logprob, LOGPROB_FLOOR)
        return top

    def _offset(self, choice: Choice, generation: Generation, token_id: int) -> int:
        """Where the choice's next token begins in its text."""
        stream = self._texts.get(choice.index)
        if stream is None:
            before = [] if self.echo else generation.prompts[generation.prompt_of(choice)]
            params = SamplingParams(skip_special_tokens=self.skip_special_tokens)
            stream = self._texts[choice.index] = TextStream(self.tokenizer, before, params)
        offset = self._offsets.get(choice.index, 0)
        self._offsets[choice.index] = offset + len(stream.push(Output(0, 0, token_id)).text)
        return offset
