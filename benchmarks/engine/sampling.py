"""What it takes to choose the tokens of a step, by what its rows ask for: milliseconds here.

    python -m benchmarks.engine.sampling
    python -m benchmarks.engine.sampling --rows 1,8 --vocab 151936

Logits are random, all rows ask for the same; best of some runs, the kinds in turns.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from fastgen_jax.engine.batch import NO_PARAMS, HostTables
from fastgen_jax.engine.sampling import RowParams, RowTables, sample

KINDS: dict[str, dict[str, float]] = {
    "greedy": {},
    "random": {"temperature": 1},
    "top_p": {"temperature": 1, "top_p": 0.95},
    "top_k": {"temperature": 1, "top_k": 20},
    "top_k, top_p": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "min_p": {"temperature": 1, "min_p": 0.05},
    "penalties": {"presence_penalty": 1},
    "logprobs": {"n_logprobs": 20},
}
CONTEXT = 4096  # tokens of a row at most


def row_params(n_rows: int, wanted: dict[str, float]) -> RowParams:
    """Neutral but for what is wanted."""
    neutral = RowParams.unpack(jnp.asarray(np.tile(NO_PARAMS, (n_rows, 1))))
    changes = {name: jnp.full_like(getattr(neutral, name), x) for name, x in wanted.items()}
    return neutral._replace(**changes)


def milliseconds(n_rows: int, vocab_size: int, repeats: int = 10) -> list[float]:
    """Of each kind, by one program as in a step."""
    logits = 3 * jax.random.normal(jax.random.key(0), (n_rows, vocab_size))
    rows = jnp.arange(n_rows, dtype=jnp.int32)
    known = jnp.zeros((n_rows + 1, CONTEXT), jnp.int32)
    tables = RowTables(known, *jax.tree.map(jnp.asarray, HostTables(n_rows, 1, 1).of_device))
    n_tokens = jnp.full(n_rows, CONTEXT // 2, jnp.int32)
    program = jax.jit(lambda logits, params: sample(logits, params, tables, rows, n_tokens))
    every = [row_params(n_rows, wanted) for wanted in KINDS.values()]
    best = [float("inf")] * len(every)
    for _ in range(repeats + 1):  # the first one compiles
        for i, params in enumerate(every):
            started = time.perf_counter()
            jax.block_until_ready(program(logits, params))
            best[i] = min(best[i], time.perf_counter() - started)
    return [1e3 * seconds for seconds in best]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine.sampling", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rows", default="1,8,32", help="comma-separated (default: %(default)s)")
    parser.add_argument(
        "--vocab", default="32000,151936", help="comma-separated (default: %(default)s)"
    )
    given = parser.parse_args()
    print("vocabulary    rows", *(kind.rjust(13) for kind in KINDS))
    for vocab_size in map(int, given.vocab.split(",")):
        for n_rows in map(int, given.rows.split(",")):
            times = milliseconds(n_rows, vocab_size)
            print(f"{vocab_size:10} {n_rows:7}", *(f"{ms:13.2f}" for ms in times), flush=True)


if __name__ == "__main__":
    main()
