"""GET /debug/steps: what watchers are told, and that they cost nobody anything."""

import contextlib
import json
import socket
import threading

import orjson
import pytest

from fastgen_jax.engine.blocks import BlockMap
from fastgen_jax.engine.history import N_STEPS
from fastgen_jax.server import watch
from fastgen_jax.server.watch import MAX_CELLS, MAX_WATCHERS, N_UNREAD, Watcher, cells, quantiles
from tests.server.running import TEXT, read_all, serving, wait_until

READY = {"phase": "ready", "programs": {"compiled": 10, "of": 10}}
PROMPT = {"prompt": TEXT, "max_tokens": 20, "logprobs": 1}


@pytest.fixture
def up(up):
    """The shared server, which nobody watches before and after."""
    yield up
    wait_until(lambda: not the_watch(up).watchers)


@contextlib.contextmanager
def watching(up, **kwargs):
    """The events of a watcher, parsed."""
    with up.http.stream("GET", up.url + "/debug/steps", **kwargs) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield (json.loads(line[6:]) for line in answer.iter_lines() if line)


def until(events, condition) -> list[dict]:
    """The events up to the first that meets it."""
    seen = []
    for event in events:
        seen.append(event)
        if condition(event):
            return seen
    raise AssertionError("the stream has ended")


def the_watch(up) -> watch.Watch:
    app = up.server.config.app
    while not hasattr(app, "routes"):
        app = app.app
    routes = [route for route in app.routes if route.path == "/debug/steps"]
    return routes[0].endpoint.__self__.watch


def test_a_watcher_is_told_limits_history_and_then_each_new_step_once(up):
    up.post("/v1/completions", PROMPT)
    with watching(up) as events:
        first = next(events)
        assert first["engine"]["max_num_batched_tokens"] == 512
        assert first["health"] == READY
        numbers = [step[0] for step in first["steps"]]
        up.post("/v1/completions", PROMPT)
        newest = up.engine.history.n_steps
        told = until(events, lambda event: event["steps"] and event["steps"][-1][0] >= newest)
    numbers += [step[0] for event in told for step in event["steps"]]
    assert numbers == list(range(numbers[0], newest + 1))
    assert len(first["step_fields"]) == len(told[-1]["steps"][-1])


def test_head_tells_the_type_and_watches_nothing(up):
    answer = up.http.head(up.url + "/debug/steps")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert not the_watch(up).watchers


def test_latencies_and_blocks_follow_what_happens(up):
    up.post("/v1/completions", PROMPT)
    with watching(up) as events:
        told = until(events, lambda event: "blocks" in event)
    assert [len(told[0]["latency"][name]) for name in ("ttft", "itl")] == [3, 3]
    assert told[-1]["blocks"] == {"counts": [255, 0, 0, 0], "cell_size": 1, "cells": "0" * 255}


def test_no_text_and_no_token_is_told(up):
    known = {"time", "steps", "step_fields", "health", "engine", "latency", "blocks", *watch.STATS}
    with watching(up) as events:
        up.post("/v1/completions", PROMPT | {"user": "Anna"})
        newest = up.engine.history.n_steps
        told = until(events, lambda event: event["steps"] and event["steps"][-1][0] >= newest)
    assert {name for event in told for name in event} <= known
    assert "Anna" not in json.dumps(told)


def test_the_engine_is_asked_for_nothing_while_nobody_watches(up, monkeypatch):
    asked = []
    monkeypatch.setattr(up.engine, "map_blocks", asked.append)
    up.post("/v1/completions", PROMPT)
    assert asked == []
    with watching(up) as events:
        next(events)
        wait_until(lambda: asked)
    wait_until(lambda: not the_watch(up).watchers and the_watch(up)._task is None)


def test_blocks_are_looked_at_once_if_nothing_happens(up, monkeypatch):
    asked = []
    monkeypatch.setattr(up.engine, "map_blocks", asked.append)
    up.engine.may_step.clear()
    with watching(up) as events:
        next(events)
        wait_until(lambda: asked)
        asked[0](BlockMap(bytes(255), 0.0))
        until(events, lambda event: "blocks" in event)
        next(events)  # a sign of life, a second later
    assert len(asked) == 1


