"""HTTP/1.1 as benchmarks speak it, on asyncio's streams: a request on a connection of its own.

INVARIANT: the pieces of a body have ended only if it is whole; where it is cut, IncompleteReadError
or ConnectionError is raised, and ValueError, LookupError or LimitOverrunError for what is no HTTP.
"""

import asyncio
import contextlib
import socket
import ssl
import struct
import urllib.parse
from collections.abc import AsyncIterator, Mapping
from typing import NamedTuple

Address = tuple[str, int]
PIECE = 65536  # bytes that are taken at once where the body does not say how many come
NOTHING: Mapping[str, str] = {}


class Target(NamedTuple):
    """A server, and the path before those of its API."""

    address: Address
    path: str = ""
    context: ssl.SSLContext | None = None

    @classmethod
    def of(cls, url: str) -> "Target":
        """Raises ValueError for what is no http:// or https:// URL."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"expected a URL such as http://127.0.0.1:8000, got {url!r}")
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        context = ssl.create_default_context() if parts.scheme == "https" else None
        return cls((parts.hostname, port), parts.path.rstrip("/"), context)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Raises OSError."""
        return await asyncio.open_connection(*self.address, ssl=self.context)


def get(path: str, host: str = "localhost", headers: Mapping[str, str] = NOTHING) -> bytes:
    return _head("GET", path, {"Host": host, **headers})


def post(
    path: str,
    body: bytes,
    kind: str = "application/json",
    host: str = "localhost",
    headers: Mapping[str, str] = NOTHING,
) -> bytes:
    fields = {"Host": host, "Content-Type": kind, **headers, "Content-Length": str(len(body))}
    return _head("POST", path, fields) + body


def _head(method: str, path: str, fields: Mapping[str, str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def reset(writer: asyncio.StreamWriter) -> None:
    """Makes the close an RST."""
    connection: socket.socket = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers, whose names are lower case."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.rstrip().split("\r\n")
    pairs = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    return int(first.split()[1]), headers


async def read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """Pieces as they come. One without a length and without chunks goes on to the connection's end
    if the answer says that this is near.
    """
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass  # a trailer
    elif "content-length" in headers or headers.get("connection", "").lower() != "close":
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while piece := await reader.read(PIECE):
            yield piece
