"""The soak's checkers flag what they should, on made-up records and on bytes that are sent."""

import asyncio
import contextlib
import dataclasses
import random
from collections import Counter

import pytest

from benchmarks.server import load
from benchmarks.server.checks import EXPECTED, Record, broken_promises, growth, quantile, slope
from benchmarks.server.child import Footprint
from benchmarks.server.client import (
    ANSWER,
    CANCELLED,
    CUT,
    FAILED,
    HUNG,
    LOST,
    REFUSED,
    STRANGE,
    Call,
    Outcome,
    digest,
    perform,
)
from benchmarks.server.soak import missed_leaks

MIB = 2**20
DONE = b"data: [DONE]\n\n"
TOKEN = b'data: {"choices":[{"index":0,"text":"a","finish_reason":null}]}\n\n'
FAILURE = b'data: {"error":{"message":"the step failed"}}\n\n'


def memory(per_second: float, *, noise: float = 0.5 * MIB) -> list[tuple[float, float]]:
    """Two minutes of samples with an allocator's noise and one jump that comes back."""
    draw = random.Random(0)
    jump = [20 * MIB if 30 <= second < 36 else 0 for second in range(120)]
    return [
        (float(second), 400 * MIB + per_second * second + draw.uniform(0, noise) + jump[second])
        for second in range(120)
    ]


def good(**changes) -> Record:
    """The record of a soak that went well, but for the changes."""
    rest = Footprint(400 * MIB, 14, 26)
    record = Record(
        n_started=5,
        outcomes=[Outcome(kind) for kind in EXPECTED],
        n_checked=1,
        ordered=Counter(nan=3),
        happened=Counter(nan=3),
        livez=[0.01] * 100,
        memory=memory(0.0),
        n_measured=2000,
        rest_before=rest,
        rest_after=rest,
        gauges={"num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0},
        n_preemptions=5,
    )
    return dataclasses.replace(record, **changes)


def test_a_good_soak_breaks_no_promise():
    assert broken_promises(good()) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"n_started": 6}, "6 requests began and 5 ended"),
        ({"outcomes": [Outcome(ANSWER), Outcome(LOST, note="plain EOF")]}, "1 requests were lost"),
        ({"outcomes": [Outcome(ANSWER), Outcome(HUNG)]}, "1 requests were hung"),
        ({"outcomes": [Outcome(ANSWER), Outcome(STRANGE)]}, "1 requests were strange"),
        ({"outcomes": [Outcome(ANSWER)]}, "no request was cut unread"),
        ({"n_wrong": 1}, "1 of 1 known answers differ"),
        ({"n_checked": 0}, "no known answer was checked"),
        ({"happened": Counter(nan=2)}, "fault 'nan' was ordered 3 times, happened 2"),
        ({"happened": Counter()}, "1 requests failed, more than the 0 whose logits"),
        ({"happened": Counter(nan=3, fetch=2)}, "2 steps failed, /metrics counts 0"),
        ({"n_preemptions": 0}, "no sequence was preempted"),
        ({"gauges": {}}, "at rest num_requests_running is None"),
        ({"rest_after": Footprint(400 * MIB, 15, 26)}, "descriptors at rest went from 14 to 15"),
        ({"rest_after": Footprint(400 * MIB, 14, 27)}, "threads at rest went from 26 to 27"),
        ({"memory": memory(4096 * 2000 / 120)}, "memory grew by"),
        ({"livez": [0.01] * 90 + [1.5] * 10}, "/livez took 1.50 s at p99"),
        ({"n_livez_failures": 1}, "/livez failed 1 times"),
        ({"is_alive": False}, "the server died"),
    ],
)
def test_each_broken_promise_is_a_line(changes, problem):
    found = broken_promises(good(**changes))
    assert any(line.startswith(problem) for line in found), found


def test_slope_is_that_of_the_line_whatever_jumps():
    assert slope([(x, 3.0 * x + (1000 if x == 7 else 0)) for x in range(50)]) == 3.0
    assert slope([]) == slope([(1.0, 1.0)]) == growth([]) == 0.0
    assert abs(growth(memory(0.0))) < MIB
    assert growth(memory(MIB / 60)) == pytest.approx(2 * MIB, rel=0.2)


def test_quantile_of_few_and_none():
    assert [quantile([3, 1, 2], share) for share in (0, 0.5, 0.99)] == [1, 2, 3]
    assert quantile([], 0.99) == 0.0


