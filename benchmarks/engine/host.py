"""Host time of one engine step on a device that takes no time: plan, pack, dispatch, commit.

    python -m benchmarks.engine.host                 # 256 and 512 sequences

Every sequence decodes; half of the steps also carry a chunk of a prompt. Other work on the machine
only ever slows a step, so the fastest one counts; the median is printed beside it.

Last, CPU time of dispatching a program to this machine's CPU. The engine's programs take all of a
model's arrays, also those that they do not need (keep_unused): a step needs each, but what draws
constrained rows needs few, and jax would leave the others out.
"""

import argparse
import statistics
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from fastgen_jax.engine import startup
from fastgen_jax.engine.batch import MaskedShape, Shape
from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.programs import Programs
from fastgen_jax.engine.runner import make_shapes
from fastgen_jax.engine.step import StepResult
from fastgen_jax.engine.types import Request
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.sampling_params import MAX_LOGPROBS, SamplingParams

N_STEPS = 200
PROMPT_LENGTH = 500
N_ARRAYS = 291  # parameters of Llama-3-8B


class NullRunner:
    """A device that answers every row with token 1 at once."""

    def __init__(self, config: startup.ResolvedConfig):
        shapes = make_shapes(
            smallest=16,
            max_batched_tokens=config.max_num_batched_tokens,
            max_seqs=config.max_num_seqs,
            table_width=config.table_width,
            tile=1024,
        )
        self.programs = Programs(
            lambda key: None, shapes, lambda shape: MaskedShape(shape.n_hidden, 1)
        )
        n = config.max_num_seqs
        tops = np.zeros((n, MAX_LOGPROBS), np.float32)
        ids = tops.astype(np.int32)
        tokens, logprobs, yes = np.ones(n, np.int32), np.zeros(n, np.float32), np.ones(n, bool)
        self.result = StepResult(tokens, logprobs, yes, yes, ids, tops)

    @property
    def shapes(self) -> list[Shape]:
        return self.programs.ready

    def dispatch(self, batch, tables) -> None:
        pass

    def fetch(self, result) -> StepResult:
        return self.result


def make_engine(n_seqs: int) -> Engine:
    """An engine with `n_seqs` decoding sequences and a queue of prompts."""
    config = startup.ResolvedConfig(
        model="null",
        max_model_len=4096,
        block_size=32,
        num_kv_blocks=n_seqs * 40,
        max_num_batched_tokens=n_seqs + 256,
        max_num_seqs=n_seqs + 1,
        max_queued_requests=10**6,
        memory_fraction=0.9,
        enable_prefix_caching=True,
    )
    model_config = ModelConfig(
        family="null", vocab_size=32000, hidden_size=2, n_layers=1, n_heads=1, n_kv_heads=1,
        head_dim=2, ffn_size=2, max_position=4096,
    )  # fmt: skip
    started = startup.Started(config, model_config, {}, NullRunner(config))  # type: ignore
    with mock.patch.object(startup, "start", return_value=started):
        engine = Engine(config)
    rng = np.random.default_rng(0)
    for _ in range(n_seqs):
        prompt = rng.integers(0, 32000, PROMPT_LENGTH).tolist()
        engine.submit(Request(prompt, SamplingParams(max_tokens=3000)))
    while engine.stats().n_running < n_seqs or engine.stats().n_waiting:
        engine.step()
    for _ in range(N_STEPS):  # each takes the one row left for a few steps
        prompt = rng.integers(0, 32000, PROMPT_LENGTH).tolist()
        engine.submit(Request(prompt, SamplingParams(max_tokens=2)))
    return engine


def measure(n_seqs: int) -> dict[str, list[float]]:
    """Milliseconds of each phase of each step."""
    engine = make_engine(n_seqs)
    times: dict[str, list[float]] = {name: [] for name in engine.timings}
    for _ in range(N_STEPS):
        before = dict(engine.timings)
        engine.step()
        for name, seconds in engine.timings.items():
            times[name].append((seconds - before[name]) * 1e3)
    times["all"] = [sum(phases) for phases in zip(*times.values(), strict=True)]
    return times


def dispatch_times(n_arrays: int, n_used: int, n_repeats: int = 1000) -> list[float]:
    """Milliseconds of this thread to dispatch a program that takes so many arrays and needs some
    of them: the least of those in which all are handed over, and of those in which these are.
    """
    arrays = tuple(jnp.ones(8) for _ in range(n_arrays))

    def program(arrays):
        return sum(x[0] for x in arrays[:n_used])

    programs = [
        jax.jit(program, keep_unused=keep).lower(arrays).compile() for keep in (True, False)
    ]
    least = [float("inf")] * len(programs)
    for _ in range(n_repeats):
        for i, run in enumerate(programs):  # in turns
            start = time.thread_time()
            result = run(arrays)
            least[i] = min(least[i], (time.thread_time() - start) * 1e3)
            result.block_until_ready()
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description="Host time of one engine step.")
    parser.add_argument("n_seqs", type=int, nargs="*", default=[256, 512])
    print("sequences  phase     fastest   median (ms)")
    for n_seqs in parser.parse_args().n_seqs:
        for name, times in measure(n_seqs).items():
            print(f"{n_seqs:9}  {name:8} {min(times):8.3f} {statistics.median(times):8.3f}")
    print("   arrays   needed  all given  needed given (ms to dispatch)")
    for n_used in (N_ARRAYS, 2):
        given, needed = dispatch_times(N_ARRAYS, n_used)
        print(f"{N_ARRAYS:9} {n_used:8} {given:10.3f} {needed:13.3f}")


if __name__ == "__main__":
    main()
