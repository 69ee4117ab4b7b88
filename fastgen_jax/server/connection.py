"""One connection: uvicorn's, made to hold under attack.

uvicorn runs the requests and writes their answers. Here is what it lacks: a limit in time and bytes
for every state, framing that cannot be argued about, and an end that tells the client why.
"""

import asyncio
import enum
import math
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from fastgen_jax.server import framing, stream
from fastgen_jax.server.capacity import SPARE, Capacity
from fastgen_jax.server.errors import ApiError, unavailable
from fastgen_jax.server.peer import UnreadTimer, reset

MAX_PIPELINED = 64  # requests that wait behind the one that is being answered
KEEP_ALIVE = 75.0  # seconds; clients drop idle connections after 5 to 60, and they must be first
HEADER_TIMEOUT = 10.0  # seconds from a request's first byte to the end of its headers
BODY_TIMEOUT = stream.BODY_TIMEOUT + 5  # the route's own answer (408) comes first
LINGER = 1.0  # seconds for a refused client to read why and to close
PROBE_FIRST = 0.02  # seconds between the first two probes; each next waits twice as long
PROBE_EVERY = 1.0  # until this
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Receiving(enum.Enum):
    """What the next bytes belong to."""

    NEXT = "no request has begun"
    HEAD = "a request line or headers"
    BODY = "a body or its trailers"
    NOTHING = "the client's side has ended, or was refused"


