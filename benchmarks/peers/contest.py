"""Engines take turns at the same requests, each in a process of its own that lives for all turns.

An engine that fails is out, with what it said; the others go on.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import Any, NamedTuple

from benchmarks.engine.throughput import Workload
from benchmarks.peers.environments import PEERS, Absent


class Turn(NamedTuple):
    """One engine's answer to one workload."""

    seconds: float
    tokens: list[list[int]]


class Worker:
    """An engine's process; ends with the `with` block."""

    def __init__(self, name: str, command: list[str]):
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (ends with the process)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self.versions: str = self._answer()["versions"]
        except Absent:
            self.close()
            raise

    def run(self, workload: Workload, variant: str = "") -> Turn:
        """
        Raises:
            Absent: it failed, or gave another number of tokens.
        """
        assert self._process.stdin
        job = {"variant": variant, **workload._asdict()}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise Absent(answer["error"])
        counts = list(map(len, answer["tokens"]))
        if counts != workload.n_new:
            raise Absent(f"it gave {counts} tokens, and {workload.n_new} were asked for")
        return Turn(answer["seconds"], answer["tokens"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._log.seek(0)
        said = [text for text in self._log.read().splitlines() if text.strip()]
        raise Absent(said[-1] if said else f"its process ended ({self._process.returncode})")

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._log.close()


class Standing(NamedTuple):
    """One engine at one workload, after all rounds.

    Attributes:
        seconds: of each round.
        same: share of its tokens that are the first engine's, each request until they part.
        why_absent: what it said when it failed; then nothing else here counts.
    """

    workload: str
    dtype: str
    engine: str
    seconds: tuple[float, ...] = ()
    n_new: int = 0
    n_prompt: int = 0
    same: float = 0.0
    why_absent: str = ""


def same_share(tokens: list[list[int]], others: list[list[int]]) -> float:
    """
    >>> same_share([[1, 2, 3], [4]], [[1, 9, 3], [4]])
    0.5
    """
    n_same = 0
    for a, b in zip(tokens, others, strict=True):
        pairs = zip(a, b, strict=True)
        n_same += next((i for i, (x, y) in enumerate(pairs) if x != y), len(a))
    return n_same / sum(map(len, tokens))


class Contest:
    """Rounds of engines at one dtype; the first engine is the one the others are compared with."""

    def __init__(self, workers: list[Worker], dtype: str):
        self.workers, self.dtype = workers, dtype

    def standings(self, name: str, workloads: list[Workload]) -> list[Standing]:
        """A round per workload, all of one shape. Who began a round ends the next one."""
        turns: dict[str, list[Turn]] = {worker.name: [] for worker in self.workers}
        best: dict[str, str] = {}
        why: dict[str, str] = {}
        order = self.workers
        for workload in workloads:
            for worker in [w for w in order if w.name not in why]:
                try:
                    turn = self._best_turn(worker, workload, best)
                except Absent as error:
                    why[worker.name] = str(error)
                    continue
                turns[worker.name].append(turn)
                rate = workload.n_new_tokens / turn.seconds
                print(f"  {name} {self.dtype} {worker.name}: {rate:.1f}/s", file=sys.stderr)
            order = [*order[1:], order[0]]
        first = turns[self.workers[0].name]
        return [
            Standing(
                name,
                self.dtype,
                f"{worker.name} {best.get(worker.name, '')}".strip(),
                seconds=tuple(turn.seconds for turn in turns[worker.name]),
                n_new=workloads[0].n_new_tokens,
                n_prompt=workloads[0].n_prompt_tokens,
                same=mean_same(turns[worker.name], first),
                why_absent=why.get(worker.name, ""),
            )
            for worker in self.workers
        ]

    @staticmethod
    def _best_turn(worker: Worker, workload: Workload, best: dict[str, str]) -> Turn:
        """Of the variant that won the first round; in the first round, of each."""
        variants = PEERS[worker.name].variants(len(workload.prompts))
        if worker.name in best:
            return worker.run(workload, best[worker.name])
        tried: dict[str, Turn] = {}
        complaint = Absent("it has no way of working")
        for variant in variants:
            try:
                tried[variant] = worker.run(workload, variant)
            except Absent as error:
                complaint = error
                print(f"  {worker.name} {variant}: {error}", file=sys.stderr)
        if not tried:
            raise complaint
        best[worker.name] = min(tried, key=lambda variant: tried[variant].seconds)
        return tried[best[worker.name]]


def mean_same(turns: Iterable[Turn], others: Iterable[Turn]) -> float:
    shares = [same_share(a.tokens, b.tokens) for a, b in zip(turns, others, strict=False)]
    return sum(shares) / len(shares) if shares else 0.0
