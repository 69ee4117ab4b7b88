"""Speed of this machine's matrix products by dtype, form and rows: what bounds a step.

    python -m benchmarks.models.matmul

As in a step, each of many weights is used once, so that it comes from memory. The barrier keeps XLA
from turning a product round; `ours` is pallas_kernels.cpu's. They take turns.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels import cpu_product, has_cpu_library

ROWS = (1, 2, 8, 16, 32, 64, 128, 256, 512)
SHAPE = 4096, 768  # (out, in)
N_WEIGHTS = 24


def dot(a, b):
    contract = (((1,), (1,)), ((), ()))
    return lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)


FORMS: dict[str, Callable[[Array, Array], Array]] = {
    "x W^T": lambda x, weight: dot(x.astype(weight.dtype), weight),
    "(W x^T)^T": lambda x, weight: lax.optimization_barrier(dot(weight, x.astype(weight.dtype))).T,
}


def gflops(rows: int, dtype: str, repeats: int = 10) -> list[float]:
    """Of each form the best of some runs, with products accumulated in float32."""

    def program(form):
        def run(x, weights):
            for weight in weights:
                x = x + form(x, weight)[:, : x.shape[1]]
            return x

        return jax.jit(run)

    x = jnp.ones((rows, SHAPE[1]))
    weights = [jnp.full(SHAPE, 1e-3, dtype) for _ in range(N_WEIGHTS)]
    programs = [program(form) for form in FORMS.values()]
    best = [float("inf")] * len(programs)
    for _ in range(repeats + 1):  # the first one compiles
        for i, run in enumerate(programs):
            started = time.perf_counter()
            run(x, weights).block_until_ready()
            best[i] = min(best[i], time.perf_counter() - started)
    return [2 * rows * SHAPE[0] * SHAPE[1] * N_WEIGHTS / seconds / 1e9 for seconds in best]


def main() -> None:
    if has_cpu_library():
        FORMS["ours"] = cpu_product
    dtypes = "float32", "bfloat16"
    print("GFLOP/s, rows".ljust(14), *(f"{d} {form}".rjust(20) for d in dtypes for form in FORMS))
    for rows in ROWS:
        speeds = [speed for dtype in dtypes for speed in gflops(rows, dtype)]
        print(str(rows).ljust(14), *(f"{speed:20.0f}" for speed in speeds), flush=True)


if __name__ == "__main__":
    main()
