"""Traces, as a collector gets them over HTTP: what requests took, and whose they were."""

import contextlib
import http.server
import itertools
import socket
import threading
import time

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from fastgen_jax import serve
from fastgen_jax.errors import ConfigError
from fastgen_jax.server.journal import tracer_to
from tests.server.running import CHAT, PATHS, TEXT, serving, wait_until

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector(http.server.ThreadingHTTPServer):
    """Takes what is posted."""

    def __init__(self, port: int = 0):
        self.requests: list[ExportTraceServiceRequest] = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format, *args):
                pass

        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1/traces"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self.thread.start()

    def spans(self) -> dict:
        """By name."""
        scopes = [
            s for r in self.requests for resource in r.resource_spans for s in resource.scope_spans
        ]
        return {span.name: span for scope in scopes for span in scope.spans}

    def close(self):
        self.shutdown()
        self.thread.join()
        self.server_close()


def attributes(span) -> dict:
    def value(field):
        kind = field.WhichOneof("value")
        found = getattr(field, kind)
        return [value(v) for v in found.values] if kind == "array_value" else found

    return {field.key: value(field.value) for field in span.attributes}


@pytest.fixture
def collector():
    with contextlib.closing(Collector()) as collector:
        yield collector


@pytest.fixture
def traced(tokenizer, collector):
    """A server, and how to get the spans of what it has served."""
    with serving(tokenizer, otlp_traces_endpoint=collector.url) as up:

        def spans() -> dict:
            wait_until(lambda: not up.service.n_inflight)
            assert up.service.journal.tracer._provider.force_flush()
            return collector.spans()

        up.spans = spans
        yield up


class TestSpans:
    def test_a_request_is_a_span_with_its_phases_under_the_clients(self, traced):
        traced.engine.step_time = 0.005
        before = time.time_ns()
        headers = {"traceparent": PARENT, "x-request-id": "abc"}
        body = {"messages": CHAT, "max_tokens": 5, "ignore_eos": True}
        usage = traced.post("/v1/chat/completions", body, headers=headers).json()["usage"]
        spans = traced.spans()
        root = spans["llm_request"]
        assert root.trace_id.hex() == PARENT[3:35]
        assert root.parent_span_id.hex() == PARENT[36:52]
        assert before <= root.start_time_unix_nano < root.end_time_unix_nano <= time.time_ns()
        assert attributes(root).items() >= {
            "gen_ai.operation.name": "chat", "gen_ai.request.model": "fake",
            "gen_ai.usage.input_tokens": usage["prompt_tokens"],
            "gen_ai.usage.output_tokens": 5, "gen_ai.request.max_tokens": 5,
            "http.response.status_code": 200, "fastgen.request_id": "abc",
        }.items()  # fmt: skip
        assert attributes(root)["gen_ai.response.finish_reasons"] == ["length"]
        phases = [spans[name] for name in ("queue", "prefill", "decode")]
        assert {phase.parent_span_id for phase in phases} == {root.span_id}
        assert phases[0].start_time_unix_nano == root.start_time_unix_nano
        for phase, after in itertools.pairwise(phases):
            assert phase.end_time_unix_nano == after.start_time_unix_nano
        assert phases[-1].end_time_unix_nano <= root.end_time_unix_nano

    @pytest.mark.parametrize("parent", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
    def test_without_a_parent_that_can_be_read_it_is_a_root(self, traced, parent):
        traced.post("/v1/completions", PATHS["completions"], headers={"traceparent": parent})
        assert traced.spans()["llm_request"].parent_span_id == b""

    def test_who_does_not_sample_is_not_recorded(self, traced):
        headers = {"traceparent": PARENT[:-2] + "00"}
        traced.post("/v1/completions", PATHS["completions"], headers=headers)
        assert traced.spans() == {}

    def test_a_client_that_leaves_and_a_fault_are_told_apart(self, traced):
        traced.engine.may_step.clear()
        with traced.connect(PATHS["completions"]):
            wait_until(lambda: traced.engine.live)
        root = traced.spans()["llm_request"]
        assert attributes(root)["http.response.status_code"] == 499
        assert root.status.code == 0
        assert "decode" not in traced.spans()
        traced.engine.may_step.set()

    def test_no_text_is_told(self, traced, collector):
        traced.post("/v1/completions", PATHS["completions"] | {"user": "Bob"})
        traced.spans()
        said = str(collector.requests)
        assert TEXT not in said
        assert "Bob" not in said

    def test_only_what_the_engine_worked_on_is_traced(self, traced):
        traced.post("/tokenize", {"prompt": TEXT})
        traced.post("/v1/completions", {"prompt": 1.5})
        traced.get("/metrics")
        assert traced.spans() == {}


class TestCollector:
    def test_a_dead_one_is_told_of_once_and_costs_nothing(self, tokenizer, caplog, monkeypatch):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "0.01")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        with serving(tokenizer, otlp_traces_endpoint=f"http://127.0.0.1:{port}/v1/traces") as up:
            tracer = up.service.journal.tracer
            for _ in range(3):
                assert up.post("/v1/completions", PATHS["completions"]).status_code == 200
                tracer._provider.force_flush()
            assert caplog.text.count("traces do not reach") == 1
            with contextlib.closing(Collector(port)) as collector:
                up.post("/v1/completions", PATHS["completions"])
                wait_until(lambda: not up.service.n_inflight)
                monkeypatch.undo()
                tracer.close()
                wait_until(lambda: "spans were lost" in caplog.text)
                assert "llm_request" in collector.spans()

    def test_the_end_waits_for_the_last_spans_but_not_for_ever(self, tokenizer, monkeypatch):
        monkeypatch.setattr("fastgen_jax.server.tracing.CLOSE_SECONDS", 0.1)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces"
            with serving(tokenizer, otlp_traces_endpoint=endpoint) as up:
                up.post("/v1/completions", PATHS["completions"])
                wait_until(lambda: not up.service.n_inflight)
                started = time.monotonic()
                up.service.journal.close()
                assert time.monotonic() - started < 5


class TestFlag:
    @pytest.mark.parametrize(
        ("environment", "argv", "found"),
        [
            ({}, [], None),
            ({"ENDPOINT": "http://a:1/"}, [], "http://a:1/v1/traces"),
            ({"ENDPOINT": "http://a:1", "TRACES_ENDPOINT": "http://b/x"}, [], "http://b/x"),
            ({"ENDPOINT": "http://a"}, ["--otlp-traces-endpoint", "http://c/y"], "http://c/y"),
        ],
    )
    def test_the_endpoint_is_the_flags_or_the_environments(
        self, monkeypatch, environment, argv, found
    ):
        for name in ("ENDPOINT", "TRACES_ENDPOINT"):
            monkeypatch.delenv(f"OTEL_EXPORTER_OTLP_{name}", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{name}", value)
        assert serve.parse(argv)[1].otlp_traces_endpoint == found

    def test_missing_packages_are_named_with_the_extra(self, monkeypatch):
        monkeypatch.setitem(serve.sys.modules, "opentelemetry.sdk.trace", None)
        monkeypatch.delitem(serve.sys.modules, "fastgen_jax.server.tracing", raising=False)
        with pytest.raises(ConfigError, match=r"opentelemetry.*fastgen-jax\[otel\]"):
            tracer_to("http://localhost:4318/v1/traces", "m")

    def test_what_is_no_url_is_refused(self):
        with pytest.raises(ConfigError, match="otlp_traces_endpoint must be a URL"):
            serve.parse(["--otlp-traces-endpoint", "localhost:4317"])
