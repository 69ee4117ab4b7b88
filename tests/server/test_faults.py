"""Clients that vanish, engines that fail, queues that fill."""

import socket
import struct
import time

import httpx
import openai
import orjson
import pytest

from fastgen_jax.engine.types import Request
from fastgen_jax.sampling_params import SamplingParams
from fastgen_jax.server import service
from tests.server.fake_engine import FakeEngine
from tests.server.running import (
    PATHS,
    TEXT,
    raw_post,
    read_all,
    serving,
    wait_until,
)


class TestFaults:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("reset", [False, True])
    def test_a_client_that_leaves_while_queued_cancels(self, up, stream, reset):
        up.engine.may_step.clear()
        up.engine.cancelled.clear()
        connection = up.connect(PATHS["completions"] | {"stream": stream, "n": 3})
        wait_until(lambda: len(up.engine.live) == 3)
        if reset:
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.close()
        wait_until(lambda: not up.engine.live)
        assert len(up.engine.cancelled) == 1

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_client_that_leaves_mid_answer_cancels(self, up, stream):
        up.engine.step_time = 0.002
        body = {"prompt": TEXT, "stream": stream, "max_tokens": 4000, "ignore_eos": True}
        n_before = up.engine.n_generated
        connection = up.connect(body)
        wait_until(lambda: up.engine.n_generated > n_before + 5)
        connection.close()
        wait_until(lambda: not up.engine.live)
        assert up.engine.n_generated < n_before + 2000

    def test_closing_the_openai_stream_cancels(self, up, client):
        up.engine.step_time = 0.002
        stream = client.completions.create(
            model="fake", prompt=TEXT, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
        wait_until(lambda: not up.engine.live)

    def test_a_slow_reader_delays_nobody_and_is_cut_at_last(self, tokenizer):
        slow_body = {
            "prompt": TEXT, "stream": True, "max_tokens": 4000, "ignore_eos": True, "logprobs": 20,
        }  # fmt: skip
        with serving(tokenizer, stream_timeout=0.5) as up:
            up.engine.step_time = 0.001
            slow = socket.socket()
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(up.address)
            slow.sendall(raw_post("/v1/completions", orjson.dumps(slow_body)))
            wait_until(lambda: up.engine.live)
            started = time.monotonic()
            assert up.post("/v1/completions", PATHS["completions"]).status_code == 200
            assert time.monotonic() - started < 1.0
            wait_until(lambda: not up.service.n_inflight)
            assert b"[DONE]" not in read_all(slow)
            slow.close()

    def test_the_death_of_the_engine_reaches_every_waiter(self, tokenizer):
        with serving(tokenizer, on_engine_failure="stay") as up:
            up.engine.step_time = 0.005
            body = {"prompt": TEXT, "max_tokens": 4000, "ignore_eos": True}
            streaming = up.connect(body | {"stream": True})
            head = streaming.recv(65536)
            assert head.startswith(b"HTTP/1.1 200")
            waiting = up.connect(body)
            wait_until(lambda: len(up.engine.live) == 2)
            started = time.monotonic()
            up.engine.fault = RuntimeError("secret /path/of/machine")
            streamed, answered = read_all(streaming), waiting.recv(65536)
            assert time.monotonic() - started < 1.0
            assert b'data: {"error":' in streamed
            assert b"[DONE]" not in streamed
            assert not streamed.endswith(b"0\r\n\r\n")
            assert answered.startswith(b"HTTP/1.1 500")
            assert b"secret" not in streamed + answered
            for path in ("/health", "/livez"):
                answer = up.get(path)
                assert answer.status_code == 503
                reason = "the engine gave up after 0 failed steps, the last with RuntimeError"
                assert answer.json()["reason"] == reason
            assert up.get("/health").json()["phase"] == "failed"
            assert up.post("/v1/completions", body).status_code == 503
            streaming.close()
            waiting.close()

    def test_openai_raises_on_an_error_within_a_stream(self, tokenizer):
        with serving(tokenizer) as up, up.client() as client:
            up.engine.step_time = 0.005
            stream = client.completions.create(
                model="fake", prompt=TEXT, max_tokens=50, stream=True
            )
            next(iter(stream))
            up.engine.fault = RuntimeError("boom")
            with pytest.raises(openai.APIError, match="engine stopped"):
                list(stream)

    def test_a_dead_engine_ends_the_server_after_the_last_answer(self, tokenizer):
        with serving(tokenizer) as up:
            up.engine.step_time = 0.005
            body = {"prompt": TEXT, "max_tokens": 4000, "ignore_eos": True, "stream": True}
            with up.connect(body) as streaming:
                assert streaming.recv(65536).startswith(b"HTTP/1.1 200")
                up.engine.fault = TypeError("boom")
                assert b'data: {"error":' in read_all(streaming)
            up.thread.join(5)
            assert not up.thread.is_alive()
            assert "TypeError" in up.service.failure

    def test_health_reports_logits_that_are_not_finite(self, up):
        up.engine.nonfinite_share = 0.8
        answer = up.get("/health")
        up.engine.nonfinite_share = 0.0
        assert (answer.status_code, answer.json()["phase"]) == (503, "failing")
        assert answer.json()["reason"].startswith("80% of the newest tokens had logits that are")
        assert up.get("/health").status_code == 200

    def test_a_poisoned_request_fails_alone(self, up):
        up.engine.may_step.clear()
        with up.connect(PATHS["completions"]) as poisoned, up.connect({"prompt": "b"}) as good:
            wait_until(lambda: len(up.engine.live) == 2)
            (bad_id,) = (
                i
                for i, _ in up.engine.live
                if len(up.engine.live[i, 0].request.prompt_token_ids) > 2
            )
            up.engine.poisoned.add(bad_id)
            up.engine.may_step.set()
            assert poisoned.recv(65536).startswith(b"HTTP/1.1 500")
            assert good.recv(65536).startswith(b"HTTP/1.1 200")

    def test_a_fault_of_the_detokenizer_fails_its_request_alone(self, up, monkeypatch):
        from fastgen_jax.server import generation

        def push(self, output, push=generation.TextStream.push):
            if self._params.seed == 666:
                raise ValueError("boom")
            return push(self, output)

        monkeypatch.setattr(generation.TextStream, "push", push)
        up.engine.may_step.clear()
        with (
            up.connect(PATHS["completions"] | {"seed": 666}) as bad,
            up.connect({"prompt": "b"}) as good,
        ):
            wait_until(lambda: len(up.engine.live) == 2)
            up.engine.may_step.set()
            assert bad.recv(65536).startswith(b"HTTP/1.1 500")
            assert good.recv(65536).startswith(b"HTTP/1.1 200")

    def test_a_fault_of_ours_is_a_500_without_its_text(self, up, monkeypatch):
        monkeypatch.setattr(up.service, "submit", lambda *a, **k: 1 / 0)
        answer = up.post("/v1/completions", PATHS["completions"], headers={"x-request-id": "r-1"})
        assert answer.status_code == 500
        assert "r-1" in answer.json()["error"]["message"]
        assert "division" not in answer.text
        assert answer.headers["connection"] == "close"  # and it does close

    def test_deadlines_end_queued_and_running_requests(self, tokenizer):
        with serving(tokenizer, queue_timeout=0.1, request_timeout=0.4) as up:
            up.engine.may_step.clear()
            answer = up.post("/v1/completions", PATHS["completions"])
            assert (answer.status_code, answer.json()["error"]["code"]) == (
                504,
                "deadline_exceeded",
            )
            up.engine.step_time = 0.01
            up.engine.may_step.set()
            body = {"prompt": TEXT, "max_tokens": 4000, "ignore_eos": True, "stream": True}
            with up.connect(body) as connection:
                received = read_all(connection)
            assert b"deadline_exceeded" in received
            assert b"[DONE]" not in received
            wait_until(lambda: not up.engine.live)

    def test_health_reports_a_step_that_hangs(self, tokenizer):
        with serving(tokenizer, step_timeout=0.1) as up:
            assert up.get("/health").status_code == 200
            up.engine.may_step.clear()
            with up.connect(PATHS["completions"]):
                wait_until(lambda: up.get("/health").json()["phase"] == "stalled")
                assert up.get("/health").status_code == 503
            up.engine.may_step.set()
            wait_until(lambda: up.get("/health").status_code == 200)

    def test_a_thousand_refusals_leave_nothing_behind(self, up):
        body = orjson.dumps({"prompt": [10**6]})
        with httpx.Client(base_url=up.url, headers={"content-type": "application/json"}) as client:
            assert {
                client.post("/v1/completions", content=body).status_code for _ in range(1000)
            } == {400}
        assert up.post("/v1/completions", PATHS["completions"]).status_code == 200
        assert not up.service._live

    def test_a_full_queue_costs_no_text_work(self, tokenizer, monkeypatch):
        """16 long stop strings for each of 1024 samples took 3 s, for requests refused after."""
        monkeypatch.setattr(service.TextStream, "of_samples", lambda *a: pytest.fail("prepared"))
        with serving(tokenizer, FakeEngine(0, max_queued_requests=2)) as up:
            up.engine.may_step.clear()
            up.engine.submit_all([Request([5], SamplingParams())])
            answer = up.post("/v1/completions", {"prompt": ["a", "b"], "stop": ["x" * 1024] * 16})
            assert answer.status_code == 429

    def test_what_was_admitted_is_cancelled_when_its_text_side_fails(self, up, monkeypatch):
        monkeypatch.setattr(service, "Choice", lambda *a: 1 / 0)
        up.engine.may_step.clear()
        answer = up.post("/v1/completions", PATHS["completions"] | {"prompt": ["a", "b"]})
        assert answer.status_code == 500
        assert not up.engine.live
        assert not up.service._live
