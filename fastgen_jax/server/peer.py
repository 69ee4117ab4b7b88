"""Whether the far end of a connection takes what is sent to it."""

import asyncio
import logging
import socket
import struct
import sys
from collections.abc import Callable

log = logging.getLogger("fastgen_jax.server")

LOOKS = 4  # per timeout; a peer that takes nothing is reset after 1 to 1 + 2 / LOOKS timeouts
MIN_PERIOD = 0.01  # seconds between looks
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing drops what is unsent and resets
N_ACKED = (120, 128)  # where Linux's struct tcp_info has tcpi_bytes_acked


class UnreadTimer:
    """Resets a connection that has unsent bytes of which the peer took none for `timeout` seconds.

    One that reads slowly but steadily is left alone: what counts is that bytes move.

    INVARIANT: where start() comes before each write, or `may_write` is true, a timer runs while
    bytes are unsent, also on a closing transport.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        timeout: float,
        may_write: Callable[[], bool],
    ):
        self.transport = transport
        self.loop = loop
        self.timeout = timeout
        self.may_write = may_write
        self._timer: asyncio.TimerHandle | None = None
        self._since = self._n_acked = self._n_unsent = 0

    def start(self):
        """Does nothing if it runs."""
        if self._timer is None:
            self._since = self.loop.time()
            self._look_later()

    def stop(self):
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_later(self):
        self._timer = self.loop.call_later(max(MIN_PERIOD, self.timeout / LOOKS), self._look)

    def _look(self):
        now, n_unsent = self.loop.time(), self.transport.get_write_buffer_size()
        if self._has_moved(n_unsent):
            self._since = now
        if n_unsent and now - self._since >= self.timeout:
            log.warning("a client left its answer unread; its connection is reset")
            reset(self.transport)
        elif n_unsent or self.may_write():
            self._look_later()
        else:
            self._timer = None

    def _has_moved(self, n_unsent: int) -> bool:
        """Into the peer's kernel or ours, which when full takes nothing until a third is free."""
        n_acked = _count_acked(self.transport)
        moved = not n_unsent or n_acked > self._n_acked or n_unsent < self._n_unsent
        self._n_acked, self._n_unsent = n_acked, n_unsent
        return moved


def reset(transport: asyncio.Transport):
    """Ends the connection at once; the kernel keeps nothing of it."""
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    transport.abort()


def _count_acked(transport: asyncio.Transport) -> int:
    """The bytes that the peer's kernel has taken, where the system tells, as it does of TCP."""
    connection = transport.get_extra_info("socket")
    if sys.platform != "linux" or connection is None or connection.fileno() < 0:
        return 0
    if connection.family == socket.AF_UNIX:
        return 0
    status = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, N_ACKED[1])
    return int.from_bytes(status[slice(*N_ACKED)], sys.byteorder)
