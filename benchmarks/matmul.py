"""Speed of this machine's matrix products by dtype, weight layout and rows: what bounds a step.

python benchmarks/matmul.py
"""

import time

import jax
import jax.numpy as jnp
from jax import lax

ROWS = (1, 8, 32, 256)
WEIGHTS = ((768, 1280), (768, 4096), (768, 32000))
LAYOUTS = {"(in, out)": 0, "(out, in)": 1}  # which axis of the weight is contracted


def gflops(rows: int, n_in: int, n_out: int, dtype: str, axis: int, repeats: int = 20) -> float:
    """The best of some runs, with products accumulated in float32."""
    contract = (((1,), (axis,)), ((), ()))
    product = jax.jit(
        lambda x, w: lax.dot_general(x, w, contract, preferred_element_type=jnp.float32)
    )
    x = jnp.ones((rows, n_in), dtype)
    w = jnp.ones((n_in, n_out) if axis == 0 else (n_out, n_in), dtype)
    product(x, w).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        product(x, w).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return 2 * rows * n_in * n_out / best / 1e9


def main() -> None:
    columns = [(dtype, layout) for dtype in ("float32", "bfloat16") for layout in LAYOUTS]
    print("GFLOP/s".ljust(24), *(f"{dtype} {layout}".rjust(20) for dtype, layout in columns))
    for n_in, n_out in WEIGHTS:
        for rows in ROWS:
            speeds = [gflops(rows, n_in, n_out, dtype, LAYOUTS[la]) for dtype, la in columns]
            label = f"{rows} x {n_in} x {n_out}".ljust(24)
            print(label, *(f"{speed:20.0f}" for speed in speeds), flush=True)


if __name__ == "__main__":
    main()
