"""Where a step's time goes on this machine: products, attention, and what lies between.

    python -m benchmarks.models.step
    python -m benchmarks.models.step --dtype bfloat16 --backends cpu

The layers of the 125M Llama of benchmarks.engine.throughput, without embedding and logits, in three
programs that take turns: whole, without attention, and its products one after the other. The rest
of a step without attention is elementwise work and gaps. Not so with 32 to 127 rows in bfloat16:
there the products by themselves are slower than in a step, for a reason not yet known. Other work
on the machine only ever slows a run, so the fastest one counts. CPU time is that of all threads.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from benchmarks.engine.throughput import SHAPE
from benchmarks.pallas_kernels.attention import Case, make_meta
from fastgen_jax.models import create
from fastgen_jax.models.product import gated_product, product
from pallas_kernels import cache_dtype, select

BLOCK_SIZE = 64
BATCHES = {
    "32 decodes, context 290": Case(32, 290),
    "12 decodes, context 1056": Case(12, 1056),
    "two prompts of 256": Case(0, 1, ((256, 256), (256, 256))),
    "half of a prompt of 1024": Case(0, 1, ((1024, 512),)),
}


def products(model, x: Array) -> Array:
    """All products of the layers, gates included, each of what the one before gave."""
    for layer in model.layers:
        attention, mlp = layer.attention, layer.mlp
        parts = (attention.qkv, product), (attention.out, product), (mlp.gate_up, gated_product)
        for linear, multiply in (*parts, (mlp.down, product)):
            weight = linear.weight[...]
            x = multiply(x[:, : weight.shape[1]], weight)
    return x


def programs(model, case: Case, backends: list[str]) -> dict[str, tuple[Callable, Any, tuple]]:
    """By name, with weights and caches; each returns what needs all work done, and the caches."""
    meta, leaves_of = make_meta(case, BLOCK_SIZE), nnx.split(model)
    graph, state = leaves_of
    n_blocks, c = int(meta.block_tables.max()) + 1, model.config
    stored = cache_dtype(str(model.layers[0].mlp.down.weight[...].dtype), "cpu")
    shape = n_blocks, c.n_kv_heads, 2, BLOCK_SIZE, c.head_dim
    token_ids = jnp.arange(len(meta.positions), dtype=jnp.int32) % c.vocab_size

    def layers(attention, state, caches):
        def attend(q, k, v, cache, **options):
            return attention(q, k, v, cache, meta, **options)

        return nnx.merge(graph, state).hidden_states(token_ids, meta.positions, caches, attend)

    def alone(state, caches):
        model = nnx.merge(graph, state)
        return products(model, model.embed(token_ids)), caches

    def compiled(function):
        caches = tuple(jnp.ones(shape, stored) for _ in range(c.n_layers))
        return jax.jit(function, donate_argnums=1).lower(state, caches).compile(), state, caches

    def nothing(q, k, v, cache, meta, **_):
        return q + k.sum() + v.sum(), cache

    wanted = {"products": alone, "without attention": partial(layers, nothing)}
    wanted |= {name: partial(layers, select(name)) for name in backends}
    return {name: compiled(function) for name, function in wanted.items()}


def measure(model, case: Case, backends: list[str], repeats: int) -> dict[str, tuple[float, float]]:
    """Milliseconds of each program, by the wall's clock and of CPU time: the least of each."""
    known = programs(model, case, backends)
    best = dict.fromkeys(known, (float("inf"), float("inf")))
    for _ in range(repeats + 1):
        for name, (run, state, caches) in known.items():
            wall, cpu = time.perf_counter(), time.process_time()
            _, caches = jax.block_until_ready(run(state, caches))
            took = 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)
            known[name] = run, state, caches
            best[name] = min(best[name][0], took[0]), min(best[name][1], took[1])
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--backends", nargs="+", default=["cpu", "xla"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", default="", help="batches whose name begins so")
    args = parser.parse_args()
    print("ms of wall (of CPU time)".ljust(38), "program", sep="")
    for dtype in args.dtype:
        model = create(SHAPE, nnx.Rngs(0), dtype)
        for name, case in BATCHES.items():
            if name.startswith(args.only):
                for program, (wall, cpu) in measure(
                    model, case, args.backends, args.repeats
                ).items():
                    print(f"{dtype:9} {name:28} {program:18} {wall:8.1f} ({cpu:.1f})", flush=True)


if __name__ == "__main__":
    main()
