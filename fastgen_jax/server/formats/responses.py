"""Answers to POST /v1/responses: items, and the events in which they grow."""

import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import orjson

from fastgen_jax.dialects import CallPart, CallStart, Event, Text, Thought
from fastgen_jax.server.errors import ApiError
from fastgen_jax.server.formats.chat import new_call_id
from fastgen_jax.server.formats.format import Format
from fastgen_jax.server.generation import Generation

Keep = Callable[[str, bytes, dict[str, Any]], None]
Fields = dict[str, Any]


class ResponsesFormat(Format):
    """One sample as a response.

    Args:
        echoed: what it repeats of its request.
        keep: is given the response's id, its body, and what it says as a message of a chat.
    """

    def __init__(self, echoed: Fields, *, model: str, keep: Keep | None):
        self._keep = keep
        self._fields: Fields = {
            "id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time()),
            "model": model, "background": False, "error": None, "incomplete_details": None,
            **echoed,
        }  # fmt: skip
        self._output = Output()
        self._n_events = 0

    def chunks(self, generation: Generation) -> Iterator[bytes]:
        events: list[Fields] = []
        if not self._n_events:
            begun = self._fields | {"status": "in_progress", "output": [], "usage": None}
            kinds = ("response.created", "response.in_progress")
            events += [{"type": kind, "response": begun} for kind in kinds]
        for event in generation.choices[0].take().events:
            events += self._output.feed(event)
        if events:
            yield self._encode(events)

    def end(self, generation: Generation) -> bytes:
        events = self._output.close(is_cut=_is_cut(generation), at_end=True)
        response = self._finished(generation)
        kind = f"response.{response['status']}"
        return self._encode([*events, {"type": kind, "response": response}])

    def error(self, error: ApiError) -> bytes:
        events = self._output.close(is_cut=True)
        failure = {"code": "server_error", "message": error.message}
        items = [item.shown() for item in self._output.items]
        response = self._fields | {"status": "failed", "output": items, "error": failure}
        failed = {"type": "response.failed", "response": response | {"usage": None}}
        return self._encode([*events, failed])

    def result(self, generation: Generation) -> bytes:
        for event in generation.choices[0].take().events:
            self._output.feed(event)
        self._output.close(is_cut=_is_cut(generation), at_end=True)
        return orjson.dumps(self._finished(generation))

    def n_entries(self, generation: Generation) -> int:
        return generation.n_tokens

    def _finished(self, generation: Generation) -> Fields:
        response = self._fields | {
            "status": "completed",
            "output": [item.shown() for item in self._output.items],
            "usage": _usage_of(generation),
        }
        if _is_cut(generation):
            reason = {"reason": "max_output_tokens"}
            response |= {"status": "incomplete", "incomplete_details": reason}
        if self._keep is not None:
            self._keep(response["id"], orjson.dumps(response), self._output.message())
        return response

    def _encode(self, events: list[Fields]) -> bytes:
        encoded = []
        for fields in events:
            body = orjson.dumps(fields | {"sequence_number": self._n_events})
            encoded.append(b"event: " + fields["type"].encode() + b"\ndata: " + body + b"\n\n")
            self._n_events += 1
        return b"".join(encoded)


class Item:
    """A message, a reasoning or a call that grows.

    Args:
        fields: what it is; its text is its content's one part, or its arguments.
        stem: what the names of the events begin with in which its text grows.
    """

    def __init__(self, fields: Fields, stem: str, part: Fields | None = None):
        self.fields = fields
        self.stem = stem
        self.part = part
        self.status = "in_progress"
        self.texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def shown(self) -> Fields:
        fields = self.fields | {"status": self.status}
        if self.part is None:
            return fields | {"arguments": self.text}
        return fields | {"content": [self.part | {"text": self.text}]}


