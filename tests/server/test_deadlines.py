"""X-Request-Timeout ends a request, queued or running, and no later than the operator allows."""

import socket

import orjson
import pytest

from tests.server.running import PATHS, TEXT, raw_post, read_all, serving, wait_until
from tests.server.test_wire import exchange

ROUTES = [
    *((f"/v1/{path}", body) for path, body in PATHS.items()),
    ("/v1/responses", {"input": TEXT}),
    ("/v1/embeddings", {"input": TEXT}),
]
ENDLESS = {"prompt": TEXT, "max_tokens": 4000, "ignore_eos": True}


def ask(up, timeout, path="/v1/completions", body=PATHS["completions"]):
    return up.post(path, body, headers={"x-request-timeout": timeout})


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_what_waits_past_its_deadline_is_a_504_and_cancelled(up, path, body):
    up.engine.may_step.clear()
    n_cancelled = len(up.engine.cancelled)
    answer = ask(up, "0.05", path, body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (504, "deadline_exceeded")
    assert error["message"] == "the request did not finish within 0.05 s"
    wait_until(lambda: len(up.engine.cancelled) > n_cancelled)


def test_what_runs_past_its_deadline_is_a_504_and_cancelled(up):
    up.engine.step_time = 0.01
    assert ask(up, "0.2", body=ENDLESS).status_code == 504
    wait_until(lambda: not up.engine.live)


def test_a_stream_that_runs_past_its_deadline_ends_in_an_error_event(up):
    up.engine.step_time = 0.01
    body = orjson.dumps(ENDLESS | {"stream": True})
    extra = "X-Request-Timeout: 1\r\nConnection: close\r\n"
    with socket.create_connection(up.address, timeout=10) as connection:
        connection.sendall(raw_post("/v1/completions", body, extra))
        received = read_all(connection)
    assert received.startswith(b"HTTP/1.1 200")
    assert b"deadline_exceeded" in received
    assert b"[DONE]" not in received
    wait_until(lambda: not up.engine.live)


def test_what_ends_in_time_is_served(up):
    for value in ("30", "2.5", "9.999999999", "999999999"):
        assert ask(up, value).status_code == 200
    assert not up.service._live


def test_the_operator_says_the_most(tokenizer):
    with serving(tokenizer, request_timeout=0.05) as up:
        up.engine.may_step.clear()
        error = ask(up, "1000").json()["error"]
    assert error["message"] == "the request did not finish within 0.05 s"


BAD = ["", "0", "0.0", "-1", "+1", "nan", "inf", "1e3", "1_0", "5s", "1,5", "0x10", "1.", ".5",
       "9" * 10, "9" * 400, "1." + "1" * 400, "1 2", "\xb2", "\u0661"]  # fmt: skip


@pytest.mark.parametrize("value", BAD)
def test_what_is_no_number_of_seconds_is_a_400_that_names_the_header(up, value):
    n_submitted = len(up.engine.submitted)
    answer = ask(up, value.encode())
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "x-request-timeout")
    assert error["message"].startswith("X-Request-Timeout must be a number of seconds above 0")
    assert len(error["message"]) < 200
    assert len(up.engine.submitted) == n_submitted


def test_two_deadlines_are_none(up):
    extra = "X-Request-Timeout: 5\r\nX-Request-Timeout: 6\r\nConnection: close\r\n"
    received = exchange(up.address, raw_post("/v1/completions", b"{}", extra))
    assert received.startswith(b"HTTP/1.1 400")
    assert b"not '5, 6'" in received
