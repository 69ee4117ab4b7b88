"""Who logs never waits for who reads, and is not silent about what was lost."""

import logging
import os
import threading
import time

import pytest

from fastgen_jax.server import logs
from tests.server.running import wait_until

NAMES = ("fastgen_jax", "uvicorn", "asyncio", "uvicorn.error")
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
def handler(pipe, monkeypatch):
    """The real handler on the pipe, gone from the loggers afterwards."""
    monkeypatch.setattr(logging, "raiseExceptions", True)
    loggers = [logging.getLogger(name) for name in NAMES]
    before = [(lg, lg.level, lg.propagate, lg.handlers[:], lg.filters[:]) for lg in loggers]
    handler = logs.set_up_logging("info", pipe.write_fd)
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
