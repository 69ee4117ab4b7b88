"""Trial: a client's schema, regex or grammar is compiled first in a process that can be killed.

Some schemas of a few bytes keep llguidance busy for ever, and no thread of ours could end that. The
process takes a line of JSON and answers with one; it is started when first needed, bounded in CPU
time and memory, and followed by a new one if it dies of that. It has the model's tokenizer, and so
does all that compiling takes: what has passed costs this process as much again, and no more.
"""

import contextlib
import dataclasses
import json
import resource
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from typing import IO, Any

from fastgen_jax.errors import InvalidRequest
from fastgen_jax.grammar import MAX_SHOWN, GrammarCompiler, grammar_text
from fastgen_jax.sampling_params import StructuredOutputsParams

CPU_SECONDS = 2  # that a trial may take ...
MAX_SECONDS = 30.0  # ... and how long one waits for it
MEMORY = 1 << 30  # bytes of address space, beside what the tokenizer takes
MAX_KEPT = 256  # structures that have passed, newest last


class Trial:
    """Says of structures what `grammar_text` says, in bounded time; thread-safe, one at a time.

    Args: as of GrammarCompiler.
    """

    def __init__(
        self, tokenizer_json: Callable[[], str], vocab_size: int, eos_token_ids: Iterable[int]
    ):
        self._tokenizer_json = tokenizer_json
        self._sizes = [vocab_size, sorted(eos_token_ids)]
        self._process: subprocess.Popen[str] | None = None
        self._is_closed = False
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
        """Ends the process, whatever it is at; nothing is tried from now on."""
        self._is_closed = True
        process = self._process
        if process is not None:
            process.kill()  # who waits for its answer goes on
        with self._lock:
            self._end()

    def _ask(self, question: str) -> dict[str, Any]:
        if self._is_closed:
            return {"error": "structured_outputs cannot be compiled: the server ends"}
        line = ""
        with contextlib.suppress(BrokenPipeError):
            process = self._process or self._start()
            assert process.stdin
            assert process.stdout
            print(question, file=process.stdin, flush=True)
            if select.select([process.stdout], [], [], MAX_SECONDS)[0]:
                line = process.stdout.readline()
        if line.endswith("\n"):
            return json.loads(line)
        self._end()
        return {
            "error": f"structured_outputs takes more than {CPU_SECONDS} s or {MEMORY >> 20} MiB to "
            "compile; make it simpler"
        }

    def _start(self) -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "fastgen_jax.server.trial"]
        process = self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        print(json.dumps([self._tokenizer_json(), *self._sizes]), file=process.stdin, flush=True)
        return process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(BrokenPipeError), self._process:  # which closes and waits
                pass
            self._process = None


def serve(questions: IO[str], answers: IO[str]) -> None:
    """The process's own side: answers until there are no more questions."""
    spec, *sizes = json.loads(questions.readline())
    compiler = GrammarCompiler(lambda: spec, *sizes, max_kept=0)
    _answer({"json_object": True}, compiler)  # has it read the tokenizer, which is not on trial
    memory = MEMORY + (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for question in questions:
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        limit = int(used) + 1 + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        print(json.dumps(_answer(json.loads(question), compiler)), file=answers, flush=True)


def _answer(fields: dict[str, Any], compiler: GrammarCompiler) -> dict[str, str]:
    try:
        grammar = grammar_text(StructuredOutputsParams(**fields))
        compiler.compile(grammar)
        return {"grammar": grammar}
    except InvalidRequest as error:
        return {"error": str(error)}
    except Exception as error:  # llguidance's own faults: still only this request's
        problem = f"{type(error).__name__}: {error!s:.{MAX_SHOWN}}"
        return {"error": f"structured_outputs cannot be compiled: {problem}"}


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
