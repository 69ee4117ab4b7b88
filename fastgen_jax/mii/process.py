"""Process: a process of this machine that is never taken for a later one of the same id."""

import contextlib
import os
import select
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

KILL_SECONDS = 10.0  # that the kernel may take to end a process


class _Stat(NamedTuple):
    state: str
    start_time: int


@dataclass(frozen=True)
class Process:
    """start_time: in ticks of the kernel's clock since the machine was started."""

    pid: int
    start_time: int

    @classmethod
    def started(cls, pid: int) -> "Process":
        """A child that was started just now; one that has ended, and is gone, is not running."""
        stat = _stat(pid)
        return cls(pid, -1 if stat is None else stat.start_time)

    @property
    def is_running(self) -> bool:
        stat = _stat(self.pid)
        if stat is None or stat.start_time != self.start_time:
            return False
        if stat.state in "ZX":  # it has ended: if it is our child, the kernel waits for us
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, os.WNOHANG)
            return False
        return True

    def stop(self, seconds: float) -> None:
        """Asks it to end, gives it so many seconds, then kills it; returns once it is gone.

        Raises:
            PermissionError: it is another user's.
        """
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if self.is_running:  # from here on fd is this process, whoever may get its id
                _end(fd, seconds)
            _ = self.is_running  # which waits for a child
        finally:
            os.close(fd)


def _end(fd: int, seconds: float) -> None:
    for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, KILL_SECONDS)):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, number)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if poll.poll(patience * 1000):
            return


def _stat(pid: int) -> _Stat | None:
    """See proc(5); a name in parentheses, which may hold anything, comes before what is read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()
    return _Stat(state=fields[0], start_time=int(fields[19]))
