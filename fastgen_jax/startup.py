"""From an EngineConfig to a loaded model and a resolved configuration: every choice that depends on model or machine.

The one place that decides defaults (dtype, lengths, block size, pool size); afterwards nothing in the config is None.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from fastgen_jax import checkpoint
from fastgen_jax.batch import Shape
from fastgen_jax.config import EngineConfig, ModelConfig
from fastgen_jax.errors import ConfigError
from fastgen_jax.layers import Policy
from fastgen_jax.runner import Runner, make_shapes
from fastgen_jax.sharding import check_divides, make_mesh

OnPhase = Callable[[str, int, int], None]  # phase, done, total


@dataclass(frozen=True)
class Backend:
    """What a platform wants where the user says nothing."""

    dtype: str
    attention: str
    block_size: int
    max_num_batched_tokens: int
    max_num_seqs: int
    memory_fraction: float
    sample_tile: int  # rows of logits made at once
    smallest_batch: int  # tokens


BACKENDS = {
    "cpu": Backend("float32", "xla", 32, 512, 64, 0.25, 32, 1),
    "gpu": Backend("bfloat16", "xla", 64, 768, 256, 0.9, 1024, 8),
    "tpu": Backend("bfloat16", "xla", 128, 768, 256, 0.9, 1024, 16),
}
SMALLEST_HALF_BATCH = 8  # XLA:CPU multiplies 16-bit matrices of fewer rows 20 times as slowly


@dataclass(frozen=True)
class Started:
    """What `start` hands to the engine."""

    config: EngineConfig  # nothing in it is None but the tokenizer
    model_config: ModelConfig
    generation_config: dict[str, Any]
    runner: Runner


def start(config: EngineConfig, on_phase: OnPhase) -> Started:
    """Loads the model, resolves the config and makes a Runner (not yet compiled).

    Raises:
        ConfigError, CheckpointError: what is wrong, and what to change.
    """
    on_phase("loading", 0, 1)
    if not config.model:
        raise ConfigError("no model given; name a directory or a hub id")
    directory = checkpoint.locate(config.model)
    model_config = checkpoint.read_config(directory)
    backend = BACKENDS[jax.default_backend()]
    config = resolve(config, model_config, backend)
    check_divides(model_config, config.tensor_parallel_size)
    mesh = make_mesh(config.tensor_parallel_size)
    policy = make_policy(config)
    model = _load(config, directory, model_config, policy, mesh, on_phase)
    shapes = _shapes(config, backend)
    n_blocks = config.num_kv_blocks or _fit_blocks(config, model_config, model, shapes, mesh)
    config = dataclasses.replace(config, num_kv_blocks=n_blocks)
    runner = make_runner(model, model_config, config, shapes, mesh, n_blocks)
    return Started(config, model_config, checkpoint.read_generation_config(directory), runner)


def resolve(config: EngineConfig, model: ModelConfig, backend: Backend) -> EngineConfig:
    """Fills in what the user left open; num_kv_blocks is left to the memory."""
    longest = model.max_position
    if model.rope.kind in ("linear", "dynamic"):
        longest = int(longest * model.rope.factor)
    if config.max_model_len is not None and config.max_model_len > longest:
        raise ConfigError(
            f"max_model_len={config.max_model_len} exceeds the {longest} positions of the model"
        )
    batched = config.max_num_batched_tokens or backend.max_num_batched_tokens
    auto = {"dtype": backend.dtype, "attention_backend": backend.attention}
    chosen = {n: d if getattr(config, n) == "auto" else getattr(config, n) for n, d in auto.items()}
    return dataclasses.replace(
        config,
        **chosen,
        max_model_len=config.max_model_len or longest,
        block_size=config.block_size or backend.block_size,
        max_num_batched_tokens=batched,
        max_num_seqs=min(config.max_num_seqs or backend.max_num_seqs, batched),
        memory_fraction=config.memory_fraction or backend.memory_fraction,
    )


def make_policy(config: EngineConfig) -> Policy:
    """On CPU activations stay float32 between products: elementwise work in 16 bits is slow there."""
    activations = "float32" if jax.default_backend() == "cpu" else config.dtype
    return Policy(config.dtype, activations, config.tensor_parallel_size)


def _load(config, directory: Path, model_config, policy, mesh, on_phase) -> nnx.Module:
    if config.load_format == "dummy":
        return checkpoint.random_model(model_config, policy, mesh, config.seed)

    def on_progress(done, total):
        on_phase("loading", done, total)

    return checkpoint.load_model(directory, model_config, policy, mesh, on_progress)


def _shapes(config: EngineConfig, backend: Backend) -> list[Shape]:
    is_half_on_cpu = backend is BACKENDS["cpu"] and config.dtype != "float32"
    assert config.max_num_batched_tokens and config.max_num_seqs
    return make_shapes(
        smallest=SMALLEST_HALF_BATCH if is_half_on_cpu else backend.smallest_batch,
        max_batched_tokens=config.max_num_batched_tokens,
        max_seqs=config.max_num_seqs,
        table_width=table_width(config),
        tile=backend.sample_tile,
    )


def table_width(config: EngineConfig) -> int:
    """Blocks of the longest sequence."""
    assert config.max_model_len and config.block_size
    return math.ceil(config.max_model_len / config.block_size)


def make_runner(
    model: nnx.Module,
    model_config: ModelConfig,
    config: EngineConfig,
    shapes: list[Shape],
    mesh: Mesh,
    n_blocks: int,
) -> Runner:
    assert config.max_num_seqs and config.max_model_len and config.block_size
    return Runner(
        model,
        model_config,
        mesh=mesh,
        attention_backend=config.attention_backend,
        n_rows=config.max_num_seqs,
        max_tokens=config.max_model_len,
        n_blocks=n_blocks,
        block_size=config.block_size,
        cache_dtype=config.dtype,
        shapes=shapes,
        sample_tile=BACKENDS[jax.default_backend()].sample_tile,
    )


def block_bytes(config: EngineConfig, model: ModelConfig) -> int:
    """Bytes of one block in all layers on one device."""
    assert config.block_size
    cells = model.n_layers * config.block_size * model.n_kv_heads // config.tensor_parallel_size
    return 2 * cells * model.head_dim * jnp.dtype(config.dtype).itemsize


def _fit_blocks(config, model_config, model, shapes, mesh) -> int:
    """Blocks that memory_fraction of the free memory holds, and at most what can ever be used.

    Raises:
        ConfigError: not even one sequence of two blocks fits.
    """
    useful = config.max_num_seqs * table_width(config) + 1
    free = free_memory(mesh.devices.flat[0])
    if jax.default_backend() != "cpu":
        probe = make_runner(model, model_config, config, shapes, mesh, n_blocks=2)
        free -= probe.temporary_bytes(shapes[-1])
    size = block_bytes(config, model_config)
    n_blocks = min(useful, int(free * config.memory_fraction) // size)
    if n_blocks < 2:
        raise ConfigError(
            f"no room for a KV cache: a block takes {size} bytes and {free} bytes are free; use a "
            "smaller model or dtype, or fewer max_num_batched_tokens"
        )
    return n_blocks


def free_memory(device: jax.Device) -> int:
    """Bytes that can still be allocated on a device; on CPU the memory that the system calls available."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
