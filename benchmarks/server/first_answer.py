"""Seconds from the start of a server's process to its first answer, and to its last program.

    python -m benchmarks.server.first_answer [flags of fastgen_jax.serve ...]

cold: nothing is compiled yet; warm: all that the cold server has compiled is on the disk. CPU
seconds, of the whole process up to the answer, tell what a busy machine hides.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.server.child import free_port

LIMIT = 900.0  # seconds
PATIENCE = 0.02


class Start(NamedTuple):
    """Seconds since the process began."""

    ready: float
    answered: float
    cpu: float
    complete: float  # the last program is there


def start(cache: str, flags: Sequence[str]) -> Start:
    """One server with that compilation cache, from its start to its last program."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "fastgen_jax.serve", "--port", str(port)]
    began = time.monotonic()
    process = subprocess.Popen([*command, "--compilation-cache", cache, *flags])
    try:
        _wait_for(process, url, lambda state: True)
        ready = time.monotonic() - began
        body = json.dumps({"prompt": "Once upon a time", "max_tokens": 1}).encode()
        asked = urllib.request.Request(
            f"{url}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=LIMIT) as answer:
            answer.read()
        answered, cpu = time.monotonic() - began, _cpu_seconds(process.pid)
        _wait_for(process, url, _is_complete)
        return Start(ready, answered, cpu, time.monotonic() - began)
    finally:
        process.terminate()
        process.wait()


def _is_complete(state: dict[str, Any]) -> bool:
    programs = state["programs"]
    return programs["compiled"] == programs["of"]


def _wait_for(process: subprocess.Popen, url: str, condition: Any) -> None:
    began = time.monotonic()
    while time.monotonic() - began < LIMIT:
        if process.poll() is not None:
            raise SystemExit("the server has ended")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=LIMIT) as answer:
                if condition(json.load(answer)):
                    return
        except OSError:  # not open yet, or not ready: 503
            pass
        time.sleep(PATIENCE)
    raise SystemExit(f"the server was not ready within {LIMIT:g} s")


def _cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    print("|  | ready | first answer | CPU until then | all programs |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            cells = " | ".join(f"{seconds:.1f} s" for seconds in start(cache, sys.argv[1:]))
            print(f"| {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
