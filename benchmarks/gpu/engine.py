"""The sections of benchmarks/gpu/check.py that run the engine: whole decode steps, and offline
throughput, on a Llama 3 8B of random weights. At toy size on a tiny one.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.engine.throughput import SHAPE, TINY, Ours, Workload
from benchmarks.gpu.table import Row, Sizes
from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.types import Request
from fastgen_jax.sampling_params import SamplingParams

LLAMA = SHAPE | {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


def engine(sizes: Sizes) -> Iterator[Row]:
    """Start, decode steps, offline throughput: with one engine."""
    shape = TINY if sizes.is_toy else LLAMA
    start = time.perf_counter()
    ours = make_engine(shape, sizes)
    config = ours.engine.config
    note = f"{config.attention_backend}, {config.dtype}, {config.num_kv_blocks} blocks"
    yield Row("engine's start: random weights, compiling", time.perf_counter() - start, note=note)
    for n_seqs in sizes.step_seqs:
        yield decode_row(ours.engine, shape, n_seqs, sizes)
    yield offline_row(ours, shape, sizes)


def make_engine(shape: dict[str, Any], sizes: Sizes) -> Ours:
    """Of weights that no file holds."""
    seqs = max(*sizes.step_seqs, sizes.offline_seqs)
    options: dict[str, Any] = {"max_num_seqs": seqs, "max_num_batched_tokens": 3 * seqs}
    options |= {"load_format": "dummy", "compilation_cache": "", "enable_prefix_caching": False}
    if sizes.is_toy:
        options |= {"max_model_len": 256, "memory_fraction": 0.01}
    else:
        options |= {"max_model_len": 2048, "memory_fraction": 0.9}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        return Ours(Path(folder), "float32" if sizes.is_toy else "bfloat16", **options)


class Steps(NamedTuple):
    """Decode steps that were timed."""

    seconds: float  # of one
    host: float  # of it spent on planning, packing, dispatch and results
    context: float  # mean over sequences and steps, with the new token


def decode_row(engine: Engine, shape: dict[str, Any], n_seqs: int, sizes: Sizes) -> Row:
    """Steps of n_seqs sequences that all decode."""
    steps = time_decode(engine, n_seqs, sizes, vocab_size=shape["vocab_size"])
    itemsize = np.dtype(np.float32).itemsize if sizes.is_toy else 2
    cells = n_seqs * steps.context * 2 * shape["num_hidden_layers"] * kv_size(shape)
    return Row(
        f"decode step B={n_seqs}, mean context {steps.context:.0f}",
        steps.seconds,
        n_bytes=itemsize * (n_weights(shape) + cells),
        n_tokens=n_seqs,
        min_share=sizes.step_share,
        note=f"host {1e3 * steps.host:.2f} ms",
    )


def kv_size(shape: dict[str, Any]) -> int:
    return shape["hidden_size"] // shape["num_attention_heads"] * shape["num_key_value_heads"]


def n_weights(shape: dict[str, Any]) -> int:
    """Of all products, so without the input embedding."""
    size, ffn = shape["hidden_size"], shape["intermediate_size"]
    layer = 2 * size * size + 2 * size * kv_size(shape) + 3 * size * ffn
    return shape["num_hidden_layers"] * layer + size * shape["vocab_size"]


def time_decode(engine: Engine, n_seqs: int, sizes: Sizes, *, vocab_size: int) -> Steps:
    """Prompts are shortened by what the first sequences generate while the last ones' are read."""
    n_fill = -(-n_seqs * sizes.step_context // engine.config.max_num_batched_tokens)
    n_early = min((n_fill + sizes.n_steps) // 2, sizes.step_context // 2)
    length = sizes.step_context - n_early
    limit = min(3 * n_fill + 2 * sizes.n_steps, engine.config.max_model_len - length)
    rng = np.random.default_rng(n_seqs)
    params = SamplingParams(max_tokens=limit, temperature=0.0, ignore_eos=True)
    prompts = rng.integers(3, vocab_size, (n_seqs, length)).tolist()
    ids = engine.submit_all([Request(prompt, params) for prompt in prompts])
    n_outputs, n_full = 0, 0
    while n_full < 3:
        assert engine.has_work, f"{n_seqs} sequences never decoded together"
        n_new = len(engine.step())
        n_outputs, n_full = n_outputs + n_new, n_full + (n_new == n_seqs)
    before, start = dict(engine.timings), time.perf_counter()
    n_timed = sum(len(engine.step()) for _ in range(sizes.n_steps))
    seconds = (time.perf_counter() - start) / sizes.n_steps
    assert n_timed == n_seqs * sizes.n_steps, (n_timed, n_seqs, sizes.n_steps)
    spent = {phase: engine.timings[phase] - before[phase] for phase in before}
    host = (sum(spent.values()) - spent["wait"]) / sizes.n_steps
    for request_id in ids:
        engine.cancel(request_id)
    while engine.has_work:
        engine.step()
    return Steps(seconds, host, length + n_outputs / n_seqs + sizes.n_steps / 2)


def offline_row(ours: Ours, shape: dict[str, Any], sizes: Sizes) -> Row:
    """Sequences of random lengths, all there from the start: nano-vllm's protocol."""
    low, high = sizes.offline_lengths
    rng = np.random.default_rng(0)
    n_prompt, n_new = rng.integers(low, high + 1, (2, sizes.offline_seqs)).tolist()
    prompts = [rng.integers(3, shape["vocab_size"], n).tolist() for n in n_prompt]
    workload = Workload(prompts, n_new)
    seconds = ours.run(workload)
    note = f"{workload.n_prompt_tokens} prompt, {workload.n_new_tokens} generated tokens"
    what = f"offline, {sizes.offline_seqs} sequences, lengths {low} to {high}, generated tokens"
    return Row(what, seconds, n_tokens=workload.n_new_tokens, note=note)
