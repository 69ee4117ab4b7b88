"""Answers to POST /v1/chat/completions."""

import uuid
from typing import Any

import orjson

from fastgen_jax.dialects import CallPart, CallStart, Event, Text, Thought
from fastgen_jax.server.formats.choices import LOGPROB_FLOOR, ChoicesFormat
from fastgen_jax.server.generation import Choice, Generation, Scored, Taken


class ChatFormat(ChoicesFormat):
    """Args:
    is_named: the request names the tool that is called.
    """

    def __init__(self, *, is_named: bool = False, **shared: Any):
        super().__init__(
            id_prefix="chatcmpl-", object="chat.completion", chunk_object="chat.completion.chunk",
            no_delta=b'"delta":{}', logprobs_end=b',"refusal":null}', **shared,
        )  # fmt: skip
        self.is_named = is_named

    def _deltas(
        self, choice: Choice, generation: Generation, taken: Taken, is_first: bool
    ) -> list[bytes]:
        deltas = [_delta_of(event) for event in taken.events]
        if is_first:  # with the first token, though that may have nothing to say yet
            deltas = deltas or [{"content": ""}]
            deltas[0] = {"role": "assistant"} | deltas[0]
        return [b'"delta":' + orjson.dumps(delta) for delta in deltas]

    def _content(self, choice: Choice, generation: Generation, taken: Taken) -> dict[str, Any]:
        thought = "".join(event.text for event in taken.events if isinstance(event, Thought))
        calls = _calls_of(taken.events)
        text = taken.text if taken.text or not (calls or thought) else None
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if thought:
            message |= _reasoning(thought)
        if calls:
            message["tool_calls"] = calls
        return {"message": message}

    def _finish_reason(self, choice: Choice) -> str | None:
        """A call that the request names ends with "stop", as at OpenAI; vLLM found that out and
        does the same: https://github.com/vllm-project/vllm/pull/25054.
        """
        is_call = choice.n_calls and choice.finish_reason == "stop" and not self.is_named
        return "tool_calls" if is_call else choice.finish_reason

    def _logprob_columns(
        self, choice: Choice, generation: Generation, logprobs: list[Scored]
    ) -> dict[str, list]:
        content = [
            self._token(id, entry.logprob)
            | {"top_logprobs": [self._token(*pair) for pair in entry.top[: self.logprobs]]}
            for id, entry in logprobs
            if entry is not None
        ]
        return {"content": content}

    def _of_prompts(self, generation: Generation) -> bytes:
        if self.prompt_logprobs is None:
            return b""
        return b',"prompt_logprobs":' + self._scores_of(generation, 0)

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._token_text(token_id),
            "logprob": max(logprob, LOGPROB_FLOOR),
            "bytes": list(self.tokenizer.token_bytes(token_id)),
        }


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _delta_of(event: Event) -> dict[str, Any]:
    match event:
        case Text(text):
            return {"content": text}
        case Thought(text):
            return _reasoning(text)
        case CallStart(index, name):
            call = _call(name, "") | {"index": index}
        case CallPart(index, arguments):
            call = {"index": index, "function": {"arguments": arguments}}
    return {"tool_calls": [call]}


def _calls_of(events: list[Event]) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    for event in events:
        if isinstance(event, CallStart):
            calls.append(_call(event.name, ""))
        elif isinstance(event, CallPart):  # one a call: neighbours are joined
            calls[-1]["function"]["arguments"] += event.arguments
    return calls


def _call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": new_call_id(), "type": "function", "function": function}


def _reasoning(text: str) -> dict[str, str]:
    """Under the name that most clients read, and the newer one of vLLM."""
    return {"reasoning_content": text, "reasoning": text}
