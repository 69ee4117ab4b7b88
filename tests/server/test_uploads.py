"""Bodies are bounded all together, and refused before they are read where that can be."""

import contextlib
import random
import socket

import orjson
import pytest

from fastgen_jax.server.errors import ApiError
from fastgen_jax.server.gate import Gate
from fastgen_jax.server.uploads import Uploads
from tests.server.fake_engine import FakeEngine
from tests.server.running import (
    PATHS,
    Running,
    hold_encode,
    raw_post,
    read_all,
    serving,
    wait_until,
)

LIMITS = {"max_body_bytes": 1000, "max_upload_bytes": 2500}


def post_part(up: Running, n_sent: int, n_declared: int, path="/v1/completions") -> socket.socket:
    """A connection on which a body has begun to arrive."""
    connection = socket.create_connection(up.address, timeout=10)
    connection.sendall(raw_post(path, b" " * n_sent, length=n_declared))
    return connection


class TestUploads:
    def test_no_order_of_events_holds_more_than_the_bound(self):
        rng, uploads = random.Random(0), Uploads(100)
        open_ones = []
        for _ in range(5000):
            if open_ones and rng.random() < 0.2:
                context, _ = open_ones.pop(rng.randrange(len(open_ones)))
                context.__exit__(None, None, None)
            elif open_ones and rng.random() < 0.8:
                n_before, n = uploads.n_held, rng.randrange(40)
                fits = n_before + n <= 100
                with contextlib.nullcontext() if fits else pytest.raises(ApiError, match="limit"):
                    rng.choice(open_ones)[1].take(n)
                assert uploads.n_held == n_before + n * fits
            else:
                context = uploads.open()
                open_ones.append((context, context.__enter__()))
            assert uploads.n_held == sum(upload.n_bytes for _, upload in open_ones) <= 100
        for context, _ in open_ones:
            context.__exit__(None, None, None)
        assert uploads.n_held == 0

    def test_bodies_on_their_way_are_refused_together(self, tokenizer):
        with serving(tokenizer, **LIMITS) as up:
            first = [post_part(up, 900, 1000) for _ in range(2)]
            wait_until(lambda: up.service.uploads.n_held == 1800)
            with post_part(up, 0, 701) as refused:  # not a byte of its body was sent
                answer = refused.recv(65536)
            assert answer.startswith(b"HTTP/1.1 429")
            assert b"too_many_uploads" in answer
            assert b"retry-after: 1" in answer
            assert up.post("/v1/completions", {"prompt": "a"}).status_code == 200
            with post_part(up, 650, 700) as third:
                wait_until(lambda: up.service.uploads.n_held == 2450)
                first[0].sendall(b" " * 51)
                assert first[0].recv(65536).startswith(b"HTTP/1.1 429")
                wait_until(lambda: up.service.uploads.n_held == 1550)
                third.sendall(b" " * 50)
                assert third.recv(65536).startswith(b"HTTP/1.1 400")
            for connection in first:
                connection.close()
            wait_until(lambda: up.service.uploads.n_held == 0)

    def test_a_body_without_a_length_is_counted_as_it_comes(self, tokenizer):
        with serving(tokenizer, **LIMITS) as up:
            others = [post_part(up, 900, 1000) for _ in range(2)]
            head = (
                b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            )
            with socket.create_connection(up.address, timeout=10) as chunked:
                chunked.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
                chunked.sendall(b"190\r\n" + b" " * 400 + b"\r\n")
                wait_until(lambda: up.service.uploads.n_held == 2200)
                chunked.sendall(b"190\r\n" + b" " * 400 + b"\r\n")
                assert chunked.recv(65536).startswith(b"HTTP/1.1 429")
            for connection in others:
                connection.close()
            wait_until(lambda: up.service.uploads.n_held == 0)

    def test_nothing_is_held_once_the_prompt_is_queued(self, up):
        up.engine.may_step.clear()
        with up.connect(PATHS["completions"]), up.connect({"prompt": "a", "stream": True}):
            wait_until(lambda: len(up.engine.live) == 2)
            wait_until(lambda: up.service.uploads.n_held == 0)

    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
    @pytest.mark.parametrize("body", [b"{", b"{}", b" " * 5000, b'{"prompt":"' + b"x" * 60000])
    def test_whatever_ends_a_request_releases_its_body(self, up, path, body):
        assert up.post(path, body).status_code == 400
        assert up.service.uploads.n_held == 0

    def test_faults_and_slow_bodies_release_too(self, up, monkeypatch):
        monkeypatch.setattr("fastgen_jax.server.stream.BODY_TIMEOUT", 0.05)
        with post_part(up, 900, 1000) as slow:
            assert read_all(slow).startswith(b"HTTP/1.1 408")
        monkeypatch.setattr(up.service, "submit", lambda *a, **k: 1 / 0)
        assert up.post("/v1/completions", PATHS["completions"]).status_code == 500
        assert up.service.uploads.n_held == 0

    def test_what_waits_for_the_tokenizer_is_held(self, tokenizer, monkeypatch):
        go_on = hold_encode(tokenizer, monkeypatch)
        body = {"prompt": "a " * 2000}
        size = len(orjson.dumps(body))
        with serving(tokenizer, max_body_bytes=5000, max_upload_bytes=3 * size) as up:
            others = [up.connect(body) for _ in range(3)]
            wait_until(lambda: up.service.uploads.n_held == 3 * size)
            assert up.post("/v1/completions", {"prompt": "a"}).status_code == 429
            go_on.set()
            for connection in others:
                assert connection.recv(65536).startswith(b"HTTP/1.1 200")
                connection.close()
            assert up.service.uploads.n_held == 0


