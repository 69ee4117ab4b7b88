"""TLS between a socket's transport and a protocol that need not know of it; OpenSSL does the work.

asyncio's own layer tells its protocol of a connection only after the handshake, hides bytes that
it has not sent, and cannot end one side alone. Here the protocol has the connection from its first
byte, so that all its limits hold for the handshake too, and the transport keeps no bytes back.
"""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable
from typing import Any

from fastgen_jax.server import framing
from fastgen_jax.server.errors import ApiError

log = logging.getLogger("fastgen_jax.server")

MAX_PIECE = 65536  # bytes that the protocol gets at once
MAX_SILENT = 65536  # bytes received without one for the protocol: a handshake has less


class TlsTransport(asyncio.Transport):
    """What the protocol writes to: `raw`, encrypted.

    INVARIANT: what is written before the handshake has ended waits in `_early`, and its end in
    `_ends_early`; later all is handed to `raw` at once.
    """

    def __init__(self, raw: asyncio.Transport, context: ssl.SSLContext):
        super().__init__()
        self.raw = raw
        self.context = context
        self.incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, outgoing, server_side=True)
        self.is_shaken = self.is_ended = self._ends_early = False
        self._outgoing = outgoing
        self._early = bytearray()

    def shake(self):
        """Goes on with the handshake. Raises ssl.SSLWantReadError until it has ended."""
        try:
            self.tls.do_handshake()
        finally:
            self.flush()
        self.is_shaken = True
        if self._early:
            self.write(self._early)
        if self._ends_early:
            self.write_eof()

    def flush(self):
        """Sends what OpenSSL has to say."""
        if self._outgoing.pending and not self.is_ended and not self.raw.is_closing():
            self.raw.write(self._outgoing.read())

    def write(self, data: Any):
        if not self.is_shaken:
            self._early += data
        elif data and not self.is_ended and not self.raw.is_closing():
            self.tls.write(data)
            self.flush()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self):
        """Ends our side after what was written; the other side goes on."""
        if not self.is_shaken:
            self._ends_early = True
            return
        self._say_goodbye()
        self.is_ended = True
        self.raw.write_eof()

    def _say_goodbye(self):
        with contextlib.suppress(ssl.SSLError):  # the other side's is not here, and need not be
            self.tls.unwrap()
        self.flush()

    def close(self):
        if self.is_shaken and not self.is_ended and not self.raw.is_closing():
            self._say_goodbye()
        self.raw.close()

    def abort(self):
        self.raw.abort()

    def is_closing(self) -> bool:
        return self.raw.is_closing()

    def pause_reading(self):
        self.raw.pause_reading()

    def resume_reading(self):
        self.raw.resume_reading()

    def is_reading(self) -> bool:
        return self.raw.is_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None):
        self.raw.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        return self.raw.get_write_buffer_size() + (0 if self.is_shaken else len(self._early))

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        own = {"sslcontext": self.context, "ssl_object": self.tls}
        return own[name] if name in own else self.raw.get_extra_info(name, default)


class TlsProtocol(asyncio.Protocol):
    """What the socket's transport calls: `inner` behind TLS.

    Args:
        inner: gets the connection before the handshake, and must bound its time.
        context: asked for each connection.
    """

    def __init__(self, inner: asyncio.Protocol, context: Callable[[], ssl.SSLContext]):
        self.inner = inner
        self._context = context
        self._has_ended = self._stays_open = False
        self._n_silent = 0

    def connection_made(self, transport: asyncio.Transport):  # type: ignore[override]
        self.transport = TlsTransport(transport, self._context())
        self.inner.connection_made(self.transport)

    def connection_lost(self, exc: Exception | None):
        self.inner.connection_lost(exc)

    def pause_writing(self):
        self.inner.pause_writing()

    def resume_writing(self):
        self.inner.resume_writing()

    def data_received(self, data: bytes):
        transport = self.transport
        if self._has_ended or transport.is_ended:  # what follows a goodbye is nobody's
            return
        transport.incoming.write(data)
        self._n_silent += len(data)
        try:
            if not transport.is_shaken:
                transport.shake()
            while not (transport.is_ended or transport.is_closing()) and self._pass_on():
                pass
        except ssl.SSLWantReadError:
            if self._n_silent > MAX_SILENT:
                transport.abort()
        except ssl.SSLError as error:
            self._fail(error)
        transport.flush()

    def _pass_on(self) -> bool:
        """Whether there was something for the protocol."""
        try:
            piece = self.transport.tls.read(MAX_PIECE)
        except ssl.SSLZeroReturnError:
            piece = b""
        if piece:
            self._n_silent = 0
            self.inner.data_received(piece)
        elif not self.eof_received():
            self.transport.close()
        return bool(piece)

    def eof_received(self) -> bool:
        """Of TLS or, with or without that, of the connection: HTTP tells what was cut."""
        if not self._has_ended:
            self._has_ended = True
            self._stays_open = bool(self.inner.eof_received())
        return self._stays_open

    def _fail(self, error: ssl.SSLError):
        log.debug("TLS ended: %s", error.reason)
        self.transport.flush()  # the alert that says why
        if error.reason == "HTTP_REQUEST":
            refusal = ApiError(400, "this port speaks HTTPS; use https://", code="https_only")
            self.transport.raw.write(framing.answer(refusal, (), is_last=True))
        self.transport.raw.close()
