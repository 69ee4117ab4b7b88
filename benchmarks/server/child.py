"""The server under test, in a process of its own, and what the system and it say about it."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

START_TIMEOUT = 300.0  # seconds; compiling included
STOP_TIMEOUT = 40.0
ROOT = Path(__file__).parents[2]


class Footprint(NamedTuple):
    """What a process holds."""

    n_bytes: int  # anonymous memory, swapped out or not: files' pages come and go
    n_files: int
    n_threads: int


NOTHING = Footprint(0, 0, 0)


class Child:
    """A running server that is ready, and stopped at the end of a `with` block.

    Args:
        flags: of fastgen_jax.serve, but for the port.
        is_leaky: whether each request leaves something behind.
        module: what runs the server; a worker takes orders too.
    """

    def __init__(
        self,
        flags: Sequence[str],
        *,
        is_leaky: bool = False,
        module: str = "benchmarks.server.faulty_worker",
    ):
        self._folder = tempfile.TemporaryDirectory(prefix="fastgen-soak-")
        self.log = Path(self._folder.name) / "log"
        self.address = ("127.0.0.1", free_port())
        port = ["--port", str(self.address[1])]
        command = [sys.executable, "-m", module]
        flags = ["--compile", "all", *flags]  # what is measured is a server that has settled
        self._process = subprocess.Popen(
            [*command, *(["--leak"] if is_leaky else []), *port, *flags],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"),
            text=True,
        )  # fmt: skip

    def __enter__(self) -> "Child":
        try:
            self._wait_until_ready()
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """SIGTERM, and no mercy after STOP_TIMEOUT."""
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while self.get("/health")[0] != 200:
            if self.exit_code is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{self.last_words()}")
            time.sleep(0.1)

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def get(self, path: str) -> tuple[int, str]:
        """Status, 0 where nobody listens, and body."""
        url = f"http://{self.address[0]}:{self.address[1]}{path}"
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, ""
        except OSError:
            return 0, ""

    def metrics(self) -> dict[str, float]:
        """Values by name; finished samples as finished_REASON."""
        _, text = self.get("/metrics")
        found = re.findall(r'^fastgen:(\w+)\{[^}]*?(?:reason="(\w+)"[^}]*)?\} (\S+)$', text, re.M)
        return {(f"finished_{reason}" if reason else name): float(v) for name, reason, v in found}

    def order(self, command: str) -> None:
        """A fault, which happens soon after. A child that has died takes no orders."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()

    def faults(self) -> dict[str, int]:
        """How many of each kind have happened."""
        assert self._process.stdout is not None
        self.order("report")
        return json.loads(self._process.stdout.readline() or "{}")

    def event_loop_seconds(self) -> float:
        """CPU time of its first thread, which runs the event loop."""
        pid = self._process.pid
        fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def footprint(self) -> Footprint:
        """NOTHING once the process is gone."""
        folder = Path(f"/proc/{self._process.pid}")
        try:
            status = (folder / "status").read_text()
            n_files = len(os.listdir(folder / "fd"))
        except OSError:
            return NOTHING
        fields = dict(line.split(":", 1) for line in status.splitlines())
        n_kib = sum(int(fields.get(name, "0").split()[0]) for name in ("RssAnon", "VmSwap"))
        return Footprint(n_kib * 1024, n_files, int(fields["Threads"]))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
