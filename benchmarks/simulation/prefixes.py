"""Where requests should go when prompts begin alike: the product's router, on simulated replicas.

Half of the prompts continue one of N_DOCUMENTS; one answer of ten is long. Each replica has a
prefix cache, which is the product's own. Routers see what they see in the product: bodies.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import orjson

from benchmarks import kept
from benchmarks.simulation.cluster import (
    Cluster,
    Router,
    fewest_requests,
    tokens_and_prefixes,
    two_choices,
)
from benchmarks.simulation.measures import Record
from benchmarks.simulation.replica import Job, Replica, sizes
from fastgen_jax.cluster.ticket import read_ticket
from fastgen_jax.engine.surface import Work

STEP, TOKEN = 0.010, 30e-6  # seconds: about an 8B model on one accelerator
N_DOCUMENTS, DOCUMENT = 64, 2000  # and tokens of one
LETTERS = 4  # of a token
N_BLOCKS, BLOCK_SIZE = 1000, 64  # of a replica: a few dozen documents beside what runs
IN_TIME = 0.25  # seconds to the first token that goodput counts
ROUTERS = {
    "tokens and prefixes": tokens_and_prefixes,
    "tokens": two_choices,
    "requests (Ray's default)": fewest_requests,
}


def seconds(work: Work) -> float:
    return STEP + TOKEN * work.n_tokens


def requests(n: int, rate: float, seed: int) -> Iterator[Job]:
    rng, now = random.Random(seed), 0.0
    for i in range(n):
        now += rng.expovariate(rate)
        document = rng.randrange(N_DOCUMENTS) if rng.random() < 0.5 else None
        n_own = min(int(rng.lognormvariate(5, 1)) + 1, 8000)
        n_output = 1000 if rng.random() < 0.1 else 50
        start = "" if document is None else f"{document:04}" * DOCUMENT
        text = start + f"{i:06}".rjust(n_own * LETTERS, ".")
        ids = np.full(n_own + (0 if document is None else DOCUMENT), -1 - i, np.int32)
        if document is not None:
            ids[:DOCUMENT] = document
        ticket = read_ticket(orjson.dumps({"prompt": text, "max_tokens": n_output}))
        yield Job(now, len(ids), n_output, ids, ticket)


def make_cluster(n_replicas: int, router: Router, record: Record) -> Cluster:
    config = sizes(
        budget=512, max_seqs=128, n_blocks=N_BLOCKS, block_size=BLOCK_SIZE, max_model_len=12288,
        is_sharing=True,
    )  # fmt: skip
    replicas = [Replica(str(i), config, seconds) for i in range(n_replicas)]
    return Cluster(replicas, router, record.add)


def compare(n_requests: int, n_replicas: int, rates: Sequence[float]) -> str:
    """A table: each rate under each router."""
    rows: list[dict[str, Any]] = []
    for rate in rates:
        for name, make in ROUTERS.items():
            record = Record(one_in=n_requests)
            make_cluster(n_replicas, make(2), record).run(requests(n_requests, rate, seed=1))
            first = np.array(record.first)
            p50, p95 = np.percentile(first, [50, 95])
            rows.append({
                "requests/s": f"{rate:g}",
                "placed by": name,
                "TTFT P50, s": f"{p50:.3f}",
                "P95, s": f"{p95:.3f}",
                "in time, answers/s": f"{np.count_nonzero(first <= IN_TIME) / record.elapsed:.1f}",
                "cached tokens a prompt": f"{record.n_reused / len(record):.0f}",
            })  # fmt: skip
    return kept.markdown(rows)
