"""The real server with faults on demand, as a process of its own: soak.py's child.

Wraps two methods of Runner, then calls fastgen_jax.serve with the arguments that are left.
Commands come in on stdin, a line each: the name of a fault, or "report", which a line of JSON on
stdout answers: how many faults of each kind have happened. The end of stdin ends the process.

INVARIANT: a fault is counted when it happens, not when it is ordered.
"""

import argparse
import contextlib
import json
import os
import resource
import socket
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fastgen_jax.serve as command_line
from fastgen_jax.engine import faults as engine_faults
from fastgen_jax.engine.programs import return_freed_memory
from fastgen_jax.engine.runner import Runner
from fastgen_jax.engine.step import StepResult
from fastgen_jax.server.service import Service

NO_LIMIT_ON_FAILURES = 10**9
SEND_BUFFER = 8192  # bytes
LEAKED_BYTES = 4096  # of each request
REQUESTS_PER_LEAKED_FILE = 50


class Faults:
    """What was ordered and has not happened yet, and what has. Any thread."""

    def __init__(self):
        self._lock = threading.Lock()
        self._ordered: Counter[str] = Counter()
        self._happened: Counter[str] = Counter()

    def order(self, kind: str) -> None:
        with self._lock:
            self._ordered[kind] += 1

    def strikes(self, kind: str) -> bool:
        """Whether a fault of this kind shall happen here and now; then it is counted."""
        with self._lock:
            if not self._ordered[kind]:
                return False
            self._ordered[kind] -= 1
            self._happened[kind] += 1
            return True

    def report(self) -> str:
        with self._lock:
            return json.dumps(self._happened)


def break_runner(faults: Faults) -> None:
    """Failed dispatches take the device's arrays with them, as XLA does with what was donated."""
    dispatch, fetch = Runner.dispatch, Runner.fetch

    def faulty_dispatch(self: Runner, *args: Any, **kwargs: Any) -> Any:
        if faults.strikes("dispatch"):
            for array in jax.tree.leaves(self.state):
                array.delete()
            raise RuntimeError("RESOURCE_EXHAUSTED: a fault of the soak, in dispatch")
        return dispatch(self, *args, **kwargs)

    def faulty_fetch(self: Runner, *args: Any, **kwargs: Any) -> StepResult:
        result = fetch(self, *args, **kwargs)
        if faults.strikes("fetch"):
            raise RuntimeError("INTERNAL: a fault of the soak, in fetch")
        # No row is finite in a step that samples none.
        if result.is_finite[0] and faults.strikes("nan"):
            is_finite, logprobs = result.is_finite.copy(), result.logprobs.copy()
            is_finite[0], logprobs[0] = False, np.nan
            result = result._replace(is_finite=is_finite, logprobs=logprobs)
        return result

    setattr(Runner, "dispatch", faulty_dispatch)  # noqa: B010  pyright wants the same names
    setattr(Runner, "fetch", faulty_fetch)  # noqa: B010


def shrink_send_buffers() -> None:
    """Else the kernel takes whole answers from the server, and nobody is ever too slow for it."""
    bind = command_line.bind

    def bind_small(host: str, port: int) -> socket.socket:
        listener = bind(host, port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        return listener

    command_line.bind = bind_small


def never_give_up() -> None:
    """A fault every second is more than the engine takes from a machine that works."""
    engine_faults.MAX_FAILED_STEPS = NO_LIMIT_ON_FAILURES


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def compile_on_a_full_disk(faults: Faults) -> None:
    """Compiles while the cache takes nothing: counted if jax says so, and only then."""
    cache = Path(jax.config.jax_compilation_cache_dir)  # type: ignore[attr-defined]
    before = set(cache.iterdir())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    faults.order("disk")
    with warnings.catch_warnings(record=True) as caught, full_disk():
        warnings.simplefilter("always")
        jax.jit(lambda x: x * 2 + 1).lower(np.float32(1)).compile()
    if any("Error writing persistent compilation cache" in str(w.message) for w in caught):
        faults.strikes("disk")
    for path in set(cache.iterdir()) - before:  # cut, and the next one would not be written
        path.unlink()
    return_freed_memory()


def leak() -> None:
    """Makes every request leave something behind, for ever."""
    submit, kept, n_requests = Service.submit, [], 0

    def leaky_submit(self: Service, *args: Any, **kwargs: Any) -> Any:
        nonlocal n_requests
        n_requests += 1
        kept.append(os.urandom(LEAKED_BYTES))
        if n_requests % REQUESTS_PER_LEAKED_FILE == 0:
            kept.append(open(os.devnull))  # noqa: SIM115
        return submit(self, *args, **kwargs)

    Service.submit = leaky_submit


def obey(faults: Faults, answer: Callable[[str], None]) -> None:
    """Runs until stdin ends."""
    for line in sys.stdin:
        match line.strip():
            case "report":
                answer(faults.report())
            case "disk":
                compile_on_a_full_disk(faults)
            case kind:
                faults.order(kind)
    os._exit(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--leak", action="store_true")
    args, flags = parser.parse_known_args()
    answers, sys.stdout = sys.stdout, sys.stderr
    faults = Faults()
    break_runner(faults)
    shrink_send_buffers()
    never_give_up()
    if args.leak:
        leak()

    def answer(text: str) -> None:
        print(text, file=answers, flush=True)

    threading.Thread(target=obey, args=(faults, answer), daemon=True).start()
    return command_line.main(flags)


if __name__ == "__main__":
    sys.exit(main())
