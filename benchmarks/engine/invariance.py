"""Do tokens depend on who else is in the batch? Requests alone, together, and preempted.

    python -m benchmarks.engine.invariance                   # float32 and bfloat16, the demo model
    python -m benchmarks.engine.invariance --deterministic   # every bit of 1,000 in random company
    python -m benchmarks.engine.invariance --cost            # what that costs, as a ratio

Half of the requests are greedy, half draw with a seed. Alone, a request runs in other programs than
among others, padded to other sizes, whose sums round otherwise: two tokens that are all but equally
likely may then change places, and what follows differs. Not so with deterministic=True: there
tokens, their logprobs and the five best ones' are compared bit by bit, of 64 requests in random
order and bursts, in pools and budgets that are too small for them.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.engine.throughput import SHAPE, Ours, make_workload
from fastgen_jax.built_in import DEMO
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.types import Request
from fastgen_jax.llm import LLM
from fastgen_jax.results import CompletionOutput
from fastgen_jax.sampling_params import SamplingParams

N_REQUESTS, N_NEW = 120, 48
NAMES = ("Anna", "Tom", "Mia", "Ben", "Lily", "Max")
THINGS = ("a red ball", "three apples", "a small dog", "an old key", "a blue hat", "two cats")
TIGHT_POOL = 40  # blocks of 16 tokens for the 16 requests that may run at once: many are preempted
# Of the deterministic runs: blocks, their size, rows, token budget.
COMPANIES = [(40, 16, 16, 48), (60, 16, 64, 300), (70, 8, 20, 33), (48, 16, 32, 128)]
ROUNDS = 4  # of 64 requests in each of the companies: 1,024


class Agreement(NamedTuple):
    """How the samples of one run compare with those of another."""

    n_equal: int
    n_requests: int
    logprob_difference: float  # the largest, over tokens before the first that differs


def make_requests() -> tuple[list[str], list[SamplingParams]]:
    rng = np.random.default_rng(0)
    prompts = [
        f"Once upon a time {rng.choice(NAMES)} had {rng.choice(THINGS)} and {rng.choice(THINGS)}."
        for _ in range(N_REQUESTS)
    ]
    params = [
        SamplingParams(max_tokens=N_NEW, temperature=i % 2, seed=i, logprobs=0, ignore_eos=True)
        for i in range(N_REQUESTS)
    ]
    return prompts, params


def compare(some: list[CompletionOutput], others: list[CompletionOutput]) -> Agreement:
    n_equal, largest = 0, 0.0
    for a, b in zip(some, others, strict=True):
        n_equal += a.token_ids == b.token_ids
        for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=True)):
            if x != y:
                break
            assert a.logprobs and b.logprobs
            largest = max(largest, abs(a.logprobs[i][x].logprob - b.logprobs[i][y].logprob))
    return Agreement(n_equal, len(some), largest)


def samples(llm: LLM, prompts, params) -> list[CompletionOutput]:
    return [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]


def measure(model: str, dtype: str) -> dict[str, Agreement]:
    prompts, params = make_requests()
    options = {"dtype": dtype, "max_model_len": 256, "block_size": 16}
    with LLM(model, num_kv_blocks=1000, enable_prefix_caching=False, **options) as llm:
        alone = [samples(llm, [p], [q])[0] for p, q in zip(prompts, params, strict=True)]
        together = samples(llm, prompts, params)
    tight = {"num_kv_blocks": TIGHT_POOL, "max_num_seqs": 16} | options
    with LLM(model, enable_prefix_caching=False, **tight) as llm:
        preempted = samples(llm, prompts, params)
        n_preemptions = llm.engine.stats().n_preemptions
    assert n_preemptions > 0, "the pool was large enough for all"
    return {
        "alone, together": compare(alone, together),
        f"alone, preempted ({n_preemptions}x)": compare(alone, preempted),
    }


def token_requests(vocab_size: int) -> list[Request]:
    """64 of random tokens, a third of which start alike; with filters and penalties among them."""
    rng, found = np.random.default_rng(0), []
    shared = rng.integers(0, vocab_size, 80).tolist()
    for i in range(64):
        start = shared[: rng.integers(1, 80)] if i % 3 == 0 else []
        params = SamplingParams(
            max_tokens=24,
            temperature=i % 2,
            top_p=0.9 if i % 5 == 0 else 1.0,
            repetition_penalty=1.2 if i % 7 == 0 else 1.0,
            seed=i,
            logprobs=5,
            ignore_eos=True,
        )
        prompt = start + rng.integers(0, vocab_size, rng.integers(1, 60)).tolist()
        found.append(Request(prompt, params))
    return found


def bits(engine: Engine, requests: list[Request], burst: Callable[[], int]) -> list[list[tuple]]:
    """Each request's tokens and logprobs; so many are submitted between two steps."""
    found: dict[int, list[tuple]] = {}
    todo = list(requests)
    while todo or engine.has_work:
        n_now = burst() if engine.has_work else 1
        found |= {engine.submit(request): [] for request in todo[:n_now]}
        del todo[:n_now]
        for output in engine.step():
            if output.token_id is not None and output.logprobs is not None:
                said = output.token_id, output.logprobs.logprob, tuple(output.logprobs.top)
                found[output.request_id].append(said)
    return list(found.values())


