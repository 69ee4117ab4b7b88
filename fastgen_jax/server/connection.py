"""uvicorn's connection, with limits on headers and a way to reset one that does not read."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fastgen_jax.server.stream import ABORT_EXTENSION

MAX_HEADER_BYTES = 64 * 1024
MAX_HEADERS = 100
HEADER_TIMEOUT = 10.0  # seconds from a request's first byte to the end of its headers


class Connection(HttpToolsProtocol):
    """INVARIANT: while headers are incomplete, a timer runs that closes the connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._n_header_bytes = 0
        self._in_headers = True
        self._header_timer = self.loop.call_later(HEADER_TIMEOUT, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._header_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        was_in_headers = self._in_headers
        super().data_received(data)
        if was_in_headers and self._in_headers:
            self._n_header_bytes += len(data)
            self._check_headers(self._n_header_bytes)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        extensions: dict[Any, Any] = {ABORT_EXTENSION: self.transport.abort}
        self.scope["extensions"] = extensions
        self._in_headers = True
        self._n_header_bytes = 0
        self._header_timer.cancel()
        self._header_timer = self.loop.call_later(HEADER_TIMEOUT, self.transport.abort)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._header_timer.cancel()
        n_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if not self._check_headers(n_bytes):
            return
        super().on_headers_complete()

    def _check_headers(self, n_bytes: int) -> bool:
        """Answers 431 and closes if the headers are too large."""
        if n_bytes <= MAX_HEADER_BYTES and len(self.headers or ()) <= MAX_HEADERS:
            return True
        if not self.transport.is_closing():
            head = b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
            self.transport.write(head + b"connection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()
        return False
