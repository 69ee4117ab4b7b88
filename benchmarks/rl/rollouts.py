"""What a weight update between rounds of rollouts costs, and what samples of one prompt share.

    python -m benchmarks.rl.rollouts

Pairs of rounds, in turns the other way round: 256 samples of prompts that no round had before, with
an update to other weights first and without one. A round with an update is divided by its
neighbour without, so that what else the machine does is in both; medians and quartiles of these
ratios count. What the engine computed of the prompts is counted by its own statistics.
"""

import argparse
import statistics
import time

import jax
import numpy as np
from flax import nnx

from fastgen_jax.built_in import DEMO
from fastgen_jax.llm import LLM
from fastgen_jax.models import load
from fastgen_jax.sampling_params import SamplingParams

PROMPT_LENGTH, BLOCK_SIZE = 130, 16


def generate(llm: LLM, args: argparse.Namespace, rng: np.random.Generator) -> float:
    """Seconds that one round takes."""
    shape = args.samples // args.group, PROMPT_LENGTH
    prompts = rng.integers(6, llm.engine.model_config.vocab_size, shape).tolist()
    params = SamplingParams(n=args.group, max_tokens=args.new, ignore_eos=True, logprobs=0)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert sum(len(o.outputs) for o in outputs) == args.samples
    return time.perf_counter() - start


def update(llm: LLM, weights: nnx.State) -> float:
    start = time.perf_counter()
    llm.update_weights(weights)
    return time.perf_counter() - start


def print_quartiles(name: str, values: list[float], digits: int) -> None:
    low, middle, high = statistics.quantiles(values, n=4)
    print(f"{name:42} {middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})")


def print_sharing(llm: LLM, args: argparse.Namespace, rng: np.random.Generator) -> None:
    before = llm.engine.stats()
    generate(llm, args, rng)
    after = llm.engine.stats()
    n_asked = after.n_prefix_queries - before.n_prefix_queries
    n_shared = after.n_prefix_hits - before.n_prefix_hits
    n_once = args.samples // args.group * PROMPT_LENGTH
    print(
        f"prompt tokens of a round: {n_asked} asked for, {n_asked - n_shared} computed; "
        f"each prompt once is {n_once}, and blocks have {BLOCK_SIZE}"
    )


def main():
    parser = argparse.ArgumentParser(description="What does a weight update between rounds cost?")
    parser.add_argument("--samples", type=int, default=256, help="of a round")
    parser.add_argument("--group", type=int, default=16, help="samples of one prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of a sample")
    parser.add_argument("--pairs", type=int, default=12)
    args = parser.parse_args()
    model, rng = load(DEMO, dtype="float32"), np.random.default_rng(0)
    weights = nnx.state(model), jax.tree.map(lambda x: x * 1.001, nnx.state(model))
    options = {"max_model_len": PROMPT_LENGTH + args.new, "block_size": BLOCK_SIZE}
    options |= {"max_num_seqs": min(args.samples, 256), "max_num_batched_tokens": 1024}
    with LLM.from_module(model, **options) as llm:
        generate(llm, args, rng)
        print_sharing(llm, args, rng)
        ratios, updates, rounds = [], [], []
        for pair in range(args.pairs):
            seconds = {}
            for is_updated in (True, False) if pair % 2 else (False, True):
                seconds[is_updated] = update(llm, weights[pair % 2]) if is_updated else 0.0
                updates += [seconds[True]] if is_updated else []
                seconds[is_updated] += generate(llm, args, rng)
            ratios.append(seconds[True] / seconds[False])
            rounds.append(seconds[False])
    print_quartiles("seconds of a round without an update", rounds, 2)
    print_quartiles("seconds of an update", updates, 4)
    print_quartiles("with an update over without", ratios, 3)


if __name__ == "__main__":
    main()
