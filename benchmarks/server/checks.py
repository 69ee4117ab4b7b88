"""What a soak asserts, as functions of what it recorded: each broken promise is one line.

Bounds of a run of minutes. Over hours memory may grow by 1 MiB an hour or 100 bytes a request; in
minutes the first drowns in what allocators keep and give back, some MiB from second to second. So
growth counts from the end of the first third on, as the slope of the median pair of samples
(Theil, 1950; Sen, 1968), which jumps do not move, and may reach NOISE plus 100 bytes a request: a
leak of 4 KiB a request shows as soon as 1100 have been served, one of 1 KiB after 4600. Descriptors
and threads have no noise: at rest they are what they were at rest.
"""

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.server.child import NOTHING, Footprint
from benchmarks.server.client import ANSWER, BROKEN, CANCELLED, CUT, FAILED, REFUSED, Outcome

NOISE = 4 * 2**20  # bytes
BYTES_PER_REQUEST = 100
MAX_LIVEZ_P99 = 1.0  # seconds
EXPECTED = (ANSWER, REFUSED, FAILED, CANCELLED, CUT)  # kinds of which each must be seen
AT_REST = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


@dataclass
class Record:
    """All that one soak saw. Filled by the soak, read here."""

    n_started: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    n_wrong: int = 0  # answers that differ from the idle server's
    n_checked: int = 0
    ordered: Counter[str] = field(default_factory=Counter)  # faults
    happened: Counter[str] = field(default_factory=Counter)
    livez: list[float] = field(default_factory=list)  # seconds
    n_livez_failures: int = 0
    memory: list[tuple[float, float]] = field(default_factory=list)  # seconds, bytes
    n_measured: int = 0  # requests while memory was sampled
    rest_before: Footprint = NOTHING
    rest_after: Footprint = NOTHING
    gauges: dict[str, float] = field(default_factory=dict)  # at rest, at the end
    n_preemptions: float = 0
    seconds: float = 0.0  # of load
    is_alive: bool = True

    def kinds(self) -> Counter[str]:
        return Counter(outcome.kind for outcome in self.outcomes)


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """The median of the slopes between all pairs of samples."""
    slopes = [
        (y2 - y1) / (x2 - x1)
        for i, (x1, y1) in enumerate(samples)
        for x2, y2 in samples[i + 1 :]
        if x2 > x1
    ]
    return statistics.median(slopes) if slopes else 0.0


def growth(samples: Sequence[tuple[float, float]]) -> float:
    """How much the samples grew, were they a line."""
    return slope(samples) * (samples[-1][0] - samples[0][0]) if samples else 0.0


def quantile(values: Sequence[float], share: float) -> float:
    """0 of nothing."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else 0.0


def verdict(problems: Sequence[str]) -> int:
    """Prints what is broken; the exit code."""
    for problem in problems:
        print(f"BROKEN: {problem}")
    return 1 if problems else 0


def broken_promises(record: Record) -> list[str]:
    """One line each; none for a soak that went well."""
    checks = (losses, wrong_answers, missing_faults, contagion, unrest, leaks, silences)
    return [problem for check in checks for problem in check(record)]


def losses(record: Record) -> Iterator[str]:
    """A request that did not end in an answer, an error or its own cancel."""
    if not record.is_alive:
        yield "the server died"
    if record.n_started != len(record.outcomes):
        yield f"{record.n_started} requests began and {len(record.outcomes)} ended"
    for kind in BROKEN:
        notes = [o.note for o in record.outcomes if o.kind == kind]
        if notes:
            yield f"{len(notes)} requests were {kind}, one so: {notes[0]}"


def wrong_answers(record: Record) -> Iterator[str]:
    if record.n_wrong:
        yield f"{record.n_wrong} of {record.n_checked} known answers differ from the idle server's"
    if not record.n_checked:
        yield "no known answer was checked"


def missing_faults(record: Record) -> Iterator[str]:
    """A soak whose faults did not happen has shown nothing."""
    for kind, n_ordered in record.ordered.items():
        if record.happened[kind] != n_ordered:
            yield f"fault {kind!r} was ordered {n_ordered} times, happened {record.happened[kind]}"
    for kind in set(EXPECTED) - set(record.kinds()):
        yield f"no request was {kind}: the load is not what it should be"
    if not record.n_preemptions:
        yield "no sequence was preempted"


def contagion(record: Record) -> Iterator[str]:
    """A row that is not finite ends its request; a failed step ends none, and is counted."""
    n_failed, n_rows = record.kinds()[FAILED], record.happened["nan"]
    if n_failed > n_rows:
        yield f"{n_failed} requests failed, more than the {n_rows} whose logits were not finite"
    n_steps = record.happened["dispatch"] + record.happened["fetch"]
    n_counted = record.gauges.get("engine_step_failures_total", 0)
    if n_counted != n_steps:
        yield f"{n_steps} steps failed, /metrics counts {n_counted:.0f}"


def unrest(record: Record) -> Iterator[str]:
    """What the server still holds when all have gone."""
    for name in AT_REST:
        if record.gauges.get(name) != 0:
            yield f"at rest {name} is {record.gauges.get(name)}, not 0"


def leaks(record: Record) -> Iterator[str]:
    n_grown, n = growth(record.memory), record.n_measured
    if n_grown > NOISE + BYTES_PER_REQUEST * n:
        yield f"memory grew by {n_grown / 2**20:.1f} MiB in {n} requests, {n_grown / n:.0f} each"
    before, after = record.rest_before, record.rest_after
    if after.n_files != before.n_files:
        yield f"descriptors at rest went from {before.n_files} to {after.n_files}"
    if after.n_threads != before.n_threads:
        yield f"threads at rest went from {before.n_threads} to {after.n_threads}"


def silences(record: Record) -> Iterator[str]:
    p99 = quantile(record.livez, 0.99)
    if record.n_livez_failures or not record.livez:
        yield f"/livez failed {record.n_livez_failures} times in {len(record.livez)}"
    if p99 > MAX_LIVEZ_P99:
        yield f"/livez took {p99:.2f} s at p99, more than {MAX_LIVEZ_P99:g} s"
