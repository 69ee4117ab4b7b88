"""Where requests should go: our router against Ray's default, on replicas that are real.

    python -m benchmarks.routing                     # needs the extra ray; 4 replicas of the demo
    python -m benchmarks.routing --rate 8 --requests 200 --rounds 8
    python -m benchmarks.routing --simulate          # 8 replicas with a device each, by a clock

Arrivals are random, lengths skewed: most requests are short, one of ten asks for many tokens, and
half of the prompts continue one of a few documents. Both routers, each with replicas of its own,
get the same requests, in turns. Goodput counts the answers whose first token came in time.
"""

import argparse
import asyncio
import random
from typing import NamedTuple

import numpy as np

from benchmarks.load.client import Asker
from benchmarks.load.drive import Run, opened
from benchmarks.load.measures import elapsed
from benchmarks.load.workloads import Conversation, Turn
from benchmarks.simulation import prefixes
from benchmarks.wire import Target
from fastgen_jax.built_in import DEMO_NAME

N_DOCUMENTS, DOCUMENT = 8, "Tom and Anna went to the market to buy apples and a red ball. " * 12
SHORT, LONG, LONG_SHARE = 12, 240, 0.1  # tokens of answers
PORT = 8199


class Seen(NamedTuple):
    """An answer: seconds to its first token, and tokens of the prompt that were cached."""

    first: float
    n_cached: int


def workload(n: int, rate: float, seed: int) -> tuple[list[Conversation], list[float]]:
    """Requests, and the seconds before each."""
    rng, gaps, asked = random.Random(seed), [], []
    for i in range(n):
        gaps.append(rng.expovariate(rate))
        document = f"Story {rng.randrange(N_DOCUMENTS)}. {DOCUMENT}" if rng.random() < 0.5 else ""
        n_tokens = LONG if rng.random() < LONG_SHARE else SHORT
        asked.append([Turn(f"{document}{i} Once upon a time", 0, n_tokens)])
    return asked, gaps


def measure(name: str, asked: list[Conversation], gaps: list[float]) -> tuple[list[Seen], float]:
    """The answers, and the seconds until the last one."""
    target = Target(("127.0.0.1", PORT), f"/{name}")
    fields = {"ignore_eos": True}
    run = Run(Asker(target, "openai", DEMO_NAME, fields, {}, asks_ids=False))
    asyncio.run(opened(run, asked, gaps))
    failed = [record for record in run.records if record.error]
    assert not failed, failed[0]
    return [Seen(record.first, record.n_cached) for record in run.records], elapsed(run.records)


def deploy(n_replicas: int):
    """An application for each router, so that they can take turns."""
    from ray import serve  # pyright: ignore[reportMissingImports]
    from ray.serve.config import RequestRouterConfig  # pyright: ignore[reportMissingImports]

    from fastgen_jax.cluster.application import OURS, application
    from fastgen_jax.cluster.arguments import read

    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 1024}
    configs = read(sizes | {"num_kv_blocks": 64, "replicas": n_replicas})
    for name, routing in (("ours", OURS), ("rays", RequestRouterConfig())):
        serve.run(application(*configs, routing), name=name, route_prefix=f"/{name}")


def row(name: str, seen: list[Seen], seconds: float, in_time: float) -> str:
    first = np.array([each.first for each in seen])
    cached = np.mean([each.n_cached for each in seen])
    goodput = np.count_nonzero(first <= in_time) / seconds
    p50, p95 = np.percentile(first, [50, 95])
    return f"| {name} | {p50:.2f} | {p95:.2f} | {goodput:.2f} | {cached:.0f} |"


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--rate", type=float, default=5.0, help="requests a second")
    parser.add_argument("--requests", type=int, default=80, help="in each round")
    parser.add_argument("--rounds", type=int, default=5, help="for each router")
    parser.add_argument("--in-time", type=float, default=1.0, help="seconds to the first token")
    parser.add_argument("--simulate", action="store_true", help="see simulation/prefixes.py")
    args = parser.parse_args()
    if args.simulate:
        print(prefixes.compare(4000, n_replicas=8, rates=(60, 110)))
    else:
        measure_real(args)


def measure_real(args: argparse.Namespace):
    import ray  # pyright: ignore[reportMissingImports]
    from ray import serve  # pyright: ignore[reportMissingImports]

    from fastgen_jax.cluster.config import ClusterConfig
    from fastgen_jax.cluster.running import start_ray

    start_ray(ClusterConfig(replicas=2 * args.replicas))
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    found: dict[str, list[Seen]] = {"ours": [], "rays": []}
    seconds = dict.fromkeys(found, 0.0)
    try:
        deploy(args.replicas)
        for turn in range(-1, args.rounds):  # the first one warms up
            for name in found:
                seen, took = measure(name, *workload(args.requests, args.rate, seed=turn))
                print(row(f"{name}, round {turn}", seen, took, args.in_time), flush=True)
                if turn >= 0:
                    found[name] += seen
                    seconds[name] += took
    finally:
        serve.shutdown()
        ray.shutdown()
    print("| placed by | TTFT P50, s | P95, s | in time, answers/s | cached tokens a prompt |")
    print("|---|---|---|---|---|")
    for name, title in (("ours", "tokens and prefixes"), ("rays", "requests (Ray's default)")):
        print(row(title, found[name], seconds[name], args.in_time))


if __name__ == "__main__":
    main()
