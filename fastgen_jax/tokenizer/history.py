"""Conversations as chat templates want them: checked, without null, calls in one of a few forms.

Clients send the arguments of earlier calls as the text of a JSON object. Most templates iterate
over the object or write it as JSON, some join the text to other text; some take only short ids.
Which form a template shows well, it shows itself: a made-up conversation is rendered in each. Where
it shows none, calls are part of the content, lest the model be told nothing of them.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fastgen_jax.errors import InvalidRequest

ROLE = re.compile(r"[A-Za-z0-9_-]{1,64}")
N_SHORT_ID = 9  # characters of a call's id, as Mistral's templates demand it
Message = dict[str, Any]


class Form(NamedTuple):
    """How a history's calls are given to a template. is_content: as text, which all templates show,
    written as Hermes does.
    """

    has_text_arguments: bool = False
    has_short_ids: bool = False
    is_content: bool = False


FORMS = (Form(), Form(True), Form(False, True), Form(True, True), Form(is_content=True))
KEY, NAME, VALUE, ID = "probe_key", "probe_name", "probe_value", "call_0123456789abcdef01234567"
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": NAME,
        "parameters": {
            "type": "object",
            "properties": {KEY: {"type": "string", "description": KEY}},
            "required": [KEY],
        },
    },
}
PROBE = [
    {"role": "user", "content": "?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": ID, "type": "function", "function": {"name": NAME, "arguments": {KEY: VALUE}}}
        ],
    },
    {"role": "tool", "tool_call_id": ID, "content": "!"},
]


class Control:
    """The control tokens of a vocabulary, which keys of what a client sends may not spell.

    transformers encodes as text what strings spell, and leaves keys as they are.
    """

    def __init__(self, tokens: Iterable[str]):
        self._tokens = tuple(tokens)

    def spelled_in_keys(self, value: Any) -> str | None:
        """A control token that is in a key, however deep."""
        keys = "\n".join({*_keys(value)})
        return next((token for token in self._tokens if token in keys), None)

    def check_keys(self, value: Any, param: str) -> None:
        if (token := self.spelled_in_keys(value)) is not None:
            raise InvalidRequest(
                f"a key in {param} spells the control token {token!r}; give it another name",
                param=param,
            )


def _keys(value: Any) -> Iterator[str]:
    unseen = [value]
    while unseen:
        value = unseen.pop()
        if isinstance(value, Mapping):
            yield from map(str, value)
            unseen += value.values()
        elif isinstance(value, list | tuple):
            unseen += value


def best_form(render: Callable[[list[Message], list[Message]], str | None]) -> Form:
    """The first form in which a template shows a call with its arguments as JSON, or else the first
    that it takes.

    Args:
        render: the text of messages with tools; None: the template refuses them.
    """
    shown = {form: render(shaped(PROBE, form, Control(())), [PROBE_TOOL]) for form in FORMS}
    well = [form for form, text in shown.items() if text is not None and _shows_call(text)]
    taken = [form for form, text in shown.items() if text is not None]
    return [*well, *taken, *FORMS][0]


def _shows_call(text: str) -> bool:
    """Whether the arguments are there, and neither as Python nor as JSON in JSON."""
    return VALUE in text and f"'{KEY}': '{VALUE}'" not in text and f'\\"{VALUE}' not in text


def has_calls(messages: Sequence[Message]) -> bool:
    return any("tool_calls" in message or "tool_call_id" in message for message in messages)


def shaped(messages: Sequence[Message], form: Form, control: Control) -> list[Message]:
    """The messages with their calls in this form."""
    return [_shaped(message, form, control) for message in messages]


def _shaped(message: Message, form: Form, control: Control) -> Message:
    if "tool_call_id" in message and form.has_short_ids:
        message = {**message, "tool_call_id": _short(message["tool_call_id"])}
    if "tool_calls" not in message:
        return message
    calls = [_shaped_call(call, form, control) for call in message["tool_calls"]]
    if not form.is_content:
        return {**message, "tool_calls": calls}
    others = {key: value for key, value in message.items() if key != "tool_calls"}
    written = [f"<tool_call>\n{_json(call['function'])}\n</tool_call>" for call in calls]
    return {**others, "content": "\n".join(filter(None, [message["content"], *written]))}


def _shaped_call(call: dict[str, Any], form: Form, control: Control) -> dict[str, Any]:
    function = call["function"]
    arguments = _object_of(function.get("arguments"))
    if control.spelled_in_keys(arguments):
        arguments = {"arguments": _json(arguments)}
    if form.has_text_arguments:
        own = function.get("arguments")
        arguments = own if isinstance(own, str) and own.strip() else _json(arguments)
    if form.has_short_ids and "id" in call:
        call = {**call, "id": _short(call["id"])}
    return {**call, "function": {**function, "arguments": arguments}}


def _object_of(arguments: Any) -> Mapping[str, Any]:
    """The arguments as an object: of a text that is none, one that holds it."""
    if isinstance(arguments, Mapping):
        return arguments
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    try:
        found = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"arguments": arguments}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _short(id: Any) -> Any:
    """An id of the length that Mistral's templates take; the same one for the same call."""
    if not isinstance(id, str) or (len(id) == N_SHORT_ID and id.isalnum()):
        return id
    return hashlib.sha256(id.encode(errors="replace")).hexdigest()[:N_SHORT_ID]


# --- checks


def plain_messages(messages: Sequence[Any]) -> list[Message]:
    """The messages without null keys, with the content of each as one string: not every template
    knows lists of parts.

    Raises:
        InvalidRequest: names the message and what was expected there.
    """
    return [_plain_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _plain_message(message: Any, where: str) -> Message:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or not ROLE.fullmatch(role):
        raise InvalidRequest(
            f"{where} needs a role such as 'user', got {_shown(role)}", param=where
        )
    message = _without_nulls(message)
    # Beside tool calls an assistant's content is null; templates that add it to strings need one.
    content = message.get("content", "" if role == "assistant" else None)
    if isinstance(content, list):
        content = "\n".join(_part_text(part, where) for part in content)
    if not isinstance(content, str):
        raise InvalidRequest(f"{where}.content must be text, got {_shown(content)}", param=where)
    calls = message.pop("tool_calls", [])
    if not isinstance(calls, list):
        raise InvalidRequest(f"{where}.tool_calls must be a list, got {_shown(calls)}", param=where)
    plain = [_plain_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return {**message, "content": content, **({"tool_calls": plain} if plain else {})}


def _part_text(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise InvalidRequest(
            f'{where}.content may hold only {{"type": "text", "text": ...}}, got {_shown(part)}',
            param=where,
        )
    return text


def _plain_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise InvalidRequest(
            f'{where} must be {{"type": "function", "function": {{"name": ..., "arguments": ...}}}}'
            f", got {_shown(call)}",
            param=where,
        )
    return {"type": "function", **_without_nulls(call), "function": _without_nulls(function)}


def plain_tools(tools: Sequence[Any]) -> list[Any]:
    """The tools with what templates take to be there: a description, an object of parameters."""
    return [_plain_tool(tool) for tool in tools]


def _plain_tool(tool: Any) -> Any:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict):
        return tool
    function = _without_nulls(function)
    function.setdefault("description", "")
    parameters = function.get("parameters")
    parameters = {**parameters} if isinstance(parameters, dict) else {}
    parameters.setdefault("type", "object")
    parameters.setdefault("properties", {})
    return {**_without_nulls(tool), "function": {**function, "parameters": parameters}}


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if item is not None}


def _shown(value: Any) -> str:
    """A value in an error message, at a cost that does not grow with it."""
    return f"{reprlib.repr(value):.80}"