class Connection(HttpToolsProtocol):
    """INVARIANT: a connection that is not closing is answering a request that came whole, which
    the request's own limits end, or has a deadline, which only its progress moves, and a timer not
    after it. While it has unsent bytes, closing or not, UnreadTimer runs.

    Args:
        refuse: what a request, given its scope, is answered at once; None if it may run.
        unread_timeout: seconds after which a client that reads nothing is reset.
        capacity: shared by all connections.
    """

    def __init__(
        self,
        *args: Any,
        refuse: Callable[[Any], ApiError | None],
        unread_timeout: float,
        capacity: Capacity,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.refuse = refuse
        self.unread_timeout = unread_timeout
        self.capacity = capacity
        self.receiving = Receiving.NEXT
        self._running: RequestResponseCycle | None = None
        self._refusal: ApiError | None = None  # said after the answers that are due
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = math.inf  # of the client's next progress
        self._n_idle_bytes = 0  # since the last byte of a body or the end of a head
        self._n_fields = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._unread_timer = UnreadTimer(
            transport, self.loop, self.unread_timeout, lambda: self._is_busy
        )
        self.capacity.n_open += 1
        if self.capacity.make_room():
            self._enter(Receiving.NEXT)
        elif self.capacity.n_open > self.capacity.max_connections + SPARE:
            reset(transport)
        else:
            self._end(unavailable("too many connections", "too_many_connections", 1, close=True))

    def connection_lost(self, exc: Exception | None) -> None:
        self.capacity.n_open -= 1
        self.capacity.waiting.pop(self.transport, None)
        self._stop_timer()
        self._unread_timer.stop()
        for cycle in (self._running, *(cycle for cycle, _ in self.pipeline)):
            _disconnect(cycle)
        super().connection_lost(exc)

    # Receiving. A callback of the parser that raises ends the parsing, and data_received refuses.

    def data_received(self, data: bytes) -> None:
        if self.receiving is Receiving.NOTHING:
            return
        self._n_idle_bytes += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            if self.receiving is Receiving.NOTHING:
                return
            self.logger.warning("Invalid HTTP request received.")
            cause = error.__context__
            self._end(cause if isinstance(cause, ApiError) else framing.malformed())
            return
        in_request = self.receiving in (Receiving.HEAD, Receiving.BODY)
        if in_request and self._n_idle_bytes > framing.MAX_HEADER_BYTES:
            self._end(framing.too_large())

    def eof_received(self) -> bool:
        """A client may end its side and still read the answers to what came whole."""
        if not self._is_answering:
            return False
        if self.receiving is not Receiving.NOTHING:
            self._end(None)
        self._probe(PROBE_FIRST)
        return True

    def _parse(self, data: bytes):
        """Feeds the parser, to which an Upgrade is the end of HTTP. It is not here: the head is
        parsed again without it, and what follows is the body that the other fields announce.
        """
        while True:
            try:
                return self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = framing.without_upgrade(*self._head()) + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def _head(self) -> tuple[bytes, str, bytes, framing.Headers]:
        return self.parser.get_method(), self.parser.get_http_version(), self.url, self.headers

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._n_fields = 0
        self._enter(Receiving.HEAD)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._n_fields += 1
        if self._n_fields > framing.MAX_HEADERS:
            raise framing.too_large()
        if self.receiving is Receiving.HEAD:  # else a trailer, which nobody asked for
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        framing.check_head(*self._head())
        if self.parser.should_upgrade():
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            raise unavailable("too many pipelined requests", "too_many_requests", 1)
        super().on_headers_complete()
        if self._refusal is not None:  # said already; what follows the head is nobody's
            raise self._refusal
        self.flow.resume_reading()  # though it waits its turn: who leaves meanwhile must be seen
        if self.scope["http_version"] == "1.0":
            self.cycle.send = framing.CloseDelimited(self.cycle).send
        self._n_idle_bytes = 0
        self._enter(Receiving.BODY)

    def on_body(self, body: bytes) -> None:
        self._n_idle_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._n_idle_bytes = 0
        self._enter(Receiving.NEXT)

    # Answering.

    @property
    def _is_busy(self) -> bool:
        """Whether an answer is under way or to come."""
        cycle = self._running
        return not (cycle is None or cycle.response_complete or cycle.disconnected)

    @property
    def _is_answering(self) -> bool:
        """Whether it is one to a request that came whole."""
        is_early = self.receiving is Receiving.BODY and self._running is self.cycle
        return self._is_busy and not is_early

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        self._unread_timer.start()
        refusal = self.refuse(cycle.scope)
        if refusal is None:
            super()._start_asgi_task(cycle, app)
        else:
            self._answer(cycle, refusal)

    def _answer(self, cycle: RequestResponseCycle, refusal: ApiError):
        """Answers in one write and without a task, which would cost more than the rest."""
        cycle.response_complete = True
        if not cycle.keep_alive or refusal.headers.get("connection") == "close":
            self._end(refusal)
            return
        cycle.response_started = True
        headers, has_body = self.server_state.default_headers, cycle.scope["method"] != "HEAD"
        self.transport.write(framing.answer(refusal, headers, is_last=False, has_body=has_body))
        self.on_response_complete()

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self.receiving is Receiving.NOTHING:
            self._close()
        else:
            self.flow.resume_reading()
        self._restart_timer()

    # Time.

    def _enter(self, receiving: Receiving):
        self.receiving = receiving
        self._restart_timer()

    def _restart_timer(self):
        """Moves the deadline. The timer follows when it fires too early: most are never reached,
        and a new timer at each step of each request costs more than the steps.
        """
        self.capacity.waiting.pop(self.transport, None)
        self._deadline = math.inf
        if self._is_answering or self.transport.is_closing():
            return
        if self.receiving is Receiving.NEXT:
            self.capacity.waiting[self.transport] = None
        self._deadline = self.loop.time() + self._timeout()
        if self._timer is None or self._timer.when() > self._deadline:
            self._start_timer()

    def _start_timer(self):
        self._stop_timer()
        self._timer = self.loop.call_at(self._deadline, self._on_timer)

    def _stop_timer(self):
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timer(self):
        self._timer = None
        if self.loop.time() >= self._deadline:
            self.transport.close()
        elif self._deadline < math.inf:
            self._start_timer()

    def _timeout(self) -> float:
        """Seconds that the client has to get on."""
        match self.receiving:
            case Receiving.NEXT:
                return HEADER_TIMEOUT if self.cycle is None else KEEP_ALIVE
            case Receiving.HEAD:
                return HEADER_TIMEOUT
            case Receiving.BODY:
                return BODY_TIMEOUT
            case Receiving.NOTHING:
                return LINGER

    # Ending.

    def _end(self, refusal: ApiError | None):
        """Takes no more: the requests that came whole are answered, then comes the refusal."""
        if self.receiving is Receiving.BODY:
            if self.cycle.response_started:  # one request gets no second answer
                refusal = None
            self._withdraw()
        self._refusal = refusal
        self.receiving = Receiving.NOTHING
        if not self._is_answering:
            self._close()
        self._restart_timer()

    def refuse_unfinished(self, refusal: ApiError):
        """Ends the request whose body is still under way; an answer under way goes on."""
        if self.receiving is Receiving.BODY:
            self._end(refusal)

    def cut(self):
        """Ends the answer under way: its client does not read it."""
        if self._is_busy:
            reset(self.transport)

    def _withdraw(self):
        """Ends the request that will not come whole."""
        self.cycle.waiting_for_100_continue = False
        _disconnect(self.cycle)
        if self.pipeline and self.pipeline[0][0] is self.cycle:
            self.pipeline.popleft()

    def _close(self):
        """Says the refusal, if there is one, and waits a little for the client to close first:
        a close with bytes unread would reset the connection and take the refusal with it.
        """
        if self._refusal is None:
            self.transport.close()
            return
        self.flow.resume_reading()
        self._unread_timer.start()
        headers = self.server_state.default_headers
        self.transport.write(framing.answer(self._refusal, headers, is_last=True))
        self.transport.write_eof()

    def _probe(self, delay: float):
        """A client that has left and one that only ended its side look the same, until something
        is sent: the former answers with a reset. An interim response, which may come at any time
        (RFC 9110, 15.2), is such a thing; a stream's events are too.
        """
        cycle = self._running
        if self.transport.is_closing() or cycle is None or not self._is_answering:
            return
        is_silent = not cycle.response_started and cycle.scope["http_version"] == "1.1"
        if is_silent and not self.transport.get_write_buffer_size():
            self.transport.write(CONTINUE)
        self.loop.call_later(delay, self._probe, min(2 * delay, PROBE_EVERY))


def _disconnect(cycle: RequestResponseCycle | None):
    """Makes the request's task see that its client is gone."""
    if cycle is not None and not cycle.response_complete:
        cycle.disconnected = True
        cycle.message_event.set()
