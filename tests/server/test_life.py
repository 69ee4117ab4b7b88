"""Loading, ready, draining, stopped: what is served when."""

import contextlib
import re
import threading

import orjson

from fastgen_jax.server.service import Backend
from tests.server.fake_engine import FakeEngine
from tests.server.running import PATHS, TEXT, raw_post, read_all, serving, wait_until


class TestLife:
    def test_while_loading_the_port_answers_and_refuses_work(self, tokenizer):
        go_on, phases = threading.Event(), threading.Event()

        def load(on_phase):
            on_phase("compiling", 3, 9)
            phases.set()
            assert go_on.wait(10)
            return Backend(engine, tokenizer)

        engine = FakeEngine(tokenizer.eos_token_id)
        with serving(tokenizer, engine, load=load, wait=False) as up:
            assert phases.wait(5)
            assert up.get("/livez").status_code == 200
            health = up.get("/health")
            assert health.status_code == 503
            assert health.json().items() >= {"phase": "compiling", "done": 3, "of": 9}.items()
            assert health.json()["elapsed_s"] >= 0
            assert up.get("/ready").status_code == 503
            assert up.get("/v1/models").json()["data"][0]["id"] == "fake"
            assert "fastgen:num_requests_running" in up.get("/metrics").text
            for refused in (up.get("/tokenizer_info"), up.post("/tokenize", {"prompt": "a"})):
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
            refused = up.post("/v1/completions", PATHS["completions"])
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
            assert int(refused.headers["retry-after"]) > 0
            go_on.set()
            wait_until(lambda: up.get("/health").status_code == 200)
            assert up.post("/v1/completions", PATHS["completions"]).status_code == 200

    def test_health_counts_the_programs_that_are_there(self, up):
        for counts in ({"n_programs": 3}, {"n_programs": 9, "n_programs_failed": 1}):
            vars(up.engine).update(counts)
            told = {"compiled": counts["n_programs"], "of": 10}
            told |= {"failed": 1} if "n_programs_failed" in counts else {}
            assert up.get("/health").json() == {"phase": "ready", "programs": told}
            shown = up.get("/metrics").text
            assert re.search(rf"fastgen:engine_programs_compiled{{.*}} {told['compiled']}\n", shown)
            assert re.search(
                rf"fastgen:engine_programs_failed{{.*}} {told.get('failed', 0)}\n", shown
            )
        vars(up.engine).update(n_programs=10, n_programs_failed=0)

    def test_a_stop_does_not_wait_for_a_compiler(self, tokenizer):
        with serving(tokenizer) as up:
            up.engine.is_compiling = True
        assert not up.service.stop()

    def test_a_failed_load_ends_the_server(self, tokenizer):
        def load(on_phase):
            raise ValueError("no such file")

        with serving(tokenizer, load=load, wait=False) as up:
            up.thread.join(5)
            assert not up.thread.is_alive()
            assert isinstance(up.service.load_error, ValueError)

    def test_drain_finishes_what_runs_and_refuses_the_rest(self, tokenizer, wire):
        with serving(tokenizer, drain_timeout=10, **wire) as up:
            up.engine.may_step.clear()
            body = PATHS["completions"] | {"max_tokens": 30}
            streaming, waiting = up.connect(body | {"stream": True}), up.connect(body)
            wait_until(lambda: len(up.engine.live) == 2)
            up.begin_drain()
            wait_until(lambda: up.get("/health").status_code == 503)
            refused = up.post("/v1/completions", body)
            assert (refused.status_code, refused.headers["connection"]) == (503, "close")
            assert refused.json()["error"]["code"] == "draining"
            up.engine.may_step.set()
            assert b"[DONE]" in read_all(streaming)
            assert waiting.recv(65536).startswith(b"HTTP/1.1 200")
            streaming.close()
            waiting.close()
            up.thread.join(2)
            assert not up.thread.is_alive()

    def test_drain_ends_with_errors_when_time_is_over(self, tokenizer, wire):
        with serving(tokenizer, drain_timeout=0.2, **wire) as up:
            up.engine.step_time = 0.01
            body = {"prompt": TEXT, "max_tokens": 4000, "ignore_eos": True}
            streaming = up.connect(body | {"stream": True})
            assert streaming.recv(65536).startswith(b"HTTP/1.1 200")
            waiting = up.connect(body)
            wait_until(lambda: len(up.engine.live) == 2)
            up.begin_drain()
            streamed = read_all(streaming)
            assert b"shutting down" in streamed
            assert b"[DONE]" not in streamed
            assert waiting.recv(65536).startswith(b"HTTP/1.1 503")
            streaming.close()
            waiting.close()
            up.thread.join(2.2)
            assert not up.thread.is_alive()

    def test_drain_tells_uploads_why_they_end_and_cuts_who_reads_nothing(
        self, tokenizer, wire, caplog
    ):
        with serving(tokenizer, drain_timeout=0.1, **wire) as up, contextlib.ExitStack() as stack:
            upload, fresh = (stack.enter_context(up.open()) for _ in range(2))
            upload.sendall(raw_post("/v1/completions", b"{", length=1000))
            fresh.sendall(raw_post("/tokenize", b"", "Expect: 100-continue\r\n", length=1000))
            assert fresh.recv(65536).startswith(b"HTTP/1.1 100")
            unread = stack.enter_context(up.open(4096))
            body = {"prompt": TEXT, "max_tokens": 3000, "ignore_eos": True, "logprobs": 20}
            unread.sendall(raw_post("/v1/completions", orjson.dumps(body | {"stream": True})))
            wait_until(lambda: any(c.flow.write_paused for c in up.server._connections()))
            up.begin_drain()
            for connection in (upload, fresh):
                answer = read_all(connection)
                assert answer.startswith(b"HTTP/1.1 503")
                assert b"draining" in answer
                connection.close()
            up.thread.join(4)
            assert not up.thread.is_alive()
        assert not [r for r in caplog.records if r.levelname == "ERROR"]

    def test_idle_drain_is_fast(self, tokenizer):
        with serving(tokenizer, drain_timeout=30) as up:
            up.begin_drain()
            up.thread.join(2)
            assert not up.thread.is_alive()
