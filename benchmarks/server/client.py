"""A cheap HTTP client that says how each request ended. It shares two cores with what it measures,
so it looks at bytes and parses JSON only where an answer is known beforehand.

INVARIANT: every call ends in exactly one Outcome, by its deadline at the latest.
"""

import asyncio
import contextlib
import hashlib
import json
import socket
import time
from typing import Any, NamedTuple

from benchmarks.wire import Address, close, post, read_body, read_head, reset

# How a request may end. The last four break the server's promise.
ANSWER, REFUSED, FAILED, CANCELLED, CUT = "answer", "refused", "failed", "cancelled", "cut unread"
LOST, HUNG, STRANGE, WRONG = "lost", "hung", "strange", "wrong answer"
BROKEN = (LOST, HUNG, STRANGE, WRONG)

DONE, ERROR = b"data: [DONE]\n\n", b'data: {"error"'
SMALL_BUFFER = 4096  # bytes that a slow reader's socket takes
STALL = 6.0  # seconds that one who stalls reads nothing; longer than the server's patience


class Call(NamedTuple):
    """One request: what is sent, what may come back, and how this client behaves."""

    path: str
    body: bytes
    statuses: frozenset[int]  # beside which any other is strange
    is_stream: bool = False
    behaviour: str = "reads"  # or is "slow", "stalls", "closes", "resets"
    patience: float = 0.0  # seconds until one who closes or resets does
    known: str = ""  # name of the prompt, if its answer is known
    header: str = "application/json"


class Outcome(NamedTuple):
    kind: str
    status: int = 0
    digest: str = ""  # of the text, if the answer is known
    seconds: float = 0.0
    note: str = ""


async def perform(address: Address, call: Call, deadline: float) -> Outcome:
    """One call on a connection of its own.

    Args:
        deadline: seconds from now after which the call counts as hung.
    """
    started = time.monotonic()
    try:
        async with asyncio.timeout(deadline):
            outcome = await _perform(address, call)
    except TimeoutError:
        outcome = Outcome(HUNG, note=f"no end after {deadline:g} s")
    return outcome._replace(seconds=time.monotonic() - started)


async def _perform(address: Address, call: Call) -> Outcome:
    try:
        reader, writer = await connect(address, is_small=call.behaviour in ("slow", "stalls"))
    except OSError as error:
        return Outcome(LOST, note=f"connecting: {error}")
    try:
        writer.write(post(call.path, call.body, call.header))
        if call.behaviour in ("closes", "resets"):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(call.patience):
                    return await read_answer(reader, call)
            return Outcome(CANCELLED)
        return await read_answer(reader, call)
    finally:
        if call.behaviour == "resets":
            reset(writer)
        await close(writer)


async def connect(
    address: Address, *, is_small: bool = False
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if not is_small:
        return await asyncio.open_connection(*address)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, address)
    return await asyncio.open_connection(sock=connection, limit=SMALL_BUFFER)


async def read_answer(reader: asyncio.StreamReader, call: Call) -> Outcome:
    """Reads one response to its end and judges it."""
    pieces: list[bytes] = []
    status = 0
    try:
        status, headers = await read_head(reader)
        if call.behaviour == "stalls" and status == 200:
            await asyncio.sleep(STALL)
        async for piece in read_body(reader, headers):
            pieces.append(piece)
            if call.behaviour == "slow":
                await asyncio.sleep(0.01)
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        return _judge_cut(b"".join(pieces), status, call, error)
    except (ValueError, LookupError, asyncio.LimitOverrunError) as error:
        return Outcome(STRANGE, status, note=f"no HTTP: {error}")
    return _judge(b"".join(pieces), status, call)


def _judge(body: bytes, status: int, call: Call) -> Outcome:
    """What a complete response is."""
    if status not in call.statuses:
        return Outcome(STRANGE, status, note=f"{call.path} {body[:150]!r}")
    if status != 200:
        is_error = body.startswith(b'{"error":{')
        kind = (FAILED if status >= 500 else REFUSED) if is_error else STRANGE
        return Outcome(kind, status, note=f"{body[:150]!r}")
    if call.is_stream and (body.count(DONE) != 1 or not body.endswith(DONE) or ERROR in body):
        return Outcome(STRANGE, status, note=f"a stream that ends in {body[-150:]!r}")
    return Outcome(ANSWER, status, digest(body, call.is_stream) if call.known else "")


def _judge_cut(body: bytes, status: int, call: Call, error: Exception) -> Outcome:
    """What a response without an end is: good only as a stream that says so, or if unread."""
    last = body.rpartition(b"\n\n")[0].rpartition(b"\n\n")[2]
    if call.is_stream and last.startswith(ERROR) and DONE not in body and 500 in call.statuses:
        return Outcome(FAILED, status, note=f"{last[:150]!r}")
    if call.behaviour == "stalls" and status == 200:
        return Outcome(CUT, status)
    return Outcome(LOST, status, note=f"{call.path} {type(error).__name__} after {body[-100:]!r}")


def digest(body: bytes, is_stream: bool) -> str:
    """A hash of each sample's text and reason to end."""
    lines = body.split(b"\n\n") if is_stream else [b"data: " + body]
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for line in lines:
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:])["choices"]:
                texts[choice["index"]] = texts.get(choice["index"], "") + _text(choice)
                reasons[choice["index"]] = choice["finish_reason"] or ""
    shown = sorted((index, text, reasons[index]) for index, text in texts.items())
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def _text(choice: dict[str, Any]) -> str:
    if "text" in choice:
        return choice["text"]
    return choice.get("delta", choice.get("message", {})).get("content") or ""
