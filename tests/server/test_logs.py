"""Who logs never waits for who reads, and is not silent about what was lost."""

import json
import logging
import os
import re
import threading
import time

import pytest

from fastgen_jax.server import logs, protocol
from tests.server.running import PATHS, serving, wait_until

NAMES = (
    "fastgen_jax", "uvicorn", "asyncio", "uvicorn.error", "opentelemetry.sdk",
    "opentelemetry.exporter",
)  # fmt: skip
log = logging.getLogger("fastgen_jax.server")


class Pipe:
    """A file whose reader may stall."""

    def __init__(self):
        self.read_fd, self.write_fd = os.pipe()
        self.received = b""
        self._reader = threading.Thread(target=self._read, daemon=True)

    def fill(self):
        """Leaves no room for a single byte."""
        os.set_blocking(self.write_fd, False)
        for size in (4096, 1):
            try:
                while True:
                    os.write(self.write_fd, b"." * size)
            except BlockingIOError:
                pass
        os.set_blocking(self.write_fd, True)

    def start_reading(self):
        self._reader.start()

    def _read(self):
        while data := os.read(self.read_fd, 65536):
            self.received += data

    @property
    def lines(self) -> list[str]:
        """What was logged, without times."""
        return [line[9:] for line in self.received.decode().lstrip(".").splitlines()]

    def close(self):
        os.close(self.write_fd)
        if self._reader.ident:
            self._reader.join(5)
        os.close(self.read_fd)


@pytest.fixture
def pipe():
    pipe = Pipe()
    yield pipe
    pipe.close()


@pytest.fixture
def handler(pipe, monkeypatch, request):
    """The real handler on the pipe, gone from the loggers afterwards; nothing was warned of yet."""
    monkeypatch.setattr(protocol, "_warned", set())
    monkeypatch.setattr(logging, "raiseExceptions", True)
    loggers = [logging.getLogger(name) for name in NAMES]
    before = [(lg, lg.level, lg.propagate, lg.handlers[:], lg.filters[:]) for lg in loggers]
    handler = logs.set_up_logging("info", getattr(request, "param", "text"), pipe.write_fd)
    yield handler
    handler.flush()
    for logger, level, propagate, handlers, filters in before:
        logger.level, logger.propagate = level, propagate
        logger.handlers, logger.filters = handlers, filters
        logger.manager._clear_cache()


class TestStalledReader:
    def test_nobody_waits_and_the_loss_is_told(self, pipe, handler):
        pipe.fill()
        for i in range(3 * logs.MAX_WAITING):  # each would wait for ever if it wrote
            log.info("line %d", i)
        assert handler.n_put - handler.n_written == logs.MAX_WAITING
        assert handler.n_dropped == 2 * logs.MAX_WAITING
        pipe.start_reading()
        wait_until(lambda: pipe.received.endswith(b"before\n"))
        *first, last = pipe.lines
        assert first == [f"line {i}" for i in range(logs.MAX_WAITING)]
        assert last.startswith(f"{2 * logs.MAX_WAITING} log lines were dropped")
        log.info("onwards")
        wait_until(lambda: pipe.lines[-1] == "onwards")
        assert handler.n_put == handler.n_written == logs.MAX_WAITING + 1

    def test_the_end_waits_for_the_reader_but_not_for_ever(self, pipe, handler, monkeypatch):
        monkeypatch.setattr(logs, "FLUSH_SECONDS", 0.05)
        pipe.fill()
        log.info("last words")
        started = time.monotonic()
        logs.flush()
        assert 0.05 <= time.monotonic() - started < 1
        assert handler.n_written == 0
        pipe.start_reading()
        monkeypatch.setattr(logs, "FLUSH_SECONDS", 5.0)
        logs.flush()
        assert handler.n_written == 1

    def test_a_file_that_does_not_block_loses_nothing(self, pipe, handler):
        pipe.fill()
        os.set_blocking(pipe.write_fd, False)
        log.info("x" * 200_000)
        pipe.start_reading()
        handler.flush()
        wait_until(lambda: pipe.lines == ["x" * 200_000])

    def test_a_closed_file_stops_nobody(self, pipe, handler):
        os.close(pipe.read_fd)
        log.info("unheard")
        handler.flush()
        assert handler.n_written == 1
        pipe.read_fd = os.open(os.devnull, os.O_RDONLY)


class TestWhatIsWritten:
    def test_tracebacks_survive_the_queue(self, pipe, handler):
        pipe.start_reading()
        try:
            raise KeyError("the cause")
        except KeyError as error:
            log.error("failed: %s", "why", exc_info=error)
        handler.flush()
        wait_until(lambda: b"KeyError: 'the cause'\n" in pipe.received)
        assert "failed: why" in pipe.lines
        assert b"Traceback" in pipe.received

    def test_what_cannot_be_encoded_is_shown_escaped(self, pipe, handler):
        pipe.start_reading()
        # Past pytest's own handler, whose report to another process would not be encoded either.
        handler.handle(logging.makeLogRecord({"msg": "lone \ud800"}))
        wait_until(lambda: pipe.lines == ["lone \\ud800"])

    def test_libraries_warn_in_the_same_file(self, pipe, handler):
        pipe.start_reading()
        logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
        logging.getLogger("asyncio").error("socket.accept() out of system resource")
        logging.getLogger("uvicorn.error").info("Started")
        logging.getLogger("uvicorn.error").error(
            "ASGI callable returned without completing response."
        )
        handler.flush()
        wait_until(lambda: len(pipe.lines) == 2)
        assert pipe.lines == [
            "Invalid HTTP request received.",
            "socket.accept() out of system resource",
        ]


