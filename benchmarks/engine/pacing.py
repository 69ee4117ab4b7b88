"""Does max_num_batched_tokens=auto keep to its target, and what does that cost?

    python -m benchmarks.engine.pacing
    python -m benchmarks.engine.pacing --target 20 40 --budget 128 256 512 1024

Engines of the demo model with fixed token budgets, and with auto, take turns at the same requests.
The time between two tokens of a running request is that of a step: `median` and `P95` are of the
steps that hold prompts and decodes, in all rounds; `off` is how far the median is from the target.
Throughput is of prompt and generated tokens, as the share of what the best fixed budget did in the
same round (median of the rounds). The first start measures steps, unless it has been done before.
"""

import argparse
import statistics
import time
from typing import NamedTuple

import numpy as np

from benchmarks.engine.throughput import Workload, make_workload
from fastgen_jax.built_in import DEMO
from fastgen_jax.engine.config import AUTO, EngineConfig
from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.history import StepRecord
from fastgen_jax.engine.types import Request
from fastgen_jax.sampling_params import SamplingParams


class Turn(NamedTuple):
    """What an engine did in one round."""

    gaps: list[float]  # seconds of mixed steps
    rate: float  # tokens per second


def is_mixed(step: StepRecord) -> bool:
    n_single = sum(n_new == 1 for _, n_new, _, _ in step.chunks)
    return 0 < n_single < len(step.chunks)


def turn(engine: Engine, workload: Workload) -> Turn:
    requests = [
        Request(prompt, SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True))
        for prompt, n in zip(workload.prompts, workload.n_new, strict=True)
    ]
    engine.submit_all(requests)
    gaps, n_seen, start = [], engine.history.n_steps, time.perf_counter()
    while engine.has_work:
        engine.step()
        gaps += [step.seconds for step in engine.history.since(n_seen) if is_mixed(step)]
        n_seen = engine.history.n_steps
    return Turn(gaps, workload.n_tokens / (time.perf_counter() - start))


def make_engine(budget: int | str, target: float | None, args: argparse.Namespace) -> Engine:
    return Engine(
        EngineConfig(
            model=str(args.model),
            dtype="float32",
            max_num_seqs=args.sequences,
            max_num_batched_tokens=budget,  # type: ignore[arg-type]
            target_itl_ms=target,
            max_queued_requests=10_000,
            enable_prefix_caching=False,
            compile="all",  # nothing compiles in the background while steps are timed
        )
    )


def show(turns: dict[tuple[int | str, float | None], list[Turn]], engines: dict) -> None:
    fixed = [key for key in turns if key[0] != AUTO]
    best = [max(turns[key][i].rate for key in fixed) for i in range(len(turns[fixed[0]]))]
    print(f"{'budget':>14}{'target':>9}{'median':>9}{'P95':>9}{'off':>8}{'throughput':>12}   ms")
    for (budget, target), found in turns.items():
        gaps = 1e3 * np.concatenate([turn.gaps for turn in found])
        middle, high = np.quantile(gaps, [0.5, 0.95])
        share = statistics.median(turn.rate / top for turn, top in zip(found, best, strict=True))
        n = engines[budget, target].config.max_num_batched_tokens
        name = f"{budget} ({n})" if budget == AUTO else str(n)
        wanted, off = (f"{target:g}", f"{middle / target - 1:+.0%}") if target else ("", "")
        print(f"{name:>14}{wanted:>9}{middle:9.1f}{high:9.1f}{off:>8}{share:12.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--budget", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    add("--target", type=float, nargs="*", default=[15.0, 30.0], help="milliseconds")
    add("--workload", default="64x1200+40", help="REQUESTSxPROMPT+NEW")
    add("--sequences", type=int, default=16, help="that run at once")
    add("--rounds", type=int, default=3)
    add("--model", default=DEMO)
    args = parser.parse_args()
    kinds = [*((n, None) for n in args.budget), *((AUTO, t) for t in (None, *args.target))]
    engines = {(n, target): make_engine(n, target, args) for n, target in kinds}
    turns: dict[tuple[int | str, float | None], list[Turn]] = {kind: [] for kind in kinds}
    for i in range(args.rounds + 1):
        vocab_size = next(iter(engines.values())).model_config.vocab_size
        workload = make_workload(args.workload, i, 0.3, vocab_size)
        for kind in kinds[i % len(kinds) :] + kinds[: i % len(kinds)]:
            taken = turn(engines[kind], workload)
            if i:  # the first round warms up
                turns[kind].append(taken)
    show(turns, engines)


if __name__ == "__main__":
    main()
