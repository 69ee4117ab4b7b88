"""The body of POST /v1/responses, and the chat that it amounts to.

Its items become messages, its tools and forms those of a chat; all further checks are the chat's.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict

from fastgen_jax.sampling_params import SamplingParams
from fastgen_jax.server import structure
from fastgen_jax.server.errors import ApiError, invalid, unsupported
from fastgen_jax.server.protocol import (
    SAMPLING_FIELDS,
    ChatRequest,
    Integer,
    check_extras,
    validated,
)

MAX_METADATA = 16  # entries, as at OpenAI
MAX_METADATA_LENGTH = 512  # characters of a value
ROLES = ("user", "assistant", "system", "developer")
TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
# Of vLLM's extras, those that mean the same here.
PASSED = (*SAMPLING_FIELDS[1:], "stop", "stop_token_ids", "logit_bias", "cache_salt", "priority")
PASSED += ("allowed_token_ids", "bad_words")
PASSED += ("truncate_prompt_tokens", "chat_template_kwargs", *structure.FIELDS[1:])
UNSUPPORTED = {"background": (None, False), "conversation": (None,), "prompt": (None,)}
LOGPROBS = "message.output_text.logprobs"
# Fields of the chat, as they are called here.
NAMES = {
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text",
    "reasoning_effort": "reasoning",
}


class ResponsesRequest(BaseModel):
    """Body of POST /v1/responses. null means: not given."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    input: Any = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    include: list[str] | None = None
    truncation: str | None = None
    stream_options: dict[str, Any] | None = None

    @property
    def is_kept(self) -> bool:
        return self.store is not False

    def check_supported(self):
        """Raises ApiError for what no chat has a field for."""
        if self.truncation not in (None, "auto", "disabled"):
            raise invalid("truncation must be auto or disabled", "truncation")
        for key, value in (self.metadata or {}).items():
            if max(len(key), len(value)) > MAX_METADATA_LENGTH:
                raise invalid(
                    f"metadata: {key!r:.80} has more than {MAX_METADATA_LENGTH} characters",
                    "metadata",
                )
        if len(self.metadata or ()) > MAX_METADATA:
            raise invalid(f"metadata has more than {MAX_METADATA} entries", "metadata")
        if LOGPROBS in (self.include or ()):  # the others ask for what no answer here has
            raise unsupported("include", f"leave {LOGPROBS} out; chat completions have logprobs")
        extras = {k: v for k, v in (self.model_extra or {}).items() if k not in PASSED}
        for name, nothing in UNSUPPORTED.items():
            if extras.pop(name, None) not in nothing:
                raise unsupported(name)
        check_extras(extras)

    def messages(self) -> list[dict[str, Any]]:
        """The input as messages of a chat.

        Raises:
            ApiError: an item is not one of a conversation in text.
        """
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        if not isinstance(self.input, list) or not self.input:
            raise invalid("input must be a string or a list with at least one item", "input")
        messages: list[dict[str, Any]] = []
        for i, item in enumerate(self.input):
            _add(item, f"input[{i}]", messages)
        if not messages:
            raise invalid("input has no message", "input")
        return messages

    def to_chat(self, messages: list[dict[str, Any]]) -> ChatRequest:
        """The chat that says the same. Instructions hold for this response alone."""
        if self.instructions is not None:
            messages = [{"role": "system", "content": self.instructions}, *messages]
        extras = {name: value for name, value in (self.model_extra or {}).items() if name in PASSED}
        effort = (self.reasoning or {}).get("effort")
        return validated(ChatRequest, extras | {
            "model": self.model,
            "messages": messages,
            "stream": self.stream,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": [_nested(tool) for tool in self.tools or ()],
            "tool_choice": _choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": _format((self.text or {}).get("format")),
            "reasoning_effort": effort,
        })  # fmt: skip

    def echoed(self, params: SamplingParams) -> dict[str, Any]:
        """What a response repeats of its request."""
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "reasoning": self.reasoning or {},
            "store": self.is_kept,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}} | (self.text or {}),
            "tool_choice": "auto" if self.tool_choice is None else self.tool_choice,
            "tools": self.tools or [],
            "top_p": params.top_p,
            "truncation": self.truncation or "disabled",
        }


@contextlib.contextmanager
def named_as_in_responses() -> Iterator[None]:
    """Has refusals of a chat name the fields of the response that it stands for."""
    try:
        yield
    except ApiError as error:
        for name, own in NAMES.items():
            if error.param == name:
                error.param = own
                error.message = error.message.replace(name, own)
        raise


def _add(item: Any, where: str, messages: list[dict[str, Any]]):
    """Adds an item to the conversation. Calls belong to what the assistant said before them."""
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if kind == "message":
        role = item.get("role")
        if role not in ROLES:
            raise invalid(f"{where}.role must be one of {', '.join(ROLES)}", "input")
        messages.append({"role": role, "content": _content(item.get("content"), where)})
    elif kind == "function_call":
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        call = _call(item, where)
        calls = [*messages[-1].get("tool_calls", ()), call]
        messages[-1] = messages[-1] | {"tool_calls": calls}  # a kept conversation may share it
    elif kind == "function_call_output":
        text = _content(item.get("output"), f"{where}.output")
        id = _text(item, "call_id", where)
        messages.append({"role": "tool", "tool_call_id": id, "content": text})
    elif kind != "reasoning":  # which templates want without, or only of the newest turn
        raise invalid(
            f"{where}.type must be message, function_call, function_call_output or reasoning, "
            f"got {kind!r:.80}",
            "input",
        )


def _call(item: dict[str, Any], where: str) -> dict[str, Any]:
    function = {"name": _text(item, "name", where), "arguments": _text(item, "arguments", where)}
    return {"id": _text(item, "call_id", where), "type": "function", "function": function}


def _text(item: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(item.get(key), str):
        raise invalid(f"{where}.{key} must be a string", "input")
    return item[key]


def _content(content: Any, where: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"{where} must be text or a list of text parts", "input")
    return [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]


def _part(part: Any, where: str) -> dict[str, Any]:
    key = TEXT_PARTS.get(str(part.get("type"))) if isinstance(part, dict) else None
    if key is None or not isinstance(part.get(key), str):
        raise invalid(f"{where} may only be text, such as an input_text", "input")
    return {"type": "text", "text": part[key]}


def _nested(tool: Any) -> Any:
    """A tool as chats have it."""
    if not isinstance(tool, dict) or tool.get("type") != "function" or "function" in tool:
        return tool
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}


def _choice(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        tools = [_choice(tool) for tool in choice["tools"]]
        return {"type": "allowed_tools", "allowed_tools": {**choice, "tools": tools}}
    return _nested(choice)


def _format(format: Any) -> Any:
    """text.format as the response_format of chats."""
    if isinstance(format, dict) and format.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": format}
    return format
