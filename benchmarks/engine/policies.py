"""The policies that FastGen beat, on our engine: same model, kernels, cache and requests.

    python -m benchmarks.engine.policies                      # the demo, on this machine
    python -m benchmarks.engine.policies --policies splitfuse vllm-2023 --clients 8 --requests 128

Clients ask in the engine's thread, one request after the other. Lengths are FastGen's, less long
where the model's context asks for it. Turns are taken in rounds, each with other requests; the
median of the rounds counts. Those policies that run whole prompts get steps that hold the longest.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import kept
from benchmarks.policies import POLICIES
from benchmarks.simulation import workloads
from benchmarks.simulation.measures import LEVELS, Record
from benchmarks.simulation.setup import WHOLE
from benchmarks.simulation.validation import Driver, medians
from fastgen_jax.built_in import DEMO
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.engine import Engine

FOLDER = Path(__file__).parents[1] / "results"
SHOWN = (
    "requests/s", "tokens/s", "mean latency", "TTFT P50", "TTFT P95", "token P50", "token P95",
    "token P99",
)  # fmt: skip


def make_engine(args: argparse.Namespace, name: str) -> Engine:
    config = EngineConfig(
        model=args.model,
        max_model_len=args.max_model_len,
        max_num_batched_tokens=args.max_model_len if name in WHOLE else args.budget,
        max_num_seqs=args.max_seqs,
        num_kv_blocks=args.num_kv_blocks,
        memory_fraction=0.1,
        enable_prefix_caching=False,
    )
    return Engine(config, policy=POLICIES[name])


def measure(driver: Driver, args: argparse.Namespace, workload: str, seed: int) -> dict[str, float]:
    prompt, new = map(int, workload.split("/"))
    jobs = workloads.normal(prompt, new, longest=args.max_model_len, seed=seed)
    record = Record()
    driver.run(workloads.of_clients(jobs, args.clients, args.requests), args.clients, record)
    return record.summary()


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    drivers = {name: Driver(make_engine(args, name)) for name in args.policies}
    rows = []
    for workload in args.workloads:
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in drivers}
        for seed, name in itertools.product(range(args.rounds + 1), drivers):
            found = measure(drivers[name], args, workload, seed)
            if seed > 0:  # the first round warms up
                rounds[name].append(found)
        for name, driver in drivers.items():
            rows.append(_row(workload, name, medians(rounds[name]), driver.engine))
    for driver in drivers.values():
        driver.engine.close()
    return rows


def _row(workload: str, name: str, found: dict[str, float], engine: Engine) -> dict[str, Any]:
    levels = {f"effective@{level}": found[f"effective@{level}"] for level in LEVELS}
    row = {"workload": workload, "policy": name} | {key: found[key] for key in SHOWN} | levels
    return row | {"preemptions so far": engine.stats().n_preemptions}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=str(DEMO))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--workloads", nargs="+", default=["1200/60", "1200/128", "500/150"])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=96, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=256, help="tokens of a step")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-seqs", type=int, default=32)
    parser.add_argument("--num-kv-blocks", type=int, help="few of them make some give way")
    parser.add_argument("--save", action="store_true", help="below benchmarks/results")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    rows = compare(args)
    text = f"# Policies on one engine, {args.clients} clients\n\n{kept.markdown(rows)}"
    print(text)
    if args.save:
        kept.save(FOLDER, "policies", rows, text, is_measured=True)


if __name__ == "__main__":
    main()