def measure_bits(model: str, dtype: str) -> str:
    def start(n_blocks: int, block_size: int, n_rows: int, budget: int) -> Engine:
        config = EngineConfig(
            model=model,
            dtype=dtype,
            deterministic=True,
            num_kv_blocks=n_blocks,
            block_size=block_size,
            max_num_seqs=n_rows,
            max_num_batched_tokens=budget,
            max_model_len=192,
        )
        return Engine(config)

    engine = start(1000, 16, 64, 512)
    requests = token_requests(engine.model_config.vocab_size)
    alone = [bits(engine, [request], lambda: 1)[0] for request in requests]
    engine.close()
    rng, n_equal, n_all, n_preemptions = np.random.default_rng(1), 0, 0, 0
    for sizes in COMPANIES:
        engine = start(*sizes)
        for _ in range(ROUNDS):
            order = rng.permutation(len(requests))
            found = bits(engine, [requests[i] for i in order], lambda: int(rng.integers(0, 12)))
            n_equal += sum(alone[i] == line for i, line in zip(order, found, strict=True))
            n_all += len(found)
        n_preemptions += engine.stats().n_preemptions
        engine.close()
    assert n_preemptions > 0, "the pools were large enough for all"
    return f"{n_equal} of {n_all} equal to the bit, {n_preemptions} preemptions"


def measure_cost(model: str, dtype: str, **options: Any) -> dict[str, str]:
    """Tokens/s of deterministic engines, as shares of the others', turn by turn."""
    options |= {"num_kv_blocks": 400, "max_model_len": 1024}
    plain, fixed = (Ours(Path(model), dtype, deterministic=on, **options) for on in (False, True))
    found = {}
    for name in ("1x32+96", "32x128+64", "16x512+8"):
        ratios = []
        for seed in range(5):
            work = make_workload(name, seed, 0.3, plain.engine.model_config.vocab_size)
            ratios.append(plain.run(work) / fixed.run(work))
        found[name] = f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return found


def print_costs(model: str, dtype: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(SHAPE))
        for title, path, options in [
            (Path(model).name, model, {}),
            ("100 M", directory, {"load_format": "dummy"}),
        ]:
            for name, ratio in measure_cost(path, dtype, **options).items():
                print(f"{title:12} {dtype:9} {name:10} throughput x {ratio}", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Do tokens depend on who else is in the batch?")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--model", nargs="+", default=[str(DEMO)], help="checkpoints")
    parser.add_argument("--deterministic", action="store_true", help="bits, in random company")
    parser.add_argument("--cost", action="store_true", help="throughput with and without")
    arguments = parser.parse_args()
    for model in arguments.model:
        for dtype in arguments.dtype:
            if arguments.cost:
                print_costs(model, dtype)
            elif arguments.deterministic:
                print(f"{Path(model).name:12} {dtype:9} {measure_bits(model, dtype)}", flush=True)
            else:
                for name, found in measure(model, dtype).items():
                    print(
                        f"{dtype:9} {name:28} {found.n_equal:4} of {found.n_requests} equal, "
                        f"logprobs differ by at most {found.logprob_difference:.1e}"
                    )


if __name__ == "__main__":
    main()