def test_there_are_no_more_watchers_than_allowed_and_who_leaves_makes_room(up):
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(watching(up)) for _ in range(MAX_WATCHERS)]
        assert all(next(events)["health"] for events in streams)
        refused = up.get("/debug/steps")
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "too_many_watchers"
    wait_until(lambda: not the_watch(up).watchers)
    with watching(up) as events:
        assert next(events)["health"] == READY


def test_a_watcher_delays_no_drain_and_its_stream_ends_well(tokenizer):
    with serving(tokenizer, drain_timeout=30) as up, watching(up) as events:
        next(events)
        assert up.service.n_inflight == 0
        up.begin_drain()
        list(events)  # raises if it is cut
        up.thread.join(10)
        assert not up.thread.is_alive()


def test_a_watcher_may_come_before_the_model_is_there(tokenizer):
    def load(on_phase):
        on_phase("compiling", 3, 9)
        has_seen.wait(10)
        raise RuntimeError("it cannot be loaded")

    has_seen = threading.Event()
    with serving(tokenizer, load=load, wait=False) as up, watching(up) as events:
        until(events, lambda event: event["health"].get("of") == 9)
        has_seen.set()
        up.thread.join(10)


def test_a_watcher_that_reads_nothing_holds_a_bounded_number_of_events():
    watcher = Watcher(b"first")
    for _ in range(N_UNREAD - 1):
        assert not watcher.is_behind
        watcher.put(b"more")
    assert watcher.is_behind
    watcher.restart(b"first again")
    assert list(watcher._events) == [b"first again"]


def test_one_that_joins_late_knows_the_same_as_one_that_was_there(up):
    """Whatever has changed between two events, its first holds what the next ones build on."""
    with watching(up) as early:
        state = next(early)
        with watching(up) as late:
            later = next(late)
            for event in until(early, lambda event: event["time"] >= later["time"]):
                state |= event
            up.post("/v1/completions", PROMPT)
            newest = up.engine.history.n_steps
            for known, events in ((state, early), (later, late)):
                for event in until(events, lambda e: e["steps"] and e["steps"][-1][0] >= newest):
                    known |= event
    assert [state[name] for name in watch.STATS] == [later[name] for name in watch.STATS]


def test_a_watcher_that_reads_nothing_is_cut_in_the_end(tokenizer):
    with serving(tokenizer, stream_timeout=0.3) as up:
        connection = socket.create_connection(up.address, timeout=10)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.sendall(b"GET /debug/steps HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: the_watch(up).watchers)
        wait_until(lambda: up.post("/v1/completions", PROMPT) and not the_watch(up).watchers, 20)
        read_all(connection)
        connection.close()


def test_steps_need_a_key_and_are_not_there_without_the_page(tokenizer):
    with serving(tokenizer, api_key=("key",)) as up:
        assert up.get("/debug/steps").status_code == 401
        with watching(up, headers={"authorization": "Bearer key"}) as events:
            assert next(events)["health"]
    with serving(tokenizer, web=False) as up:
        assert up.get("/debug/steps").status_code == 404


@pytest.mark.parametrize(("n", "size", "length"), [(5, 1, 5), (MAX_CELLS * 3 - 1, 3, MAX_CELLS)])
def test_a_large_pool_is_shown_by_what_most_blocks_of_a_cell_are(n, size, length):
    classes = bytes([1, 3, 3]) * (n // 3) + bytes([2] * (n % 3))
    shown = cells(classes, size)
    assert len(shown) == length
    assert shown[:3] == ("133" if size == 1 else "333")
    assert shown[-1] == "2"


def test_quantiles_are_values_that_came():
    assert quantiles([]) == []
    assert quantiles([0.5]) == [0.5] * 3
    assert quantiles(range(1, 101)) == [50, 90, 99]


def test_a_first_event_of_the_largest_batches_stays_small():
    chunk = [100_000, 1, 4000, 4000]
    step = [10**6, 10**5 + 0.123456, 0.0123456, 512, 256, 256, 0, chunk * 256]
    assert len(orjson.dumps([step] * N_STEPS)) < 1_000_000
