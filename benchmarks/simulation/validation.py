"""The simulator against the engine: the demo on this machine's CPU, the same requests in both.

The surface is fitted to the engine's own record of steps (engine.history) under other requests than
those that are compared. Both take the same requests at the same times; clients ask in the engine's
thread. Judge it on a machine that does nothing else.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import kept
from benchmarks.simulation import workloads
from benchmarks.simulation.cluster import Cluster, round_robin
from benchmarks.simulation.measures import Record
from benchmarks.simulation.replica import Job, Replica
from fastgen_jax.built_in import DEMO
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.history import StepRecord
from fastgen_jax.engine.surface import Surface, Work, fit
from fastgen_jax.engine.types import Request
from fastgen_jax.sampling_params import SamplingParams

WITHIN = 0.15
JUDGED = ("requests/s", "latency P50", "latency P95")
SHOWN = (*JUDGED, "TTFT P50", "TTFT P95", "token P50", "token P95")


class Setting(NamedTuple):
    """A workload: of clients, or of random arrivals at a share of what so many clients get."""

    prompt: int
    new: int
    clients: int
    share: float = 0.0

    def __str__(self) -> str:
        arrivals = f", {self.share:.0%} of their rate at random" if self.share else ""
        return f"{self.prompt}/{self.new}, {self.clients} clients{arrivals}"


SETTINGS = (
    Setting(300, 60, 4), Setting(300, 60, 16), Setting(1200, 30, 8), Setting(600, 15, 16),
    Setting(60, 120, 32), Setting(300, 60, 32), Setting(300, 60, 16, 0.7),
    Setting(600, 30, 16, 0.9),
)  # fmt: skip
CALIBRATION = (
    Setting(150, 40, 8), Setting(900, 20, 12), Setting(100, 100, 24), Setting(450, 60, 2),
)  # fmt: skip


class Driver:
    """Runs jobs on an engine and fills in when their tokens came; keeps what its steps took."""

    def __init__(self, engine: Engine, seed: int = 0):
        self.engine = engine
        self.steps: list[tuple[Work, float]] = []
        self._rng = np.random.default_rng(seed)
        self._open: dict[int, Job] = {}
        self._last: StepRecord | None = None

    def run(self, jobs: Iterable[Job], n_clients: int | None, record: Record) -> None:
        """As Cluster.run."""
        left, self._last = deque(jobs), None
        start = time.perf_counter()
        free = deque([0.0] * (len(left) if n_clients is None else n_clients))  # since when
        while left or self._open:
            now = time.perf_counter() - start
            while left and free and left[0].time <= now:
                job = left.popleft()
                job.time = max(job.time, free.popleft())
                self._submit(job)
            if not self.engine.has_work:
                self._last = None  # what passes until the next step is nobody's
                time.sleep(max(left[0].time - now, 0.0) if left else 0.0)
                continue
            outputs = self.engine.step()
            now = time.perf_counter() - start
            for output in outputs:
                self._open[output.request_id].times.append(now)
                if output.finish_reason:
                    record.add(self._open.pop(output.request_id))
                    if n_clients is not None:
                        free.append(now)
            self._note_steps()

    def _submit(self, job: Job) -> None:
        ids = self._rng.integers(10, self.engine.model_config.vocab_size, job.n_prompt).tolist()
        params = SamplingParams(max_tokens=job.n_output, temperature=0.0, ignore_eos=True)
        self._open[self.engine.submit(Request(ids, params))] = job

    def _note_steps(self) -> None:
        """A step has ended when the record of the next one was made, for by then its tokens were
        read.
        """
        for step in self.engine.history.since(self._last.number if self._last else 10**9):
            assert self._last is not None
            self.steps.append((self._last.work, step.end_time - self._last.end_time))
            self._last = step
        newest = self.engine.history.since(self.engine.history.n_steps - 1)
        if self._last is None and newest:
            self._last = newest[0]


def make_engine() -> Engine:
    return Engine(
        EngineConfig(
            model=str(DEMO), dtype="float32", max_model_len=2048, max_num_batched_tokens=256,
            max_num_seqs=32, memory_fraction=0.1, enable_prefix_caching=False, compile="all",
        )
    )  # fmt: skip


def jobs_of(setting: Setting, n: int, rate: float | None, seed: int) -> Iterator[Job]:
    jobs = workloads.normal(setting.prompt, setting.new, longest=2048, seed=seed)
    if rate:
        return workloads.arriving(jobs, rate, n, seed)
    return workloads.of_clients(jobs, setting.clients, n, seed)


def measure(driver: Driver, setting: Setting, n: int, rate: float | None, seed: int) -> Record:
    record = Record()
    driver.run(jobs_of(setting, n, rate, seed), None if rate else setting.clients, record)
    return record


def simulate(
    engine: Engine, surface: Surface, setting: Setting, n: int, rate: float | None, seed: int
) -> Record:
    record = Record()
    replica = Replica("0", engine.config, surface)
    jobs = jobs_of(setting, n, rate, seed)
    Cluster([replica], round_robin(0), record.add).run(jobs, None if rate else setting.clients)
    return record


def replay(driver: Driver, setting: Setting, n: int, seed: int) -> Record:
    """As `simulate`, but each step takes as long as the engine's did that the driver has just run:
    what differs then is not the surface's fault.
    """
    seconds = iter([t for _, t in driver.steps] + [driver.steps[-1][1]] * len(driver.steps))
    record = Record()
    replica = Replica("0", driver.engine.config, lambda work: next(seconds))
    jobs = jobs_of(setting, n, None, seed)
    Cluster([replica], round_robin(0), record.add).run(jobs, setting.clients)
    return record


class Seen(NamedTuple):
    """A setting as it was measured in one round."""

    rate: float | None
    real: dict[str, float]
    replayed: dict[str, float] | None


def compare(n_settings: int, n: int, n_rounds: int) -> tuple[list[dict[str, Any]], Surface]:
    """A row for each setting: measured, simulated and the difference of each number.

    A machine's speed drifts: steps that the surface is fitted to are run before every setting, and
    measured numbers are the medians of rounds, in which all settings have their turn.
    """
    settings = SETTINGS[:n_settings]
    with make_engine() as engine:
        driver = Driver(engine)
        for setting in CALIBRATION:
            measure(driver, setting, 16, None, seed=100)  # everything is warm
        steps: list[tuple[Work, float]] = []
        seen: dict[Setting, list[Seen]] = {setting: [] for setting in settings}
        for i, setting in enumerate(settings * n_rounds):
            driver.steps.clear()
            for other in CALIBRATION:
                measure(driver, other, max(n // 8, 2), None, seed=101 + i)
            steps += driver.steps
            seen[setting].append(_measured(driver, setting, n))
        sizes = tuple(shape.n_tokens for shape in engine._runner.shapes)
        works, seconds = map(list, zip(*steps, strict=True))
        surface = fit(works, seconds, sizes)
        return [_compared(engine, surface, s, found, n) for s, found in seen.items()], surface


def _measured(driver: Driver, setting: Setting, n: int) -> Seen:
    rate = None
    if setting.share:
        probe = measure(driver, setting._replace(share=0.0), n, None, seed=102)
        rate = setting.share * len(probe) / probe.elapsed
    driver.steps.clear()
    real = measure(driver, setting, n, rate, seed=7).summary()
    replayed = None if rate else replay(driver, setting, n, seed=7).summary()
    return Seen(rate, real, replayed)


def _compared(
    engine: Engine, surface: Surface, setting: Setting, seen: Sequence[Seen], n: int
) -> dict[str, Any]:
    """Simulated once for each round, whose rate of arrivals is that round's own."""
    found = [simulate(engine, surface, setting, n, x.rate, seed=7).summary() for x in seen]
    replayed = [x.replayed for x in seen if x.replayed]
    return _row(
        setting, medians([x.real for x in seen]), medians(found),
        medians(replayed) if replayed else None,
    )  # fmt: skip


def medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.median([row[name] for row in rows])) for name in rows[0]}


def _row(
    setting: Setting,
    real: dict[str, float],
    foreseen: dict[str, float],
    replayed: dict[str, float] | None,
) -> dict[str, Any]:
    row: dict[str, Any] = {"setting": str(setting)}
    for name in SHOWN:
        again = replayed[name] / real[name] - 1 if replayed else np.nan
        row |= {f"{name} measured": real[name], f"{name} simulated": foreseen[name]}
        row |= {f"difference of {name}": foreseen[name] / real[name] - 1}
        row |= {f"difference of {name}, replayed": again}
    return row


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """One for each number: the rows of one are too long to read."""
    found = []
    for name in SHOWN:
        keys = {f"{name} measured": "measured", f"{name} simulated": "simulated"}
        keys |= {f"difference of {name}": "difference"}
        keys |= {f"difference of {name}, replayed": "difference, replayed"}
        lines = [{"setting": r["setting"]} | {new: r[old] for old, new in keys.items()}
                 for r in rows]  # fmt: skip
        found.append(f"{name}{' (judged)' if name in JUDGED else ''}\n\n{kept.markdown(lines)}")
    return "\n\n".join(found)


def is_close(rows: Sequence[dict[str, Any]]) -> bool:
    return all(abs(row[f"difference of {name}"]) <= WITHIN for row in rows for name in JUDGED)


def text(rows: Sequence[dict[str, Any]], surface: Surface) -> str:
    e, a, b, c, d, sizes = surface
    n_far = sum(abs(row[f"difference of {name}"]) > WITHIN for row in rows for name in JUDGED)
    return "\n\n".join((
        "# The simulator against the engine: the demo on a CPU",
        f"Steps take {1e3 * e:.3g} ms + max({1e3 * a:.3g} ms, {1e6 * b:.3g} us T) + "
        f"{1e9 * c:.3g} ns sum(C) + {1e9 * d:.3g} ns sum(q (C - (q - 1) / 2)), T padded to "
        f"{', '.join(map(str, sizes))}; fitted to other requests. Of {len(JUDGED) * len(rows)} "
        f"numbers ({', '.join(JUDGED)}) {n_far} differ by more than {WITHIN:.0%}. Replayed: each "
        "simulated step takes as long as the engine's did, "
        "so that only what the simulator does with them differs.",
        tables(rows),
    ))  # fmt: skip
