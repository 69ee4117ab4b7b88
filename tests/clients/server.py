"""The server that tools are pointed at: the command line that users type, with the demo model."""

import contextlib
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.clients.environments import ROOT

START_TIMEOUT = 300.0  # seconds; compiling included
STOP_TIMEOUT = 40.0
FLAGS = ["--port", "0", "--allowed-origin", "http://localhost:3000"]  # as a page is developed


@contextlib.contextmanager
def serving(log: Path) -> Iterator[str]:
    """Yields the address of a server that is ready; its log says what it heard."""
    with log.open("w") as file:
        command = [sys.executable, "-m", "fastgen_jax.serve", *FLAGS]
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
    try:
        yield wait_until_ready(process, log)
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(process: subprocess.Popen, log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT
    while not (found := re.search(r"listen +(http://\S+)", log.read_text())) or not is_ready(
        found[1]
    ):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")
        time.sleep(0.1)
    return found[1]


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10):
            return True
    except (urllib.error.HTTPError, OSError):
        return False
