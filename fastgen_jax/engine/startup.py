"""From an EngineConfig to a loaded model and a resolved configuration: every choice that depends on
model or machine.

The one place that decides defaults (dtype, lengths, block size, pool size); afterwards nothing in
the config is None.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from fastgen_jax.engine.batch import Shape
from fastgen_jax.engine.compiled import keep_compiled
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.processors import Processor, read_processors
from fastgen_jax.engine.runner import Runner, make_shapes
from fastgen_jax.engine.source import Load, source_of
from fastgen_jax.errors import ConfigError
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.layers import Policy
from fastgen_jax.models.layout import HeadLayout
from fastgen_jax.models.row_tiles import BACKEND as INVARIANT
from fastgen_jax.models.row_tiles import row_tile
from fastgen_jax.models.sharding import make_mesh
from pallas_kernels import BACKENDS as BACKENDS_BY_NAME
from pallas_kernels import (
    MAX_CACHE_SIZE,
    PLATFORMS,
    PlanSizes,
    cache_shape,
    check_heads,
    plan_sizes,
    select,
)

OnPhase = Callable[[str, int, int], None]  # phase, done, total


@dataclass(frozen=True)
class Backend:
    """What a platform wants where the user says nothing."""

    attention: str
    block_size: int
    max_num_batched_tokens: int
    max_num_seqs: int
    memory_fraction: float
    sample_tile: int  # rows of logits made at once
    smallest_batch: int  # tokens


BACKENDS = {
    # A batch of one token: XLA:CPU then copies the cache to write its cell (memory_analysis says).
    "cpu": Backend("xla", 64, 512, 64, 0.25, 32, 2),
    "gpu": Backend("pallas_gpu", 64, 768, 256, 0.9, 1024, 8),
    "tpu": Backend("pallas_tpu", 128, 768, 256, 0.9, 1024, 16),
}

DEFAULT_PROCESSORS = 132  # of a GPU that does not tell


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(EngineConfig):
    """An EngineConfig in which every choice has been made."""

    max_model_len: int = 0
    block_size: int = 0
    num_kv_blocks: int = 0
    max_num_batched_tokens: int = 0
    max_num_seqs: int = 0
    memory_fraction: float = 0.0
    processors: tuple[Processor, ...] = field(default=(), hash=False, compare=False)

    @property
    def table_width(self) -> int:
        """Blocks of the longest sequence."""
        return math.ceil(self.max_model_len / self.block_size)


@dataclass(frozen=True)
class Started:
    """What `start` hands to the engine."""

    config: ResolvedConfig
    model_config: ModelConfig
    generation_config: dict[str, Any]
    runner: Runner
    reload: Load | None = None  # makes the model again, where that is possible


def start(config: EngineConfig, on_phase: OnPhase, module: nnx.Module | None = None) -> Started:
    """Loads the model, or takes the module's, resolves the config and makes a Runner (not yet
    compiled).

    Raises:
        ConfigError, CheckpointError: what is wrong, and what to change.
    """
    on_phase("loading", 0, 1)
    source = source_of(config, module)
    keep_compiled(config.compilation_cache)
    model_config = source.model_config
    backend = BACKENDS[jax.default_backend()]
    if config.dtype == "auto":
        config = dataclasses.replace(config, dtype=source.dtype or config.dtype)
    resolved = resolve(config, model_config, backend)
    model_config = fit_rope(model_config, resolved.max_model_len)
    check_cache(resolved, model_config, config.num_kv_blocks or 2)
    mesh = make_mesh(config.tensor_parallel_size)
    policy = Policy.here(resolved.dtype, mesh)
    model = source.load(model_config, policy, mesh, partial(on_phase, "loading"))
    shapes = _shapes(resolved, model_config, backend)
    if config.num_kv_blocks is None:
        n_blocks = _fit_blocks(resolved, model_config, model, shapes, mesh)
        resolved = dataclasses.replace(resolved, num_kv_blocks=n_blocks)
    runner = make_runner(model, model_config, resolved, shapes, mesh)
    reload = source.load if source.is_lasting else None
    return Started(resolved, model_config, source.generation_config, runner, reload)


def resolve(config: EngineConfig, model: ModelConfig, backend: Backend) -> ResolvedConfig:
    """Fills in what the user left open; num_kv_blocks with the most that could ever be used."""
    longest = longest_context(model)
    if config.max_model_len is not None and config.max_model_len > longest:
        raise ConfigError(
            f"max_model_len={config.max_model_len} exceeds the {longest} positions of the model"
        )
    length = config.max_model_len or longest
    block_size = config.block_size or backend.block_size
    batched = config.max_num_batched_tokens or backend.max_num_batched_tokens
    max_seqs = min(config.max_num_seqs or backend.max_num_seqs, batched)
    attention = config.attention_backend
    if attention == "auto":
        attention = INVARIANT if config.deterministic else backend.attention
    else:
        check_attention(attention, jax.default_backend())
    if config.deterministic and attention != INVARIANT:
        raise ConfigError(
            f"deterministic needs attention_backend={INVARIANT!r}: {attention} orders its "
            "sums by what else is in the batch; leave attention_backend out, and it is chosen"
        )
    chosen = {
        "dtype": Policy.here(config.dtype, None).weights,
        "attention_backend": attention,
        "max_model_len": length,
        "block_size": block_size,
        "max_num_batched_tokens": batched,
        "max_num_seqs": max_seqs,
        "memory_fraction": config.memory_fraction or backend.memory_fraction,
        "return_hidden_states": layer_numbers(config.return_hidden_states, model.n_layers),
        "processors": read_processors(config.logits_processors, model.vocab_size, length),
        "num_kv_blocks": config.num_kv_blocks or max_seqs * math.ceil(length / block_size) + 1,
    }
    return ResolvedConfig(**{f.name: getattr(config, f.name) for f in fields(config)} | chosen)


def layer_numbers(given: Iterable[int], n_layers: int) -> tuple[int, ...]:
    """Layers counted from the embeddings, 0; negative ones from the final hidden states, n_layers.

    Raises:
        ConfigError: the model has no such layer.
    """
    for layer in given:
        if not -n_layers - 1 <= layer <= n_layers:
            raise ConfigError(
                f"return_hidden_states names layer {layer}; the model has 0 (the embeddings) to "
                f"{n_layers} (after the final norm), or -1 to {-n_layers - 1} from the end"
            )
    return tuple(layer % (n_layers + 1) for layer in given)


def longest_context(model: ModelConfig) -> int:
    """Positions that the model was made or stretched for.

    Configs that a user stretches keep max_position_embeddings as it was; those of models that were
    trained so count the stretched ones. llama3 and longrope are only ever found in the latter.
    """
    rope = model.rope
    if rope is None or rope.kind not in ("linear", "dynamic", "yarn"):
        return model.max_position
    assert rope.original_max_position is not None
    return max(model.max_position, int(rope.original_max_position * rope.factor))


def fit_rope(model: ModelConfig, max_model_len: int) -> ModelConfig:
    """Chooses LongRoPE's factors once, so that a token's key never depends on what follows it: the
    long ones if contexts may exceed the original length.
    """
    rope = model.rope
    if rope is None or rope.kind != "longrope":
        return model
    assert rope.original_max_position is not None
    is_long = max_model_len > rope.original_max_position
    return dataclasses.replace(model, rope=dataclasses.replace(rope, is_long=is_long))


def check_attention(name: str, platform: str) -> None:
    """Raises ConfigError unless that attention backend exists and runs here, on the platform."""
    if name not in BACKENDS_BY_NAME:
        raise ConfigError(
            f"attention_backend must be one of auto, {', '.join(BACKENDS_BY_NAME)}, got {name!r}"
        )
    needed = PLATFORMS.get(name, platform)
    if needed != platform:
        raise ConfigError(
            f"attention_backend={name!r} runs on {needed}, and this is {platform}; "
            "leave it out, and the right one is chosen"
        )
    try:
        select(name)
    except ImportError as error:
        raise ConfigError(str(error)) from None


def check_cache(config: ResolvedConfig, model: ModelConfig, n_blocks: int) -> None:
    """Raises ConfigError unless the attention backend takes the model's heads and can have a cache
    of so many blocks.
    """
    heads = HeadLayout.of(model, config.tensor_parallel_size)
    try:
        check_heads(
            config.attention_backend,
            head_size=model.head_dim,
            group_size=heads.group_size,
            dtype=jnp.dtype(config.dtype),
        )
        cache_shape(
            config.attention_backend,
            n_blocks=n_blocks,
            n_kv_heads=heads.n_own_kv_slots,
            block_size=config.block_size,
            head_size=model.head_dim,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _shapes(config: ResolvedConfig, model: ModelConfig, backend: Backend) -> list[Shape]:
    shapes = make_shapes(
        smallest=backend.smallest_batch,
        max_batched_tokens=config.max_num_batched_tokens,
        max_seqs=config.max_num_seqs,
        table_width=config.table_width,
        tile=backend.sample_tile,
    )
    if config.deterministic:
        shapes = [_only_shape(shapes[-1])]
    return [shape._replace(plan=_plan_sizes(shape, config, model)) for shape in shapes]


def _only_shape(largest: Shape) -> Shape:
    """The one shape of all deterministic steps: whole tiles, whatever the limits are."""

    tile = row_tile(jax.default_backend())

    def whole(size: int) -> int:
        return math.ceil(size / tile) * tile

    n_tokens, n_seqs = whole(largest.n_tokens), whole(largest.n_seqs)
    return largest._replace(n_tokens=n_tokens, n_seqs=n_seqs)


def _plan_sizes(shape: Shape, config: ResolvedConfig, model: ModelConfig) -> PlanSizes | None:
    heads = HeadLayout.of(model, config.tensor_parallel_size)
    n_processors = getattr(jax.devices()[0], "core_count", DEFAULT_PROCESSORS)
    return plan_sizes(
        config.attention_backend,
        n_tokens=shape.n_tokens,
        n_seqs=shape.n_seqs,
        n_heads=heads.n_own_query_slots,
        n_kv_heads=heads.n_own_kv_slots,
        head_size=model.head_dim,
        max_context=config.table_width * config.block_size,
        n_ctas=2 * n_processors,
    )


def make_runner(
    model: nnx.Module,
    model_config: ModelConfig,
    config: ResolvedConfig,
    shapes: list[Shape],
    mesh: Mesh,
) -> Runner:
    platform = jax.default_backend()
    tile = row_tile(platform)
    return Runner(
        model,
        model_config,
        mesh=mesh,
        attention_backend=config.attention_backend,
        n_rows=config.max_num_seqs,
        max_tokens=config.max_model_len,
        n_blocks=config.num_kv_blocks,
        block_size=config.block_size,
        cache_dtype=config.dtype,
        hidden_dtype=Policy.here(config.dtype, mesh).activations,
        shapes=shapes,
        sample_tile=tile if config.deterministic else BACKENDS[platform].sample_tile,
        row_tile=tile if config.deterministic else None,
        layers=config.return_hidden_states,
        processors=config.processors,
    )


def block_elements(config: ResolvedConfig, model: ModelConfig) -> int:
    """Elements of one block in one layer on one device."""
    heads = HeadLayout.of(model, config.tensor_parallel_size)
    return 2 * heads.n_own_kv_slots * config.block_size * model.head_dim


def block_bytes(config: ResolvedConfig, model: ModelConfig) -> int:
    """Bytes of one block in all layers on one device."""
    return model.n_layers * block_elements(config, model) * jnp.dtype(config.dtype).itemsize


def _fit_blocks(
    config: ResolvedConfig,
    model_config: ModelConfig,
    model: nnx.Module,
    shapes: list[Shape],
    mesh: Mesh,
) -> int:
    """Blocks that memory_fraction of the free memory holds, at most what can ever be used.

    Raises:
        ConfigError: not even one block fits beside scratch.
    """
    free = free_memory(mesh.devices.flat[0])
    if jax.default_backend() != "cpu":
        small = dataclasses.replace(config, num_kv_blocks=2)
        probe = make_runner(model, model_config, small, shapes, mesh)
        free -= probe.temporary_bytes(shapes[-1])
    size = block_bytes(config, model_config)
    n_blocks = min(config.num_kv_blocks, int(free * config.memory_fraction) // size)
    n_blocks = min(n_blocks, MAX_CACHE_SIZE // block_elements(config, model_config))
    if n_blocks < 2:
        raise ConfigError(
            f"no room for a KV cache: a block takes {size} bytes and {free} bytes are free; use a "
            "smaller model or dtype, or fewer max_num_batched_tokens"
        )
    return n_blocks


def free_memory(device: Any) -> int:
    """Bytes that can still be allocated on a device; on CPU the memory that the system calls
    available.
    """
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