class TestFullQueue:
    @pytest.fixture
    def full(self, tokenizer):
        """A server whose queue holds one request and will hold no more."""
        with serving(tokenizer, FakeEngine(0, max_queued_requests=1)) as up:
            up.engine.may_step.clear()
            with up.connect({"prompt": "a"}):
                wait_until(lambda: up.engine.live)
                yield up
                up.engine.may_step.set()

    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
    def test_it_refuses_before_the_body_has_come(self, full, path):
        with post_part(full, 0, 1_900_000, path) as connection:
            answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 429")
        assert b"queue_full" in answer
        assert b"retry-after: 1" in answer

    def test_the_refused_connection_serves_on(self, full):
        with post_part(full, 0, 100_000) as connection:
            assert connection.recv(65536).startswith(b"HTTP/1.1 429")
            connection.sendall(b" " * 100_000)
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")

    def test_a_refusal_takes_no_task(self, full, monkeypatch):
        monkeypatch.setattr(Gate, "__call__", None)
        answer = full.post("/v1/completions", {"prompt": "a"}, headers={"x-request-id": "mine"})
        assert answer.status_code == 429
        assert answer.headers["x-request-id"] == "mine"

    @pytest.mark.parametrize("version", ["1.0", "1.1"])
    def test_who_closes_next_reads_why_though_the_body_is_under_way(self, full, version):
        head = raw_post("/v1/completions", b"", "Connection: close\r\n", length=1_900_000)
        with socket.create_connection(full.address, timeout=5) as connection:
            connection.sendall(head.replace(b"HTTP/1.1", b"HTTP/" + version.encode()))
            connection.sendall(b" " * 1_900_000)
            answer = read_all(connection)
            assert answer.startswith(b"HTTP/1.1 429")
            assert b"connection: close" in answer
            assert b"queue_full" in answer
            wait_until(lambda: full.server.capacity.n_open == 1)  # though we have not closed

    @pytest.mark.parametrize("method", ["POST", "GET"])
    def test_nothing_that_follows_the_last_request_is_read(self, full, method):
        last = raw_post("/v1/completions", b"{}", "Connection: close\r\n")
        with socket.create_connection(full.address, timeout=5) as connection:
            connection.sendall(last + raw_post("/nowhere", b"{}").replace(b"POST", method.encode()))
            answer = read_all(connection)
        assert answer.count(b"HTTP/1.1") == 1
        assert answer.startswith(b"HTTP/1.1 429")

    def test_what_needs_no_queue_is_served(self, full):
        assert full.post("/tokenize", {"prompt": "a"}).status_code == 200
        assert full.get("/v1/completions").status_code == 405
        assert full.get("/health").status_code == 200

    def test_a_queue_that_fills_during_the_upload_costs_no_tokenizing(self, tokenizer, monkeypatch):
        engine = FakeEngine(0, max_queued_requests=1)
        with serving(tokenizer, engine) as up, post_part(up, 900, 1000) as late:
            wait_until(lambda: up.service.uploads.n_held == 900)
            engine.may_step.clear()
            with up.connect({"prompt": "a"}):
                wait_until(lambda: engine.live)
                monkeypatch.setattr("fastgen_jax.server.protocol.parse", None)
                late.sendall(b" " * 100)
                assert late.recv(65536).startswith(b"HTTP/1.1 429")
                engine.may_step.set()


class TestTooMuch:
    @pytest.mark.parametrize(("path", "body"), [
        ("/v1/completions", {"prompt": ["a"] * 5, "n": 13}),
        ("/v1/completions", {"prompt": ["a"] * 65}), ("/v1/completions", {"prompt": "a", "n": 65}),
        ("/v1/chat/completions", PATHS["chat/completions"] | {"n": 65}),
    ])  # fmt: skip
    def test_more_samples_than_the_queue_ever_takes_are_a_400(self, up, path, body):
        error = up.post(path, body).json()["error"]
        assert error["type"] == "invalid_request_error"
        assert "more than the 64 samples that can ever be queued" in error["message"]
        assert error["param"] == ("n" if "n" in body else "prompt")

    @pytest.mark.parametrize("ask", [{"echo": True}, {"return_token_ids": True}])
    def test_an_answer_repeats_its_prompts_within_bounds(self, up, tokenizer, ask):
        body = {"prompt": [[5] * 4000] * 16, "max_tokens": 1} | ask
        assert up.post("/v1/completions", body | {"n": 1}).status_code == 200
        answer = up.post("/v1/completions", body | {"prompt": body["prompt"][:1], "n": 64})
        assert answer.status_code == 200
        with serving(tokenizer, FakeEngine(0, max_queued_requests=1024)) as larger:
            error = larger.post("/v1/completions", body | {"n": 64}).json()["error"]
        assert error["param"] in ask
        assert f"at most {4_000_000}" in error["message"]