def test_a_leak_that_is_not_found_is_a_problem():
    assert missed_leaks(["memory grew by 5 MiB", "descriptors at rest went from 1 to 9"]) == []
    assert len(missed_leaks(["memory grew by 5 MiB"])) == 1
    assert len(missed_leaks([])) == 2


def answer_with(sent: bytes, call: Call, *, deadline: float = 5.0) -> Outcome:
    """What the client makes of a server that sends this and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.read(1000)
        writer.write(sent)
        if not sent:  # says nothing until the client goes
            with contextlib.suppress(ConnectionResetError):
                await reader.read()
        writer.close()
        is_over.set()

    is_over = asyncio.Event()

    async def main() -> Outcome:
        server = await asyncio.start_server(serve, "127.0.0.1")
        async with server:
            outcome = await perform(server.sockets[0].getsockname(), call, deadline)
            await is_over.wait()
            return outcome

    return asyncio.run(main())


def stream(*events: bytes, ends: bool = True) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events)
    return head + chunks + (b"0\r\n\r\n" if ends else b"")


def reply(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


STREAM = load.known_call("short", is_chat=False, is_stream=True)
PLAIN = load.known_call("short", is_chat=False, is_stream=False)


@pytest.mark.parametrize(
    ("sent", "call", "kind"),
    [
        (stream(TOKEN, DONE), STREAM, ANSWER),
        (stream(TOKEN, FAILURE, ends=False), STREAM, FAILED),
        (stream(TOKEN, ends=False), STREAM, LOST),
        (stream(TOKEN, DONE, ends=False), STREAM, LOST),
        (stream(FAILURE, DONE, ends=False), STREAM, LOST),
        (stream(TOKEN), STREAM, STRANGE),
        (stream(TOKEN, DONE, TOKEN), STREAM, STRANGE),
        (stream(FAILURE, DONE), STREAM, STRANGE),
        (stream(TOKEN, ends=False), STREAM._replace(behaviour="slow"), LOST),
        (reply(200, b'{"choices":[]}'), PLAIN, ANSWER),
        (reply(200, b'{"choices":[]}')[:-2], PLAIN, LOST),
        (reply(429, b'{"error":{}}'), PLAIN, REFUSED),
        (reply(500, b'{"error":{}}'), PLAIN, FAILED),
        (reply(500, b"oops"), PLAIN, STRANGE),
        (reply(404, b'{"error":{}}'), PLAIN, STRANGE),
        (b"nonsense\r\n\r\n", PLAIN, STRANGE),
        (b"HTTP", PLAIN, LOST),
    ],
)
def test_every_end_of_a_request_is_told(sent, call, kind):
    outcome = answer_with(sent, call)
    assert outcome.kind == kind, outcome


def test_silence_is_hung_but_for_one_who_leaves():
    assert answer_with(b"", PLAIN, deadline=0.05).kind == HUNG
    leaver = PLAIN._replace(behaviour="resets", patience=0.01)
    assert answer_with(b"", leaver).kind == CANCELLED


def test_who_stalls_may_be_cut(monkeypatch):
    monkeypatch.setattr("benchmarks.server.client.STALL", 0.0)
    call = STREAM._replace(behaviour="stalls")
    assert answer_with(stream(TOKEN, ends=False), call).kind == CUT


def test_digest_is_of_the_text_however_it_comes():
    events = [b'{"choices":[{"index":0,"text":"o","finish_reason":null}]}',
              b'{"choices":[{"index":0,"text":"k","finish_reason":"stop"}]}']  # fmt: skip
    streamed = b"".join(b"data: %s\n\n" % event for event in events) + DONE
    whole = b'{"choices":[{"index":0,"text":"ok","finish_reason":"stop"}]}'
    cut = b'{"choices":[{"index":0,"text":"ok","finish_reason":"length"}]}'
    assert digest(streamed, True) == digest(whole, False) != digest(cut, False)


def test_the_same_seed_asks_the_same():
    first, second, third = (load.Mix(seed) for seed in (1, 1, 2))
    calls = [[mix.call() for _ in range(200)] for mix in (first, second, third)]
    assert calls[0] == calls[1] != calls[2]
    assert {call.behaviour for call in calls[0]} == {"reads", "slow", "stalls", "closes", "resets"}
