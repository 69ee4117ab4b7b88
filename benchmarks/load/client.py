"""One streamed request to an OpenAI-compatible server, and when its tokens came.

INVARIANT: every request ends in one Record, by its deadline at the latest; a record with an error
has no place in any mean. Times are seconds of one clock, from the moment the request was written to
a connection that was open by then.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from benchmarks.load.workloads import Prompt, Turn
from benchmarks.wire import Target, close, get, post, read_body, read_head

PATHS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
NO_CONNECTION, NOT_SENT, CUT = "no connection", "not sent", "cut"
DONE = b"[DONE]"


@dataclass(slots=True)
class Record:
    """What became of one request.

    Args:
        times: of the events that brought tokens; `counts` says how many each brought, as far as the
            server tells, else one.
        n_prompt, n_output: tokens as the server counts them; until it has, as they were asked for
            and as they came.
        error: kind of failure; none of an answer. `note` is what the server said.
    """

    n_prompt: int
    due: float = 0.0
    sent: float = 0.0
    end: float = 0.0
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    n_output: int = 0
    n_cached: int = 0
    error: str = ""
    note: str = ""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    tells_ids: bool = False
    tells_usage: bool = False

    @property
    def is_counted(self) -> bool:
        """Whether the tokens of each event are known."""
        return self.tells_ids or (self.tells_usage and sum(self.counts) == self.n_output)

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.sent

    @property
    def latency(self) -> float:
        """Seconds to the end."""
        return self.end - self.sent


class Asker(NamedTuple):
    """How requests are made of turns.

    Args:
        backend: of PATHS.
        fields: further fields of every body.
        asks_ids: whether events are to tell their tokens' ids, which say how many there are.
        timeout: seconds that a request may take.
    """

    target: Target
    backend: str
    model: str
    fields: Mapping[str, Any]
    headers: Mapping[str, str]
    asks_ids: bool = True
    timeout: float = 600.0

    def body(self, history: list[tuple[Prompt, Prompt]], turn: Turn) -> bytes:
        """Of a turn that continues what was asked and answered before."""
        body: dict[str, Any] = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.backend == "openai-chat":
            messages = []
            for asked, answered in history:
                messages.append({"role": "user", "content": asked})
                messages.append({"role": "assistant", "content": answered})
            body["messages"] = [*messages, {"role": "user", "content": turn.prompt}]
            body["max_completion_tokens"] = turn.n_output
        else:
            parts = [part for exchange in history for part in exchange] + [turn.prompt]
            body["prompt"] = joined(parts)
            body["max_tokens"] = turn.n_output
        if self.asks_ids:
            body["return_token_ids"] = True
        return orjson.dumps(body | dict(self.fields))

    async def ask(self, body: bytes, record: Record) -> Record:
        """Fills in the record; raises nothing."""
        try:
            async with asyncio.timeout(self.timeout):
                await self._ask(body, record)
        except TimeoutError:
            record.error = f"no end after {self.timeout:g} s"
        record.end = record.end or time.perf_counter()
        return record

    async def _ask(self, body: bytes, record: Record) -> None:
        try:
            reader, writer = await self.target.connect()
        except OSError as error:
            record.error, record.note = NO_CONNECTION, str(error)
            return
        path = self.target.path + PATHS[self.backend]
        headers = {"Connection": "close", "Accept": "text/event-stream", **self.headers}
        record.sent = time.perf_counter()
        try:
            writer.write(post(path, body, host=self.target.address[0], headers=headers))
            await read_answer(reader, record)
        except (asyncio.IncompleteReadError, OSError) as error:
            if not record.error:  # a server that has said so may cut the stream
                record.error, record.note = CUT, str(error)
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            asyncio.LimitOverrunError,
        ) as error:
            record.error, record.note = "not understood", f"{type(error).__name__}: {error}"
        finally:
            await close(writer)

    async def get_json(self, path: str) -> Any:
        """Raises OSError where nobody answers, ValueError for anything but JSON with status 200."""
        reader, writer = await self.target.connect()
        try:
            headers = {"Connection": "close", **self.headers}
            writer.write(get(self.target.path + path, self.target.address[0], headers))
            status, fields = await read_head(reader)
            body = b"".join([piece async for piece in read_body(reader, fields)])
        except asyncio.IncompleteReadError as error:
            raise OSError("the connection was cut") from error
        finally:
            await close(writer)
        if status != 200:
            raise ValueError(f"{path} answered {status}: {body[:200]!r}")
        return orjson.loads(body)


def joined(parts: list[Prompt]) -> Prompt:
    """Texts as one, or lists of ids as one."""
    if all(isinstance(part, str) for part in parts):
        return "".join(part for part in parts if isinstance(part, str))
    return [id for part in parts if isinstance(part, list) for id in part]


async def read_answer(reader: asyncio.StreamReader, record: Record) -> None:
    """Reads a response to its end."""
    status, headers = await read_head(reader)
    if status != 200:
        body = b"".join([piece async for piece in read_body(reader, headers)])
        record.error, record.note = f"status {status}", body[:300].decode(errors="replace")
        return
    events, is_over = Events(), False
    async for piece in read_body(reader, headers):
        now = time.perf_counter()
        for event in events.feed(piece):
            if event == DONE:
                is_over = True
            elif not record.error:
                is_over |= take(orjson.loads(event), now, record)
                record.end = now
    if not record.error and not is_over:
        record.error = CUT
    elif not record.error and not record.times:
        record.error = "no token"
    record.n_output = record.n_output or sum(record.counts)


class Events:
    """Server-sent events out of pieces of a stream; comments and fields but data are dropped."""

    def __init__(self):
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that the piece completes."""
        *whole, self._rest = (self._rest + piece).replace(b"\r", b"").split(b"\n\n")
        return [data for event in whole if (data := _data(event))]


def _data(event: bytes) -> bytes:
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)


def take(event: dict[str, Any], now: float, record: Record) -> bool:
    """Takes in one event; whether it ends the answer."""
    if "error" in event:
        record.error, record.note = "error event", str(event["error"])[:300]
        return True
    if usage := event.get("usage"):
        record.tells_usage = True
        record.n_prompt = usage["prompt_tokens"]
        record.n_output = usage["completion_tokens"]
        record.n_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    choices = event.get("choices")
    if not choices:
        return False
    choice = choices[0]
    text = text_of(choice)
    ids = choice.get("token_ids")
    if ids is not None:
        record.tells_ids = True
        record.token_ids += ids
    n = len(ids) if ids is not None else int(bool(text))
    if n:
        record.times.append(now)
        record.counts.append(n)
        record.text += text
    return choice.get("finish_reason") is not None


def text_of(choice: dict[str, Any]) -> str:
    """Whatever the model said: an answer, a thought or a part of a call. A role is no token."""
    delta = choice.get("delta")
    if delta is None:
        return choice.get("text") or ""
    said = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
    return said or str(delta.get("tool_calls") or "")
