"""What it takes to compile a step for accelerators that are not here, and which part takes it.

    pip install libtpu                                        # for TPUs
    pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12    # of jax's version
    python -m benchmarks.engine.compilation                   # v6e and H100: whole and in parts
    python -m benchmarks.engine.compilation --chips v6e --parts whole,adjust

The step of Llama-3-8B that holds every batch, of 768 tokens and 256 rows. Its parts are compiled by
themselves: they overlap (`sample` holds `adjust`, `draw`, and a `score`; a step draws and scores),
and in a step the compiler fuses what here it does not. CPU time is that of all threads and of the
compilers' own processes; it grows by up to a half while others work on the same cores.
"""

import argparse
import os
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from convert.chips import ENVIRONMENT
from fastgen_jax.checkpoints.loading import abstract_model
from fastgen_jax.engine import sampling, step
from fastgen_jax.engine.batch import FLOAT_PARAMS, INT_PARAMS
from fastgen_jax.models.layers import Policy
from tests.engine.whole_steps import (
    LLAMA_3_8B,
    N_SEQS,
    N_TOKENS,
    ROW_TABLES,
    compile_step,
    make_target,
    placed_params,
)
from tests.targets import Target

Part = tuple[Callable, tuple[Any, ...]]  # a function, and what it is compiled for


def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def sampling_parts() -> dict[str, Part]:
    """By name, in the order of a step."""
    logits = array(jnp.float32, N_SEQS, LLAMA_3_8B.vocab_size)
    rows = array(jnp.int32, N_SEQS)
    packed = array(jnp.int32, N_SEQS, len(FLOAT_PARAMS) + len(INT_PARAMS))
    params = jax.eval_shape(sampling.RowParams.unpack, packed)
    known = array(jnp.int32, N_SEQS + 1, LLAMA_3_8B.max_position)
    arrays: list[Any] = [known, *ROW_TABLES]
    tables = sampling.RowTables(*arrays)
    return {
        "score": (sampling.score, (logits, rows, rows)),
        "adjust": (sampling.adjust, (logits, params, tables, rows, rows)),
        "keep_likely": (sampling.keep_likely, (logits, params)),
        "draw": (sampling.draw, (logits, params, rows)),
        "sample": (sampling.sample, (logits, params, tables, rows, rows)),
    }


def model_parts(target: Target) -> dict[str, Part]:
    """Those of a model; without attention, which does not take long."""
    model = abstract_model(LLAMA_3_8B, Policy("bfloat16", "bfloat16", target.mesh))
    treedef, leaves = jax.tree.structure(model), placed_params(model, target.mesh)
    tokens = array(jnp.int32, N_TOKENS)
    hidden = array(jnp.bfloat16, N_TOKENS, LLAMA_3_8B.hidden_size)
    drawn = array(jnp.bfloat16, N_SEQS, LLAMA_3_8B.hidden_size)

    def of_model(use: Callable) -> Callable:
        return lambda leaves, x: use(jax.tree.unflatten(treedef, leaves), x)

    return {
        "embed": (of_model(lambda model, ids: model.embed(ids)), (leaves, tokens)),
        "mlp": (of_model(lambda model, x: model.layers[0].mlp(x)), (leaves, hidden)),
        "unembed": (of_model(lambda model, x: model.unembed(x)), (leaves, drawn)),
        "pool": (step.pool, (hidden, array(jnp.int32, N_SEQS + 1), array(jnp.int32, N_SEQS))),
    }


def cpu_seconds() -> float:
    """Of this process and those that it has started, and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def rows(chip: str, wanted: list[str]) -> Iterator[tuple[str, ...]]:
    """The table, as they are compiled."""
    target = make_target(chip)
    target.compile(lambda x: x + 1, array(jnp.float32, 8))  # the compiler starts
    parts = model_parts(target) | sampling_parts()
    compilations = {"whole": lambda: compile_step(LLAMA_3_8B, target)}
    for name, (function, args) in parts.items():
        compilations[name] = lambda f=function, a=args: target.compile(lambda *x: f(*x), *a)
    for name, compile_it in compilations.items():
        if wanted and name not in wanted:
            continue
        cpu, wall = cpu_seconds(), time.perf_counter()
        compile_it()
        yield chip, name, f"{cpu_seconds() - cpu:.1f}", f"{time.perf_counter() - wall:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine.compilation", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--chips", default="v6e,h100", help="comma-separated")
    parser.add_argument("--parts", default="", help="comma-separated; default: all")
    given = parser.parse_args()
    os.environ |= ENVIRONMENT
    jax.config.update("jax_platforms", "cpu")
    print("".join(f"{cell:>14}" for cell in ("chip", "part", "CPU s", "wall s")))
    for chip in given.chips.split(","):
        for row in rows(chip, given.parts.split(",") if given.parts else []):
            print("".join(f"{cell:>14}" for cell in row), flush=True)


if __name__ == "__main__":
    main()
