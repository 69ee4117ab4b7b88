"""Logs that hold nobody up: lines wait in a bounded queue for the one thread that writes them.

A terminal that is paused or a pipe that nobody reads stops its writer; that must be neither the
event loop nor the engine, and clients must not be able to fill a disk with their warnings.
"""

import datetime
import json
import logging
import math
import os
import queue
import select
import threading
import time
from typing import Any

from fastgen_jax.server import origin

log = logging.getLogger("fastgen_jax.server")

STDERR = 2  # itself: a thread stuck in sys.stderr would hold a lock that the exit of Python needs
MAX_WAITING = 1000  # lines
MAX_KINDS = 1000  # of warnings that are remembered
REPEAT_SECONDS = 1.0
FLUSH_SECONDS = 1.0


def set_up_logging(level: str, format: str = "text", fd: int = STDERR) -> "LineQueue":
    """Our log, and the warnings of what we run on, in one file; the root logger is the user's."""
    logging.raiseExceptions = False  # a closed stderr must not stop the service
    handler = LineQueue(fd)
    handler.setFormatter(JsonLines() if format == "json" else TextLines())
    levels = {
        "fastgen_jax": level.upper(), "uvicorn": "WARNING", "asyncio": "WARNING",
        "opentelemetry.sdk": "WARNING",
        "opentelemetry.exporter": "CRITICAL",  # of each try that fails; tracing tells of the first
    }  # fmt: skip
    for name, least in levels.items():
        logger = logging.getLogger(name)
        logger.setLevel(least)
        logger.addHandler(handler)
        logger.propagate = False
    logging.getLogger("uvicorn.error").addFilter(_is_not_about_cut_streams)
    return handler


class TextLines(logging.Formatter):
    """For people: the time of day, the message, and whose request it is about."""

    def __init__(self):
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        n_more, request_id = getattr(record, "n_more", 0), origin.request_id()
        line = super().formatMessage(record)
        line += f" [request {request_id}]" if request_id else ""
        return line + (f" (and {n_more} more)" if n_more else "")


class JsonLines(logging.Formatter):
    """For machines: one object a line. What others have chosen, a path or a name, is escaped to
    ASCII, so that no line ends but ours. `n_more` counts warnings of the kind that were held back.
    """

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        shown: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": origin.request_id(),
            "n_more": getattr(record, "n_more", 0),
            "traceback": self.formatException(record.exc_info) if record.exc_info else "",
        }
        shown = {name: value for name, value in shown.items() if value}
        return json.dumps(shown | getattr(record, "fields", {}), default=repr)


def fatal(cause: str, remedy: str) -> bool:
    """Says why the process ends, if the log is for machines; False: people wait for the words."""
    handlers = logging.getLogger("fastgen_jax").handlers
    if not any(isinstance(handler.formatter, JsonLines) for handler in handlers):
        return False
    log.critical(cause, extra={"fields": {"fix": remedy}})
    flush()
    return True


def open_standard_files():
    """Opens those of descriptors 0 to 2 that the parent has closed: else the next file or socket
    that is opened gets the number, and the log's lines.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        os.set_inheritable(fd, True)
    os.close(fd)


def flush():
    """Waits, FLUSH_SECONDS at most, until what was logged is written."""
    for handler in logging.getLogger("fastgen_jax").handlers:
        handler.flush()


def _is_not_about_cut_streams(record: logging.LogRecord) -> bool:
    """A stream that ends in an error event is cut on purpose."""
    return "without completing response" not in record.getMessage()


class LineQueue(logging.Handler):
    """Formats records where they are logged; a daemon thread writes the lines to a file.

    INVARIANT: n_written <= n_put <= n_written + MAX_WAITING. Each of these is written by one side
    alone: n_put and n_dropped by who logs, under the handler's lock; n_written by the thread.
    """

    def __init__(self, fd: int):
        super().__init__()
        self.n_put = self.n_written = self.n_dropped = 0
        self._fd = fd
        self._repeats = Repeats()
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._write_all, name="fastgen-log", daemon=True).start()

    def emit(self, record: logging.LogRecord):
        """Queues the record's line, or drops and counts it; waits for nothing."""
        if self.n_put - self.n_written >= MAX_WAITING:
            self.n_dropped += 1
            return
        n_more = self._repeats.count(record)
        if n_more is not None:
            record.__dict__["n_more"] = n_more
            line = self.format(record)
            self.n_put += 1
            self._lines.put(line)

    def flush(self):
        """Waits, FLUSH_SECONDS at most, until what was logged is written; takes no lock."""
        n_put, deadline = self.n_put, time.monotonic() + FLUSH_SECONDS
        while self.n_written < n_put and time.monotonic() < deadline:
            time.sleep(0.005)

    def _write_all(self):
        n_told = 0
        while True:
            self._write(self._lines.get())
            n_dropped = self.n_dropped
            if n_dropped > n_told and self._lines.empty():
                self._write(self._told(n_dropped - n_told))
                n_told = n_dropped
            self.n_written += 1

    def _told(self, n_dropped: int) -> str:
        message = f"{n_dropped} log lines were dropped, because nobody read those before"
        return self.format(logging.makeLogRecord({"msg": message}))

    def _write(self, line: str):
        rest = line.encode(errors="backslashreplace") + b"\n"
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:
                select.select([], [self._fd], [])
            except OSError:  # closed: nobody is there to be told
                return


class Repeats:
    """Lets each kind of warning through once in REPEAT_SECONDS; a kind is what one line of code
    logs. Errors are our own faults: all of them pass, as does what is no warning.

    INVARIANT: remembers MAX_KINDS kinds at most.
    """

    def __init__(self):
        self._kinds: dict[tuple[str, str], tuple[float, int]] = {}  # time of the last, n since

    def count(self, record: logging.LogRecord) -> int | None:
        """How many like the record were held back since the last; None: it is held back too."""
        if record.levelno != logging.WARNING:
            return 0
        kind, now = (record.name, str(record.msg)), time.monotonic()
        last, n_more = self._kinds.get(kind, (-math.inf, 0))
        if now - last < REPEAT_SECONDS:
            self._kinds[kind] = last, n_more + 1
            return None
        if len(self._kinds) >= MAX_KINDS:
            self._kinds.clear()
        self._kinds[kind] = now, 0
        return n_more
