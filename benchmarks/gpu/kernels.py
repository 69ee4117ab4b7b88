"""The sections of benchmarks/gpu/check.py that measure: the device, attention, CUDA graphs, torch.

A section takes Sizes and yields Rows. At toy size the kernels are interpreted.
"""

import functools
import importlib.util
import re
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.numerics import backends, first_line
from benchmarks.gpu.table import BLOCK, Decode, Prompts, Row, Sizes
from pallas_kernels import AttentionSpec, RaggedMeta
from pallas_kernels.contract import QUANTIZED
from pallas_kernels.gpu.layout import write
from pallas_kernels.gpu.plan import PlanSizes, make_plan


def seconds_per_call(run: Callable, state: Any, *args: Any, sizes: Sizes) -> float:
    """Of run(state, *args) -> (state, out), whose state is donated: the median of some repeats.

    A repeat is many calls, so that the device has the next one before it ends the last.
    """
    for _ in range(2):
        start = time.perf_counter()
        state, out = jax.block_until_ready(run(state, *args))
        once = time.perf_counter() - start
    n_calls = min(max(int(sizes.repeat_seconds / once), 1), 500)
    times = []
    for _ in range(sizes.repeats):
        start = time.perf_counter()
        for _ in range(n_calls):
            state, out = run(state, *args)
        jax.block_until_ready((state, out))
        times.append((time.perf_counter() - start) / n_calls)
    return statistics.median(times)


# What the device can do.


