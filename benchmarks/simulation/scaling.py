"""Past one machine: the same load for each of 1 to 1,024 replicas, and one that is lost.

A replica is Llama-3-8B on one H100 at 0.7 of its roofline. Requests arrive as a Poisson process of
so many a second for each replica; lengths are skewed. Linear would be: n replicas take n times as
many requests as one, with its latencies.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks import kept
from benchmarks.simulation import workloads
from benchmarks.simulation.cluster import Failure
from benchmarks.simulation.measures import Record
from benchmarks.simulation.setup import Setup

REPLICA = Setup(
    chip="h100", model="llama-3-8b", n_chips=1, share=0.7, budget=1024, max_seqs=256,
    max_model_len=8192,
)  # fmt: skip
PROMPT, NEW = 1600, 60
SIZES = (1, 8, 64, 256, 1024)
AT_LEAST = 8000  # requests of a run
IN_TIME = 0.25  # seconds to a first token
DOWN = 3.0  # seconds that a lost replica takes to come back


def capacity(seed: int = 3) -> float:
    """Requests/s of one replica that always has enough to do."""
    record = Record()
    jobs = workloads.skewed(PROMPT, NEW, longest=REPLICA.max_model_len, seed=seed)
    n_clients = REPLICA.max_seqs
    REPLICA.cluster(record).run(workloads.of_clients(jobs, n_clients, 12 * n_clients), n_clients)
    ends = np.sort(np.array(record.arrival) + record.seconds)
    first, last = len(ends) // 4, 3 * len(ends) // 4
    return float((last - first) / (ends[last] - ends[first]))


def run(
    n: int, routing: str, lengths: str, rate: float, *, n_each: int, n_lost: int = 0
) -> dict[str, Any]:
    """So many requests for each replica, at that many a second for each; so many replicas are lost
    at once when a third of the requests have come. Few replicas run again with other seeds, until
    AT_LEAST requests were served, so that all runs have the same length.
    """
    setup = REPLICA._replace(n_replicas=n, routing=routing)
    lost = tuple(Failure(n_each / rate / 3, i, DOWN) for i in range(n_lost))
    started, busy, n_resent = time.process_time(), [], 0
    n_runs = max(AT_LEAST // (n * n_each), 1)
    record = Record(one_in=max(n // 16, 1))
    for seed in range(n_runs):
        jobs = workloads.LENGTHS[lengths](PROMPT, NEW, longest=setup.max_model_len, seed=seed)
        cluster = setup.cluster(record, seed=seed, failures=lost)
        cluster.run(workloads.arriving(jobs, n * rate, n * n_each, seed))
        busy += [replica.busy / cluster.now for replica in cluster.replicas]
        n_resent += cluster.n_resent
    n_asked = len(record) + record.n_failed
    in_time = float((np.array(record.first) <= IN_TIME).sum()) / n_asked
    found = record.summary()
    names = ("TTFT P50", "TTFT P95", "TTFT P99", "latency P95")
    return {
        "replicas": n,
        "routing": routing,
        "lengths": lengths,
        "lost": n_lost,
        "requests": n_asked,
        "in time": in_time,
        "in time/s each": in_time * rate,
        **{name: found[name] for name in names},
        "busy P5": float(np.percentile(busy, 5)),
        "busy P95": float(np.percentile(busy, 95)),
        "failed": record.n_failed,
        "sent again": n_resent,
        "CPU s": time.process_time() - started,
    }


def plan(sizes: Sequence[int]) -> Iterator[tuple[int, str, str, int]]:
    """Replicas, routing, lengths, how many are lost: the fewest first."""
    for n in sizes:
        yield n, "two-choices", "skewed", 0
        yield n, "two-choices", "normal", 0
        if n > 1:
            yield n, "round-robin", "skewed", 0
            yield n, "two-choices", "skewed", max(n // 8, 1)
            yield n, "least-tokens", "skewed", 0
        if n > 8:
            yield n, "two-choices", "skewed", 1


def study(sizes: Sequence[int], n_each: int, load: float) -> Iterator[dict[str, Any]]:
    """A row for each of the plan, with its share of what linear would be."""
    rate, alone = load * capacity(), {}
    for n, routing, lengths, n_lost in plan(sizes):
        row = run(n, routing, lengths, rate, n_each=n_each, n_lost=n_lost)
        alone.setdefault(lengths, row["in time/s each"])
        yield row | {"of linear": row["in time/s each"] / alone[lengths]}


def text(rows: Sequence[dict[str, Any]], load: float) -> str:
    """The table, and what it says."""
    return "\n\n".join((
        "# The same load for each of 1 to 1,024 replicas, by a virtual clock",
        f"Each replica is Llama-3-8B on one H100 at {REPLICA.share} of its roofline, with "
        f"{load:.0%} of the requests that one can take; lengths of mean {PROMPT}/{NEW}, normal or "
        f"lognormal (skewed), Poisson arrivals. In time: the first token within {IN_TIME} s. "
        "Linear: each replica answers as many in time as one does alone. Lost replicas are lost "
        f"together, after a third of the requests, and back after {DOWN:.0f} s.",
        kept.markdown(rows),
    ))  # fmt: skip
