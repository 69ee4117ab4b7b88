"""Every end of a request is told by kind, and its tokens are counted however they come."""

import asyncio

import pytest

from benchmarks.load.client import Events, Record, read_answer, take
from benchmarks.load.stub import Stub
from tests.load.running import ask, asker

EVENT = b'data: {"choices":[{"text":"a","finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1}}\n\n'


def read(sent: bytes) -> Record:
    """What is made of these bytes and the connection's end."""

    async def run() -> Record:
        reader, record = asyncio.StreamReader(), Record(3)
        reader.feed_data(sent)
        reader.feed_eof()
        await read_answer(reader, record)
        return record

    return asyncio.run(run())


@pytest.mark.parametrize("per_event", [1, 4])
@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_tokens_are_counted_by_their_ids(backend, per_event):
    record = ask(Stub(per_event=per_event), backend=backend)
    assert not record.error
    assert record.counts == ([1] * 6 if per_event == 1 else [4, 2])
    assert record.is_counted
    assert (record.n_prompt, record.n_output) == (3, 6)
    assert record.sent < record.times[0] <= record.times[-1] <= record.end


def test_without_ids_usage_tells_whether_events_are_tokens():
    assert ask(Stub(), asks_ids=False).is_counted
    several = ask(Stub(per_event=4), asks_ids=False)
    assert (several.counts, several.n_output, several.is_counted) == ([1, 1], 6, False)


def test_without_ids_and_usage_nothing_is_known():
    record = read(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + EVENT)
    assert not record.error
    assert not record.is_counted


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("429", "status 429"),
        ("500", "status 500"),
        ("cut", "cut"),
        ("error", "error event"),
        ("nonsense", "not understood"),
        ("silent", "no end after 0.2 s"),
    ],
)
def test_a_failure_is_told_by_kind(fault, error):
    assert ask(Stub(faults={0: fault}), timeout=0.2).error == error


def test_a_server_that_does_not_listen_is_no_connection():
    async def run() -> Record:
        async with Stub().listening() as port:
            pass
        return await asker(port).ask(b"{}", Record(3))

    assert asyncio.run(run()).error == "no connection"


def test_an_answer_of_no_token_is_a_failure():
    assert ask(Stub(), n_output=0).error == "no token"


@pytest.mark.parametrize(
    "body",
    [
        b"transfer-encoding: chunked\r\n\r\n%x;name=value\r\n%b\r\n0\r\ntrailer: x\r\n\r\n"
        % (len(EVENT), EVENT),
        b"Transfer-Encoding: Chunked\r\n\r\n%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n"
        % (10, EVENT[:10], len(EVENT) - 10, EVENT[10:]),
        b"content-length: %d\r\n\r\n%b" % (len(EVENT), EVENT),
        b"connection: close\r\n\r\n" + EVENT,
    ],
)
def test_every_framing_of_a_body_is_read(body):
    record = read(b"HTTP/1.1 200 OK\r\n" + body)
    assert (record.error, record.text, record.n_output) == ("", "a", 1)


def test_a_stream_without_an_end_is_cut():
    event = EVENT.replace(b'"stop"', b"null")
    record = read(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + event)
    assert record.error == "cut"


def test_events_are_whole_however_they_are_cut():
    stream = b": a comment\n\n" + EVENT.replace(b"\n", b"\r\n") + b"event: x\ndata:[DONE]\n\n"
    for size in (1, 7, 1000):
        events = Events()
        pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
        found = [data for piece in pieces for data in events.feed(piece)]
        assert found == [EVENT[6:-2], b"[DONE]"]


def test_a_role_is_no_token_and_a_thought_is_one():
    record = Record(3)
    for delta in ({"role": "assistant", "content": ""}, {"reasoning_content": "hm"}):
        take({"choices": [{"delta": delta}]}, 1.0, record)
    assert (record.counts, record.text) == ([1], "hm")


def test_usage_counts_and_tells_what_was_cached():
    record = Record(99)
    details = {"cached_tokens": 5}
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": details}
    take({"choices": [], "usage": usage}, 1.0, record)
    assert (record.n_prompt, record.n_output, record.n_cached) == (7, 2, 5)


def test_an_id_of_no_text_counts():
    record = Record(3)
    take({"choices": [{"text": "", "token_ids": [5]}]}, 1.0, record)
    take({"choices": [{"text": "é", "token_ids": [6, 7]}]}, 2.0, record)
    assert (record.counts, record.times, record.token_ids) == ([1, 2], [1.0, 2.0], [5, 6, 7])