def ceilings(sizes: Sizes) -> Iterator[Row]:
    """Copy bandwidth, read and written bytes, and bfloat16 matrix products of random numbers."""
    ones = jnp.ones(sizes.copy_size // 4, jnp.int32)
    for name, run in (("copy", jnp.copy), ("add one", lambda x: x + 1)):
        copy = jax.jit(lambda _, x, run=run: (0, run(x)))
        seconds = seconds_per_call(copy, 0, ones, sizes=sizes)
        yield Row(f"{name}, {sizes.copy_size >> 20} MiB", seconds, n_bytes=2 * sizes.copy_size)
    n = sizes.matmul_size
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    seconds = seconds_per_call(jax.jit(lambda _, a, b: (0, a @ b)), 0, a, b, sizes=sizes)
    yield Row(f"bfloat16 matmul {n}", seconds, n_flops=2 * n**3)


# Attention.


class Load(NamedTuple):
    """Batch of one attention call: (context with its new tokens, new tokens) of each sequence."""

    name: str
    sequences: list[tuple[int, int]]
    dtype: str  # of the cache

    @property
    def n_tokens(self) -> int:
        return sum(n_new for _, n_new in self.sequences)

    @property
    def n_blocks(self) -> int:
        return 1 + sum(-(-context // BLOCK) for context, _ in self.sequences)

    @property
    def table_width(self) -> int:
        return max(-(-context // BLOCK) for context, _ in self.sequences)


def decode_load(decode: Decode) -> Load:
    """Contexts differ, by a standard deviation of 15 %, as those of requests do."""
    rng = np.random.default_rng(0)
    n_seqs, context, dtype = decode
    lengths = rng.normal(context, 0.15 * context, n_seqs) if n_seqs > 1 else [context]
    sequences = [(max(int(n), 1), 1) for n in lengths]
    return Load(f"B={n_seqs}, {sum(c for c, _ in sequences)} cells, {dtype}", sequences, dtype)


def prompt_load(prompts: Prompts) -> Load:
    n_seqs, context, n_new = prompts
    name = f"{n_seqs} x {n_new} tokens at the end of {context}"
    return Load(name, [(context, n_new)] * n_seqs, "bfloat16")


def make_meta(load: Load, sizes: Sizes) -> Any:
    """The batch in blocks in random order, as after some time of serving; with its plan."""
    seq_lens, n_new = np.array(load.sequences, np.int32).T
    n_own = -(-seq_lens // BLOCK)
    tables = np.zeros((len(seq_lens), load.table_width), np.int32)
    ids = np.random.default_rng(0).permutation(np.arange(1, load.n_blocks))
    tables[np.arange(load.table_width) < n_own[:, None]] = ids
    row = np.repeat(np.arange(len(seq_lens)), n_new)
    cu_q_lens = np.concatenate([[0], np.cumsum(n_new)]).astype(np.int32)
    positions = (np.arange(n_new.sum()) - cu_q_lens[row] + (seq_lens - n_new)[row]).astype(np.int32)
    slots = tables[row, positions // BLOCK] * BLOCK + positions % BLOCK
    n_single = np.int32((n_new == 1).sum())
    plan = make_plan(seq_lens, cu_q_lens, len(seq_lens), sizes=plan_sizes(load, sizes))
    arrays: Any = positions, slots, tables, seq_lens, cu_q_lens, np.int32(len(seq_lens)), n_single
    return jax.tree.map(jnp.asarray, RaggedMeta(*arrays, plan=plan))


def plan_sizes(load: Load, sizes: Sizes) -> PlanSizes:
    """As the engine makes them, but for the table's width."""
    return PlanSizes.of(
        n_tokens=load.n_tokens,
        n_seqs=len(load.sequences),
        n_heads=sizes.heads[0],
        n_kv_heads=sizes.heads[1],
        head_size=sizes.head_size,
        max_context=load.table_width * BLOCK,
        n_ctas=2 * getattr(jax.devices()[0], "core_count", 132),
    )


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _random(key, *, shape: tuple[int, ...], dtype: str):
    is_int8 = jnp.dtype(dtype) == jnp.int8
    x = jax.random.normal(key, shape, jnp.bfloat16)
    return (x * (40 if is_int8 else 1)).astype(dtype)


def make_caches(load: Load, sizes: Sizes, n_layers: int) -> tuple[tuple[jax.Array, ...], ...]:
    """Per layer a cache of random cells, with its scales if quantised."""
    shape = load.n_blocks, sizes.heads[1], 2, BLOCK, sizes.head_size
    caches = []
    for key in jax.random.split(jax.random.key(0), n_layers):
        cache = (_random(key, shape=shape, dtype=load.dtype),)
        if jnp.dtype(load.dtype) in QUANTIZED:
            cache += (jnp.full(shape[:-1], 0.02, jnp.float32),)
        caches.append(cache)
    return tuple(caches)


def make_tokens(load: Load, sizes: Sizes) -> tuple[jax.Array, ...]:
    """Queries, keys and values of the new tokens."""
    (n_heads, n_kv_heads), size, t = sizes.heads, sizes.head_size, load.n_tokens
    shapes = [(t, n, size) for n in (n_heads, n_kv_heads, n_kv_heads)]
    keys = jax.random.split(jax.random.key(1), 3)
    return tuple(_random(k, shape=s, dtype="bfloat16") for k, s in zip(keys, shapes, strict=True))


def attention_step(function: Callable, head_size: int) -> Callable:
    """A program of some layers of attention, each with a cache of its own."""
    spec = AttentionSpec(head_size**-0.5)

    def run(caches, q, k, v, meta):
        outs, updated = [], []
        for cache, *scales in caches:
            quantised = {"kv_scales": scales[0]} if scales else {}
            out, *cache = function(q, k, v, cache, meta, spec=spec, **quantised)
            outs.append(out)
            updated.append(tuple(cache))
        return tuple(updated), tuple(outs)

    return jax.jit(run, donate_argnums=0)


def compile_step(function: Callable, sizes: Sizes, n_layers: int, load: Load) -> Any:
    """The compiled program for a load; several may compile at once."""
    make = functools.partial(make_caches, load, sizes, n_layers)
    shapes = jax.eval_shape(make), *jax.eval_shape(lambda: make_tokens(load, sizes))
    return (
        attention_step(function, sizes.head_size).lower(*shapes, make_meta(load, sizes)).compile()
    )


def layer_times(
    function: Callable, loads: list[Load], sizes: Sizes, n_layers: int
) -> Iterator[float | str]:
    """Seconds per layer of each load, its KV write included; or what went wrong."""
    with ThreadPoolExecutor(min(sizes.n_threads, 4)) as pool:
        jobs = [pool.submit(compile_step, function, sizes, n_layers, load) for load in loads]
    for load, job in zip(loads, jobs, strict=True):
        try:
            caches, tokens = make_caches(load, sizes, n_layers), make_tokens(load, sizes)
            seconds = seconds_per_call(
                job.result(), caches, *tokens, make_meta(load, sizes), sizes=sizes
            )
            yield seconds / n_layers
        except Exception as error:  # the other loads are to be seen as well
            yield first_line(error)


def decode_bytes(load: Load, sizes: Sizes) -> float:
    """Of keys and values that a decode step reads in one layer."""
    dtype = jnp.dtype(load.dtype)
    per_head = sizes.head_size * dtype.itemsize + (4 if dtype in QUANTIZED else 0)
    return sum(context for context, _ in load.sequences) * 2 * sizes.heads[1] * per_head


def chunk_flops(prompts: Prompts, sizes: Sizes) -> float:
    """Of both products of one layer, exactly those that a causal mask leaves."""
    n_seqs, context, n_new = prompts
    n_pairs = n_new * (context - n_new) + n_new * (n_new + 1) // 2
    return 4.0 * n_seqs * n_pairs * sizes.heads[0] * sizes.head_size


def measured(what: str, seconds: float | str) -> Row:
    """A row for what `layer_times` found."""
    if isinstance(seconds, str):
        return Row(what, note=seconds, is_ok=False)
    return Row(what, seconds)


def decode(sizes: Sizes) -> Iterator[Row]:
    """Decode attention per layer; its target holds from 64k cells on."""
    loads = [decode_load(decode) for decode in sizes.decodes]
    own = {name: x for name, x in backends(sizes).items() if name != "mosaic_gpu"}  # pallas_gpu's
    for name, function in own.items():
        times = layer_times(function, loads, sizes, sizes.n_layers)
        for load, time_ in zip(loads, times, strict=True):
            row = measured(f"{name} {load.name}", time_)
            yield row._replace(n_bytes=decode_bytes(load, sizes), min_share=sizes.decode_share)
    yield from kv_writes(loads[:1] + loads[-1:], sizes)


def chunks(sizes: Sizes) -> Iterator[Row]:
    """Attention of prompts per layer."""
    loads = [prompt_load(prompts) for prompts in sizes.prompts]
    for name, function in backends(sizes).items():
        times = layer_times(function, loads, sizes, 1)
        for prompts, load, time_ in zip(sizes.prompts, loads, times, strict=True):
            row, n_flops = measured(f"{name} {load.name}", time_), chunk_flops(prompts, sizes)
            yield row._replace(n_flops=n_flops, min_tflops=sizes.chunk_tflops)
    yield from kv_writes(loads[:1], sizes)


def kv_writes(loads: list[Load], sizes: Sizes) -> Iterator[Row]:
    """Of the time per layer above, XLA's part: writing the new keys and values."""

    def run(caches, k, v, meta):
        new = [write(k, v, cache, scales[0] if scales else None, meta) for cache, *scales in caches]
        return tuple(tuple(x for x in pair if x is not None) for pair in new), 0

    for load in loads:
        caches = make_caches(load, sizes, sizes.n_layers)
        _, k, v = make_tokens(load, sizes)
        jitted, meta = jax.jit(run, donate_argnums=0), make_meta(load, sizes)
        seconds = seconds_per_call(jitted, caches, k, v, meta, sizes=sizes) / sizes.n_layers
        yield Row(f"KV write alone, {load.n_tokens} new tokens, {load.dtype}", seconds)


def torch_chunks(sizes: Sizes) -> Iterator[Row]:
    """The same prompts with torch's flash attention, without a cache."""
    if importlib.util.find_spec("torch") is None:
        yield Row("torch", note="no torch here")
        return
    import torch  # pyright: ignore

    if not torch.cuda.is_available():
        yield Row("torch", note="torch without CUDA here")
        return
    for prompts in sizes.prompts:
        if prompts.context == prompts.n_new:  # its causal mask is aligned to the first key
            seconds = _torch_seconds(torch, prompts, sizes)
            what = f"torch {torch.__version__} flash {prompt_load(prompts).name}"
            yield Row(what, seconds, n_flops=chunk_flops(prompts, sizes))


def _torch_seconds(torch: Any, prompts: Prompts, sizes: Sizes) -> float:
    attention = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (
        torch.randn(
            prompts.n_seqs, n, prompts.n_new, sizes.head_size, device="cuda", dtype=torch.bfloat16
        )
        for n in (sizes.heads[0], sizes.heads[1], sizes.heads[1])
    )
    times = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        for _ in range(sizes.repeats + 1):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(20):
                attention(q, k, v, is_causal=True, enable_gqa=True)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / 20)
    return statistics.median(times[1:])


def graph_step(sizes: Sizes, dump: Path | None = None) -> Iterator[Row]:
    """Attention of many layers with little work each: launches are what is seen.

    dump: where XLA_FLAGS make the compiler leave what it did.
    """
    load = decode_load(sizes.graph_decode)
    for name, function in backends(sizes).items():
        before = thunk_files(dump)
        step = compile_step(function, sizes, sizes.graph_layers, load)
        new = sorted(thunk_files(dump) - before)
        caches = make_caches(load, sizes, sizes.graph_layers)
        args = *make_tokens(load, sizes), make_meta(load, sizes)
        seconds = seconds_per_call(step, caches, *args, sizes=sizes)
        note = captured(new[-1].read_text(errors="replace")) if new else "no thunks were dumped"
        yield Row(f"{name}, {sizes.graph_layers} layers, {load.name}", seconds, note=note)


def thunk_files(dump: Path | None) -> set[Path]:
    """What XLA:GPU writes about a program's launches; the last by name is what runs."""
    return set(dump.glob("*thunk_sequence*")) if dump else set()


def captured(thunks: str) -> str:
    """How many launches are in command buffers (CUDA graphs): they are indented under them."""
    lines = re.findall(r"^( *)\d+: (k\w+)", thunks, re.MULTILINE)
    launches = [indent for indent, kind in lines if kind != "kCommandBuffer"]
    n_inside, n_buffers = sum(map(bool, launches)), len(lines) - len(launches)
    found = f"{n_inside} of {len(launches)} launches in command buffers"
    return f"{found}, of which there are {n_buffers}"
