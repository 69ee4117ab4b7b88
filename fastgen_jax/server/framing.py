"""Where a request's head may end and an answer does: limits, and nothing that two can read in two
ways (RFC 9112).
"""

import re
from collections.abc import Iterable
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from fastgen_jax.server.errors import ApiError

MAX_HEADER_BYTES = 64 * 1024  # of a head, and between two pieces of a body
MAX_HEADERS = 100  # fields of one request, trailers included

AUTHORITY = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)")  # of a target in absolute form

Headers = list[tuple[bytes, bytes]]


def check_head(method: bytes, version: str, url: bytes, headers: Headers):
    """Raises ApiError for a head whose size or framing is refused; names are in lower case."""
    if len(url) + sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        raise too_large()
    if version not in ("1.0", "1.1"):
        raise ApiError(505, f"HTTP/{version} is not spoken here; use HTTP/1.1")
    if method == b"CONNECT":
        raise ApiError(405, "this server is not a proxy: no CONNECT")
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        raise ApiError(400, "a request needs one Host header, and only one")
    named = AUTHORITY.match(url)
    if not url.startswith((b"/", b"*")) and (named is None or named[1] not in hosts):
        raise ApiError(400, "the request's target and its Host header name different hosts")
    codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    if codings not in ([], [b"chunked"]) or (codings and version == "1.0"):
        raise ApiError(400, "the only Transfer-Encoding is chunked, in HTTP/1.1")


def without_upgrade(method: bytes, version: str, url: bytes, headers: Headers) -> bytes:
    """The bytes of the same head as if the client had not offered to upgrade."""
    lines = [method + b" " + url + b" HTTP/" + version.encode()]
    lines += [name + b": " + value for name, value in headers if name != b"upgrade"]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def malformed() -> ApiError:
    return ApiError(400, "this is not a valid HTTP request", code="bad_http")


def too_large() -> ApiError:
    message = f"headers and trailers may have {MAX_HEADER_BYTES} bytes and {MAX_HEADERS} fields"
    return ApiError(431, message, code="headers_too_large")


def answer(
    error: ApiError, headers: Iterable[tuple[bytes, bytes]], *, is_last: bool, has_body: bool = True
) -> bytes:
    """The bytes of a response, which is the connection's last or not, to HEAD without its body."""
    body = error.body()
    fields = {"content-type": "application/json", "content-length": str(len(body))} | error.headers
    if is_last:
        fields["connection"] = "close"
    lines = [name + b": " + value for name, value in headers]
    lines += [f"{name}: {value}".encode() for name, value in fields.items()]
    head = STATUS_LINE[error.status] + b"\r\n".join(lines) + b"\r\n\r\n"
    return head + body if has_body else head


class CloseDelimited:
    """Sends the answer to a client of HTTP/1.0, which knows no chunks: where the answer does not
    say its length, its end is the connection's.
    """

    def __init__(self, cycle: RequestResponseCycle):
        self.cycle = cycle
        self.has_length = True
        self._send = cycle.send

    async def send(self, message: Any):
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", ())}
            self.has_length = b"content-length" in names
            if not self.has_length:
                self.cycle.chunked_encoding = False
        elif not self.has_length:
            self.cycle.expected_content_length = len(message.get("body", b""))
        await self._send(message)
