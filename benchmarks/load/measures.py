"""Records of a run -> figures: vLLM's, and DeepSpeed-FastGen's by its own formulas.

INVARIANT: failed requests are counted and in no mean. Milliseconds have names that end in _ms.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.load.client import Record
from fastgen_jax.server.attainment import SLA, Pace

PERCENTILES = (50, 90, 95, 99)
METRICS = ("ttft", "tpot", "itl", "e2el")


class Goodput(NamedTuple):
    """vLLM's --goodput: the most milliseconds that a good request may take, by metric."""

    ttft: float = float("inf")
    tpot: float = float("inf")
    e2el: float = float("inf")

    def is_met(self, record: Record) -> bool:
        seconds = (record.first, tpot(record), record.latency)
        return all(s * 1e3 <= most for s, most in zip(seconds, self, strict=True))


def tpot(record: Record) -> float:
    """Mean seconds of a token after the first; 0 of one token."""
    return (record.times[-1] - record.times[0]) / max(record.n_output - 1, 1)


def token_gaps(record: Record) -> list[float]:
    """Seconds from each token to the next. Tokens of one event share the time since the one before;
    those that came with the first token took none. Where it is not known how many an event brought,
    these are the times between events.
    """
    gaps = np.diff(record.times).tolist()
    if not record.is_counted:
        return gaps
    shared = [0.0] * (record.counts[0] - 1)
    for gap, n in zip(gaps, record.counts[1:], strict=True):
        shared += [gap / n] * n
    return shared


def slowest_pace(record: Record) -> float:
    """The greatest moving average of the times between tokens, as FastGen's service level has it.
    Events of which it is not known how many tokens they brought count for the mean number.
    """
    share = 1.0 if record.is_counted else len(record.times) / max(record.n_output, 1)
    pace = Pace()
    for gap in token_gaps(record):
        pace.add(gap * share)
    return pace.slowest


def effective_throughput(records: Sequence[Record], sla: SLA) -> dict[str, dict[str, float]]:
    """FastGen's: by token rate, the share of all requests that met it, and how many a second of
    max(end) - min(start).
    """
    seconds = elapsed(records)
    met = [
        sla.met(record.n_prompt, record.first, slowest_pace(record))
        for record in records
        if not record.error
    ]
    found = {}
    for level, rate in enumerate(sla.token_rates):
        n = sum(row[level] for row in met)
        found[f"{rate:g}"] = {
            "attainment": n / max(len(records), 1),
            "requests_per_second": n / seconds if seconds else 0.0,
        }
    return found


def token_latency(records: Sequence[Record]) -> list[float]:
    """FastGen's: all times between tokens but each request's last, of all requests but the first
    and the last to start.
    """
    inner = sorted((r for r in records if not r.error), key=lambda r: r.sent)[1:-1]
    return [gap for record in inner for gap in token_gaps(record)[:-1]]


def elapsed(records: Sequence[Record]) -> float:
    sent = [record for record in records if record.times or record.end > record.sent]
    return max(r.end for r in sent) - min(r.sent for r in sent) if sent else 0.0


def statistics(values: Iterable[float], scale: float = 1e3) -> dict[str, float]:
    """Of times in seconds, in milliseconds; percentiles interpolate linearly. All 0 of none."""
    held = np.fromiter(values, float) * scale
    held = held if len(held) else np.zeros(1)
    found = {"mean": held.mean(), "std": held.std()}
    found |= {f"p{p}": np.percentile(held, p) for p in PERCENTILES}
    return {name: float(value) for name, value in found.items()}


def peak_tokens(records: Sequence[Record]) -> float:
    """The most tokens of one second, by whole seconds from the first request."""
    start = min((record.sent for record in records), default=0.0)
    seconds: dict[int, float] = {}
    for record in records:
        per_event = 1 if record.is_counted else record.n_output / max(len(record.times), 1)
        for at, n in zip(record.times, record.counts, strict=True):
            second = int(at - start)
            seconds[second] = seconds.get(second, 0) + n * per_event
    return max(seconds.values(), default=0)


def peak_requests(records: Sequence[Record]) -> int:
    """The most requests under way at once."""
    changes = [(record.sent, 1) for record in records] + [(record.end, -1) for record in records]
    n = most = 0
    for _, change in sorted(changes):
        n += change
        most = max(most, n)
    return most


def summarise(
    records: Sequence[Record],
    *,
    sla: SLA | None = None,
    goodput: Goodput | None = None,
    n_clients: int | None = None,
) -> dict[str, Any]:
    """All figures of one run.

    Args:
        n_clients: of a closed loop, for Little's law.
    """
    good = [record for record in records if not record.error]
    seconds = elapsed(records)
    per_second = 1 / seconds if seconds else 0.0
    n_input, n_output = (sum(getattr(r, name) for r in good) for name in ("n_prompt", "n_output"))
    latencies = [record.latency for record in good]
    found: dict[str, Any] = {
        "duration": seconds,
        "completed": len(good),
        "failed": len(records) - len(good),
        "errors": dict(Counter(record.error for record in records if record.error)),
        "total_input_tokens": n_input,
        "total_cached_tokens": sum(record.n_cached for record in good),
        "total_output_tokens": n_output,
        "request_throughput": len(good) * per_second,
        "output_throughput": n_output * per_second,
        "total_token_throughput": (n_input + n_output) * per_second,
        "max_output_tokens_per_s": peak_tokens(good),
        "max_concurrent_requests": peak_requests(records),
        "is_itl_of_tokens": all(record.is_counted for record in good),
    }
    if goodput is not None:
        found["request_goodput"] = sum(map(goodput.is_met, good)) * per_second
    if n_clients is not None:
        mean = float(np.mean(latencies)) if latencies else 0.0
        found["littles_law_throughput"] = n_clients / mean if mean else 0.0
    times = {
        "ttft": [record.first for record in good],
        "tpot": [tpot(record) for record in good if record.n_output > 1],
        "itl": [gap for record in good for gap in token_gaps(record)],
        "e2el": latencies,
        "token_latency": token_latency(records),
        "lateness": [max(r.sent - r.due, 0.0) for r in good],
    }
    for name, values in times.items():
        found |= {f"{key}_{name}_ms": value for key, value in statistics(values).items()}
    found["effective_throughput"] = effective_throughput(records, sla or SLA())
    return found