@pytest.fixture
def lines(pipe, handler):
    """What a handler of JSON wrote, so far."""

    def read() -> list[dict]:
        handler.flush()
        return [json.loads(line) for line in pipe.received.decode("ascii").splitlines()]

    pipe.start_reading()
    return read


def wait_for_line(lines, message: str) -> dict:
    wait_until(lambda: any(message in line["message"] for line in lines()))
    return next(line for line in lines() if message in line["message"])


@pytest.mark.parametrize("handler", ["json"], indirect=True)
class TestJson:
    def test_a_line_is_an_object_whatever_is_in_it(self, lines, handler):
        text = 'end\nof "line"\r\u2028\x1b[31m \ud800 {"level": "forged"}'
        # Past pytest's own handler, whose report to another process would not be encoded either.
        handler.handle(logging.makeLogRecord({"msg": text, "levelname": "INFO", "name": "a.b"}))
        line = wait_for_line(lines, "end")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
        assert line == {"level": "info", "logger": "a.b", "message": text}

    def test_a_traceback_is_a_string(self, lines):
        try:
            raise KeyError("the cause")
        except KeyError as error:
            log.error("failed", exc_info=error)
        assert "KeyError: 'the cause'" in wait_for_line(lines, "failed")["traceback"]

    def test_repeats_and_losses_are_told_as_numbers(self, lines, monkeypatch):
        now = [100.0]
        monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
        for _ in range(3):
            log.warning("again")
        now[0] += 1.0
        log.warning("again")
        monkeypatch.undo()
        wait_until(lambda: len(lines()) == 2)
        assert [line.get("n_more") for line in lines()] == [None, 2]

    def test_a_request_has_a_line_with_its_id_and_tokens(self, lines, tokenizer):
        with serving(tokenizer, log_format="json") as up:
            body = PATHS["completions"] | {"max_tokens": 5, "said_once": 1}
            answer = up.post("/v1/completions", body, headers={"x-request-id": "abc-1"})
            line = wait_for_line(lines, "POST /v1/completions")
        usage = answer.json()["usage"]
        assert line.items() >= {
            "logger": "fastgen_jax.access", "level": "info", "request_id": "abc-1", "status": 200,
            "method": "POST", "path": "/v1/completions", "generated_tokens": 5,
            "prompt_tokens": usage["prompt_tokens"],
        }.items()  # fmt: skip
        assert line["seconds"] > 0
        assert len(line["engine_ids"]) == 1
        assert wait_for_line(lines, "'said_once'")["request_id"] == "abc-1"

    def test_a_long_text_that_is_read_in_a_thread_keeps_its_id(self, lines, tokenizer):
        with serving(tokenizer, log_format="json") as up:
            body = {"prompt": "a " * 2000, "read_late": 1}
            up.post("/v1/completions", body, headers={"x-request-id": "long"})
            assert wait_for_line(lines, "'read_late'")["request_id"] == "long"

    def test_a_failed_one_names_its_error_and_a_refusal_its_number(self, lines, tokenizer):
        with serving(tokenizer, log_format="json", api_key=("k",)) as up:
            for _ in range(20):
                assert up.post("/v1/completions", PATHS["completions"]).status_code == 401
            up.http.headers["authorization"] = "Bearer k"
            assert up.post("/v1/completions", {"prompt": 1.5}).status_code == 400
            assert wait_for_line(lines, "completions' 400")["status"] == 400
        refusals = [
            line for line in lines() if line["message"] == "refused with 401 invalid_api_key"
        ]
        assert refusals[0]["error"] == "invalid_api_key"
        assert len(refusals) < 20

    def test_health_and_metrics_are_no_news(self, lines, tokenizer):
        with serving(tokenizer, log_format="json") as up:
            up.get("/metrics")
            up.get("/health")
            up.post("/nowhere", {})
            wait_for_line(lines, "/nowhere")
        assert not [line for line in lines() if line.get("method") == "GET"]


class TestText:
    def test_a_line_names_the_request_that_it_is_about(self, pipe, handler, tokenizer):
        pipe.start_reading()
        with serving(tokenizer) as up:
            body = PATHS["completions"] | {"told_in_text": 1}
            up.post("/v1/completions", body, headers={"x-request-id": "abc-2"})
            wait_until(lambda: any(line.endswith("[request abc-2]") for line in pipe.lines))
            assert not any("POST" in line for line in pipe.lines)


class TestRepeats:
    def test_a_kind_of_warning_is_told_once_a_second_with_its_number(
        self, pipe, handler, monkeypatch
    ):
        pipe.start_reading()
        now = [100.0]
        monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
        for name in ("a", "b", "c"):
            log.warning("field %r is unknown", name)
            log.warning("another kind")
        now[0] += 1.0
        log.warning("field %r is unknown", "d")
        now[0] += 1.0
        log.warning("field %r is unknown", "e")
        monkeypatch.undo()
        wait_until(lambda: len(pipe.lines) == 4)
        assert pipe.lines == [
            "field 'a' is unknown", "another kind", "field 'd' is unknown (and 2 more)",
            "field 'e' is unknown",
        ]  # fmt: skip

    def test_errors_and_reports_are_never_held_back(self, pipe, handler):
        pipe.start_reading()
        for i in range(3):
            log.error("our fault %d", i)
            log.info("report %d", i)
        wait_until(lambda: len(pipe.lines) == 6)

    def test_few_kinds_are_remembered(self):
        repeats = logs.Repeats()
        for i in range(3 * logs.MAX_KINDS):
            record = logging.makeLogRecord({"msg": f"kind {i}", "levelno": logging.WARNING})
            assert repeats.count(record) == 0
            assert len(repeats._kinds) <= logs.MAX_KINDS