class Output:
    """The items of a response, of which the last one grows; each change is told in events."""

    def __init__(self):
        self.items: list[Item] = []

    def feed(self, event: Event) -> list[Fields]:
        """The events of what an event of the reader adds."""
        events = [] if self._continues(event) else [*self.close(), *self._open(event)]
        if not isinstance(event, CallStart):
            self.items[-1].texts.append(event[-1])
            events.append(self._event(f"{self.items[-1].stem}.delta", delta=event[-1]))
        return events

    def close(self, *, is_cut: bool = False, at_end: bool = False) -> list[Fields]:
        """The events that end the last item. A response has one, though it may say nothing."""
        events = self._open(Text("")) if at_end and not self.items else []
        if not self.items:
            return events
        item = self.items[-1]
        item.status = "incomplete" if is_cut else "completed"
        if item.part is None:
            done = self._event(f"{item.stem}.done", arguments=item.text, name=item.fields["name"])
            events.append(done)
        else:
            part = item.part | {"text": item.text}
            events.append(self._event(f"{item.stem}.done", text=item.text))
            events.append(self._event("response.content_part.done", part=part))
        return [*events, self._whole("response.output_item.done")]

    def message(self) -> Fields:
        """What was said, as a message of a chat."""
        texts = dict.fromkeys(("message", "reasoning"), "")
        calls = []
        for item in self.items:
            if item.part is None:
                function = {"name": item.fields["name"], "arguments": item.text}
                id = item.fields["call_id"]
                calls.append({"id": id, "type": "function", "function": function})
            else:
                texts[item.fields["type"]] += item.text
        message: Fields = {"role": "assistant", "content": texts["message"] or None}
        if texts["reasoning"]:
            message["reasoning_content"] = texts["reasoning"]
        return message | ({"tool_calls": calls} if calls else {})

    def _continues(self, event: Event) -> bool:
        if isinstance(event, CallPart):  # it comes right after what it is a part of
            return True
        kinds = {Text: "message", Thought: "reasoning"}
        return bool(self.items) and self.items[-1].fields["type"] == kinds.get(type(event))

    def _open(self, event: Event) -> list[Fields]:
        self.items.append(_item_of(event))
        item = self.items[-1]
        if item.part is None:
            return [self._whole("response.output_item.added")]
        empty = item.fields | {"status": item.status, "content": []}
        added = {"type": "response.output_item.added", "item": empty, "output_index": self._index}
        return [added, self._event("response.content_part.added", part=item.part | {"text": ""})]

    @property
    def _index(self) -> int:
        return len(self.items) - 1

    def _whole(self, kind: str) -> Fields:
        return {"type": kind, "item": self.items[-1].shown(), "output_index": self._index}

    def _event(self, kind: str, **fields: Any) -> Fields:
        item = self.items[-1]
        event = {"type": kind, "item_id": item.fields["id"], "output_index": self._index, **fields}
        if item.part is not None:
            event["content_index"] = 0
        if kind.startswith("response.output_text"):
            event["logprobs"] = []
        return event


def _item_of(event: Event) -> Item:
    id = uuid.uuid4().hex
    match event:
        case Text():
            part = {"type": "output_text", "annotations": [], "logprobs": []}
            fields = {"id": f"msg_{id}", "type": "message", "role": "assistant"}
            return Item(fields, "response.output_text", part)
        case Thought():
            fields = {"id": f"rs_{id}", "type": "reasoning", "summary": []}
            return Item(fields, "response.reasoning_text", {"type": "reasoning_text"})
    fields = {"id": f"fc_{id}", "type": "function_call", "call_id": new_call_id()}
    name = event.name if isinstance(event, CallStart) else ""
    return Item(fields | {"name": name}, "response.function_call_arguments")


def _is_cut(generation: Generation) -> bool:
    return generation.choices[0].finish_reason == "length"


def _usage_of(generation: Generation) -> Fields:
    n_input, n_output = generation.n_prompt_tokens, generation.n_tokens
    cached = {"cached_tokens": generation.n_reused_tokens, "cache_write_tokens": 0}
    return {
        "input_tokens": n_input,
        "input_tokens_details": cached,
        "output_tokens": n_output,
        "output_tokens_details": {"reasoning_tokens": generation.n_thought_tokens},
        "total_tokens": n_input + n_output,
    }
