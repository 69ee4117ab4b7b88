"""Trial: a client's schema, regex or grammar is compiled first in a process that can be killed.

Some schemas of a few bytes keep llguidance busy for ever, and no thread of ours could end that. The
process takes a line of JSON and answers with one; it is started when first needed, bounded in CPU
time and memory, and followed by a new one if it dies of that.
"""

import contextlib
import dataclasses
import json
import resource
import select
import subprocess
import sys
import threading
from typing import IO, Any

from fastgen_jax.errors import InvalidRequest
from fastgen_jax.grammar import grammar_text
from fastgen_jax.sampling_params import StructuredOutputsParams

CPU_SECONDS = 2  # that a trial may take ...
MAX_SECONDS = 30.0  # ... and how long one waits for it
MEMORY = 1 << 30  # bytes of address space
MAX_KEPT = 256  # structures that have passed, newest last


class Trial:
    """Says of structures what `grammar_text` says, in bounded time; thread-safe, one at a time."""

    def __init__(self):
        self._process: subprocess.Popen[str] | None = None
        self._passed: dict[str, str] = {}
        self._lock = threading.Lock()

    def grammar_text(self, structure: StructuredOutputsParams) -> str:
        """As grammar.grammar_text.

        Raises:
            InvalidRequest: it cannot be compiled, or not with that much time and memory.
        """
        question = json.dumps(dataclasses.asdict(structure))
        passed = self._passed.get(question)  # without waiting for those who are on trial
        if passed is not None:
            return passed
        with self._lock:
            answer = self._ask(question)
            if "error" in answer:
                raise InvalidRequest(answer["error"], param="structured_outputs")
            self._passed[question] = answer["grammar"]
            while len(self._passed) > MAX_KEPT:
                del self._passed[next(iter(self._passed))]
        return answer["grammar"]

    def close(self) -> None:
        """Ends the process, whatever it is at."""
        process = self._process
        if process is not None:
            process.kill()

    def _ask(self, question: str) -> dict[str, Any]:
        process = self._process = self._process or _start()
        assert process.stdin
        assert process.stdout
        line = ""
        with contextlib.suppress(BrokenPipeError):
            print(question, file=process.stdin, flush=True)
            if select.select([process.stdout], [], [], MAX_SECONDS)[0]:
                line = process.stdout.readline()
        if line:
            return json.loads(line)
        process.kill()
        process.communicate()
        self._process = None
        return {
            "error": f"structured_outputs takes more than {CPU_SECONDS} s or {MEMORY >> 20} MiB to "
            "compile; make it simpler"
        }


def _start() -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "fastgen_jax.server.trial"]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)


def serve(questions: IO[str], answers: IO[str]) -> None:
    """The process's own side: answers until there are no more questions."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for question in questions:
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        limit = int(used) + 1 + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        print(json.dumps(_answer(json.loads(question))), file=answers, flush=True)


def _answer(fields: dict[str, Any]) -> dict[str, str]:
    try:
        return {"grammar": grammar_text(StructuredOutputsParams(**fields))}
    except InvalidRequest as error:
        return {"error": str(error)}
    except Exception as error:  # llguidance's own faults: still only this request's
        return {"error": f"structured_outputs cannot be compiled: {type(error).__name__}: {error}"}


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
