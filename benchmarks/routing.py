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
import json
import random
import time
from typing import NamedTuple

import httpx
import numpy as np

from benchmarks.simulated_replicas import print_table

N_DOCUMENTS, DOCUMENT = 8, "Tom and Anna went to the market to buy apples and a red ball. " * 12
SHORT, LONG, LONG_SHARE = 12, 240, 0.1  # tokens of answers
PORT = 8199


class Asked(NamedTuple):
    """A request: seconds from the start, prompt, tokens."""

    time: float
    prompt: str
    n_tokens: int


class Seen(NamedTuple):
    """An answer: seconds to its first token, and tokens of the prompt that were cached."""

    first: float
    n_cached: int


def workload(n: int, rate: float, seed: int) -> list[Asked]:
    rng, now, asked = random.Random(seed), 0.0, []
    for i in range(n):
        now += rng.expovariate(rate)
        document = f"Story {rng.randrange(N_DOCUMENTS)}. {DOCUMENT}" if rng.random() < 0.5 else ""
        n_tokens = LONG if rng.random() < LONG_SHARE else SHORT
        asked.append(Asked(now, f"{document}{i} Once upon a time", n_tokens))
    return asked


async def ask(client: httpx.AsyncClient, name: str, asked: Asked, start: float) -> Seen:
    await asyncio.sleep(max(0.0, start + asked.time - time.monotonic()))
    body = {"prompt": asked.prompt, "max_tokens": asked.n_tokens, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
    sent, first, usage = time.monotonic(), None, {}
    async with client.stream("POST", f"/{name}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            first = first or time.monotonic() - sent
            if line.startswith("data: {"):
                usage = json.loads(line[6:]).get("usage") or usage
    assert first is not None
    return Seen(first, usage["prompt_tokens_details"]["cached_tokens"])


async def measure(name: str, asked: list[Asked]) -> tuple[list[Seen], float]:
    """The answers, and the seconds until the last one."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{PORT}", timeout=600, limits=limits, trust_env=False
    ) as client:
        start = time.monotonic()
        seen = await asyncio.gather(*(ask(client, name, each, start) for each in asked))
        return list(seen), time.monotonic() - start


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
    parser.add_argument("--simulate", action="store_true", help="see simulated_replicas.py")
    args = parser.parse_args()
    if args.simulate:
        print_table(4000, n_replicas=8, rates=(60, 110))
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
                asked = workload(args.requests, args.rate, seed=turn)
                seen, took = asyncio.run(measure(name, asked))
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
