"""Speed of this machine's matrix products by dtype, form and rows: what bounds a step.

    python -m benchmarks.models.matmul

As in a step, each of many weights is used once, so that it comes from memory. The barrier keeps XLA
from turning a product round.
"""

import time

import jax
import jax.numpy as jnp
from jax import lax

ROWS = (2, 8, 16, 32, 64, 128, 256, 512)
SHAPE = 4096, 768  # (out, in)
N_WEIGHTS = 24
FORMS = {"x W^T": False, "(W x^T)^T": True}


def gflops(rows: int, dtype: str, weight_first: bool, repeats: int = 10) -> float:
    """The best of some runs, with products accumulated in float32."""

    def dot(a, b):
        contract = (((1,), (1,)), ((), ()))
        return lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)

    @jax.jit
    def run(x, weights):
        for weight in weights:
            y = lax.optimization_barrier(dot(weight, x)).T if weight_first else dot(x, weight)
            x = x + y[:, : x.shape[1]].astype(x.dtype)
        return x

    x = jnp.ones((rows, SHAPE[1]), dtype)
    weights = [jnp.full(SHAPE, 1e-3, dtype) for _ in range(N_WEIGHTS)]
    run(x, weights).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        run(x, weights).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return 2 * rows * SHAPE[0] * SHAPE[1] * N_WEIGHTS / best / 1e9


def main() -> None:
    columns = [(dtype, form) for dtype in ("float32", "bfloat16") for form in FORMS]
    print("GFLOP/s, rows".ljust(14), *(f"{dtype} {form}".rjust(20) for dtype, form in columns))
    for rows in ROWS:
        speeds = [gflops(rows, dtype, FORMS[form]) for dtype, form in columns]
        print(str(rows).ljust(14), *(f"{speed:20.0f}" for speed in speeds), flush=True)


if __name__ == "__main__":
    main()
