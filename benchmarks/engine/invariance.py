"""Do tokens depend on who else is in the batch? Requests alone, together, and preempted.

    python -m benchmarks.engine.invariance                   # float32 and bfloat16, the demo model

Half of the requests are greedy, half draw with a seed. Alone, a request runs in other programs than
among others, padded to other sizes, whose sums round otherwise: two tokens that are all but equally
likely may then change places, and what follows differs.
"""

import argparse
from typing import NamedTuple

import numpy as np

from fastgen_jax.built_in import DEMO
from fastgen_jax.llm import LLM
from fastgen_jax.results import CompletionOutput
from fastgen_jax.sampling_params import SamplingParams

N_REQUESTS, N_NEW = 120, 48
NAMES = ("Anna", "Tom", "Mia", "Ben", "Lily", "Max")
THINGS = ("a red ball", "three apples", "a small dog", "an old key", "a blue hat", "two cats")
TIGHT_POOL = 40  # blocks of 16 tokens for the 16 requests that may run at once: many are preempted


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


def measure(dtype: str) -> dict[str, Agreement]:
    prompts, params = make_requests()
    options = {"dtype": dtype, "max_model_len": 256, "block_size": 16}
    with LLM(str(DEMO), num_kv_blocks=1000, enable_prefix_caching=False, **options) as llm:
        alone = [samples(llm, [p], [q])[0] for p, q in zip(prompts, params, strict=True)]
        together = samples(llm, prompts, params)
    tight = {"num_kv_blocks": TIGHT_POOL, "max_num_seqs": 16} | options
    with LLM(str(DEMO), enable_prefix_caching=False, **tight) as llm:
        preempted = samples(llm, prompts, params)
        n_preemptions = llm.engine.stats().n_preemptions
    assert n_preemptions > 0, "the pool was large enough for all"
    return {
        "alone, together": compare(alone, together),
        f"alone, preempted ({n_preemptions}x)": compare(alone, preempted),
    }


def main():
    parser = argparse.ArgumentParser(description="Do tokens depend on who else is in the batch?")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    for dtype in parser.parse_args().dtype:
        for name, found in measure(dtype).items():
            print(
                f"{dtype:9} {name:28} {found.n_equal:4} of {found.n_requests} equal, "
                f"logprobs differ by at most {found.logprob_difference:.1e}"
            )


if __name__ == "__main__":
    main()
