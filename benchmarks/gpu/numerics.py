"""The sections of benchmarks/gpu/check.py that compare kernels with the float64 oracle.

At toy size the kernels are interpreted.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.gpu.table import BLOCK, Row, Sizes
from pallas_kernels import COMPUTE_CAPABILITIES, PLATFORMS, select
from pallas_kernels.gpu import attention
from tests.pallas_kernels.attention_cases import (
    CASES,
    Case,
    Implementation,
    Mismatch,
    Result,
    check,
    expected,
    gpu_plan,
    hopper_plan,
    make_batch,
)

NAMES = [name for name, platform in PLATFORMS.items() if platform == "gpu"]


def missing(name: str, sizes: Sizes) -> str:
    """Why an attention backend cannot run here; empty if it can."""
    try:
        select(name)
    except ImportError as error:
        return str(error)
    if sizes.is_toy:
        return "" if name == "pallas_gpu" else "it is not interpreted"
    found = getattr(jax.devices()[0], "compute_capability", None)
    wanted = COMPUTE_CAPABILITIES.get(name, found)
    return "" if wanted == found else f"it is for compute capability {wanted}, this is {found}"


def backends(sizes: Sizes) -> dict[str, Callable]:
    """The attention functions that run here."""
    device = jax.devices()[0]
    found = {name: select(name, device) for name in NAMES if not missing(name, sizes)}
    if sizes.is_toy:
        found["pallas_gpu"] = functools.partial(attention.ragged_paged_attention, interpret=True)
    return found


class Trial(NamedTuple):
    """A case of attention and its contexts, the case's own if None."""

    case: Case
    contexts: list[tuple[int, int]] | None = None

    def __str__(self) -> str:
        return str(self.case) if self.contexts is None else f"{self.case}, contexts {self.contexts}"


LLAMA = Case(dtypes=("bfloat16", "bfloat16"), heads=(32, 8), head_size=128, n_cells=BLOCK)
LONG = dataclasses.replace(LLAMA, n_tokens=256, n_rows=3, longest=8192)
LONG_CONTEXTS = [(8000, 1), (3000, 5), (1500, 200)]
LONG_TRIALS = [
    Trial(dataclasses.replace(LONG, dtypes=("bfloat16", dtype)), LONG_CONTEXTS)
    for dtype in ("bfloat16", "float8_e4m3fn")
]


def numerics(sizes: Sizes) -> Iterator[Row]:
    """Every attention case against the float64 oracle, and contexts that are split."""
    trials = [Trial(case) for case in CASES[: sizes.n_cases]]
    trials += [] if sizes.is_toy else LONG_TRIALS
    for name in NAMES:
        if reason := missing(name, sizes):
            yield Row(f"{name}, every feature", note=f"skipped: {reason}")
    for name, function in backends(sizes).items():
        is_for_hopper = name == "mosaic_gpu"
        make_plan = hopper_plan if is_for_hopper else gpu_plan
        tested = Implementation(name, jit(function), plan=make_plan, is_for_hopper=is_for_hopper)
        with ThreadPoolExecutor(sizes.n_threads) as pool:
            problems = list(pool.map(functools.partial(problem, tested), trials))
        wrong = [(trial, text) for trial, text in zip(trials, problems, strict=True) if text]
        for trial, text in wrong:
            yield Row(f"{name} {trial}", note=text, is_ok=False)
        summary = f"{len(trials) - len(wrong)} of {len(trials)} cases match the float64 oracle"
        yield Row(f"{name}, every feature", note=summary, is_ok=not wrong)


def jit(function: Callable) -> Callable:
    donated = "kv_cache", "kv_scales"
    return jax.jit(function, static_argnames="spec", donate_argnames=donated)


@functools.cache
def _prepared(case: Case, contexts: tuple[tuple[int, int], ...] | None):
    batch = make_batch(case, None if contexts is None else list(contexts))
    return batch, expected(case, batch)


def problem(tested: Implementation, trial: Trial) -> str:
    """What is wrong with the results; empty if nothing is."""
    try:
        contexts = None if trial.contexts is None else tuple(trial.contexts)
        case = tested.fit(trial.case)
        batch, want = _prepared(case, contexts)
        check(case, batch, tested(case, batch), want)
    except Exception as error:  # the other cases are to be seen as well
        return first_line(error)
    return ""


def first_line(error: Exception) -> str:
    """The error's kind and the first line of its text."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:200]}"


def far_blocks(sizes: Sizes) -> Iterator[Row]:
    """A small batch whose blocks are the last ones of the largest pool that the contract allows."""
    case = dataclasses.replace(
        LLAMA, heads=sizes.heads, head_size=sizes.head_size, n_tokens=32, n_rows=4, longest=256
    )
    contexts = [(200, 1), (130, 1), (250, 20)]
    block_size = 2 * case.heads[1] * BLOCK * case.head_size
    n_blocks = sizes.pool_size // block_size
    for name, function in backends(sizes).items():
        dtypes = "float8_e4m3fn", "int8", "bfloat16"
        for dtype in dtypes[2:] if name == "mosaic_gpu" else dtypes:
            tested = dataclasses.replace(case, dtypes=("bfloat16", dtype))
            try:
                _check_far(function, tested, contexts, n_blocks)
                text = ""
            except Exception as error:  # the other dtypes are to be seen as well
                text = first_line(error)
            size = n_blocks * block_size
            what = f"{name}, last blocks of {size} elements"
            what += f", {size * jnp.dtype(dtype).itemsize} bytes of {dtype}"
            yield Row(what, note=text or "matches the float64 oracle", is_ok=not text)


def _check_far(
    function: Callable, case: Case, contexts: list[tuple[int, int]], n_blocks: int
) -> None:
    """Raises Mismatch unless the results are right and no other block has changed."""
    batch = make_batch(case, contexts)
    shift, meta = n_blocks - case.n_blocks, batch.meta
    tables = np.where(meta.block_tables > 0, meta.block_tables + shift, 0).astype(np.int32)
    is_real = meta.slots >= case.n_cells  # block 0 is scratch
    slots = np.where(is_real, meta.slots + shift * case.n_cells, meta.slots).astype(np.int32)
    meta = meta._replace(block_tables=tables, slots=slots, plan=gpu_plan(meta, case))
    scales = {} if batch.scales is None else {"kv_scales": _embedded(batch.scales, n_blocks)}
    cache = _embedded(batch.cache, n_blocks)
    arguments = jax.tree.map(jnp.asarray, (*batch[:3], meta))
    out, cache, *rest = jit(function)(*arguments[:3], cache, arguments[3], spec=case.spec, **scales)
    last = [np.asarray(x[shift:]) for x in (cache, *rest)]
    check(case, batch, Result(np.asarray(out), last[0], *(last[1:] or [None])))
    if not bool(_is_zero(cache[1:shift])):
        raise Mismatch("blocks of no sequence have changed")


def _embedded(small: np.ndarray, n_blocks: int) -> jax.Array:
    """Zeros, and at the end `small` without its first block."""
    zeros = jax.jit(lambda: jnp.zeros((n_blocks, *small.shape[1:]), small.dtype))()
    put = jax.jit(lambda x, y: x.at[n_blocks - len(y) :].set(y), donate_argnums=0)
    return put(zeros, jnp.asarray(small[1:]))


@jax.jit
def _is_zero(x: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return (bits == 0).all()
