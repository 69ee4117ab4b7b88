"""From an EngineConfig to a loaded model and a resolved configuration: every choice that depends on
model or machine.

The one place that decides defaults (dtype, lengths, block size, pool size); afterwards nothing in
the config is None.
"""

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from fastgen_jax.config import is_integer
from fastgen_jax.engine.batch import MaskedShape, Shape
from fastgen_jax.engine.budget import choose, keep, kept
from fastgen_jax.engine.compiled import keep_compiled
from fastgen_jax.engine.config import AUTO, KV_CACHE_DTYPES, EngineConfig
from fastgen_jax.engine.pace import Pace
from fastgen_jax.engine.processors import Processor, read_processors
from fastgen_jax.engine.recipe import Recipe, make_recipe
from fastgen_jax.engine.rehearsal import Stage, rehearse
from fastgen_jax.engine.runner import Runner, make_shapes
from fastgen_jax.engine.source import Load, source_of
from fastgen_jax.engine.stored import Loaded, Stored, differences, find, load, purpose
from fastgen_jax.engine.stored import Program as StoredProgram
from fastgen_jax.errors import ConfigError
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.kv_cache import CacheLayout
from fastgen_jax.models.layers import Policy
from fastgen_jax.models.layout import HeadLayout
from fastgen_jax.models.row_tiles import BACKEND as INVARIANT
from fastgen_jax.models.row_tiles import row_tile
from fastgen_jax.models.sharding import make_mesh
from pallas_kernels import BACKENDS as BACKENDS_BY_NAME
from pallas_kernels import (
    COMPUTE_CAPABILITIES,
    MAX_CACHE_SIZE,
    PLATFORMS,
    PlanSizes,
    check_heads,
    plan_sizes,
    select,
)

log = logging.getLogger("fastgen_jax.engine")

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
    # A batch of one token: with xla the cache is copied to write its cell (memory_analysis says).
    "cpu": Backend("cpu", 64, 512, 64, 0.25, 32, 2),
    "gpu": Backend("pallas_gpu", 64, 768, 256, 0.9, 1024, 8),
    "tpu": Backend("pallas_tpu", 128, 768, 256, 0.9, 1024, 16),
}

MOST = 4  # times the default token budget are tried out
N_FINE = 3  # times that the largest program is halved finely, where steps are paced
DEFAULT_PROCESSORS = 132  # of a GPU that does not tell


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(EngineConfig):
    """An EngineConfig in which every choice has been made."""

    compile: str = "all"
    max_model_len: int = 0
    block_size: int = 0
    num_kv_blocks: int = 0
    max_num_batched_tokens: int = 0  # at most; see pace
    pace: Pace | None = field(default=None, hash=False, compare=False)
    max_num_seqs: int = 0
    memory_fraction: float = 0.0
    processors: tuple[Processor, ...] = field(default=(), hash=False, compare=False)

    @property
    def cache_dtype(self) -> str:
        """Of the KV cache's cells."""
        return KV_CACHE_DTYPES[self.kv_cache_dtype] or self.dtype

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
    if config.dtype == "auto":
        config = dataclasses.replace(config, dtype=source.dtype or config.dtype)
    mesh = make_mesh(config.tensor_parallel_size)
    is_auto, target = config.max_num_batched_tokens == AUTO, config.target_itl_ms
    if is_auto:
        config = dataclasses.replace(
            config, max_num_batched_tokens=most_tokens(mesh), target_itl_ms=None
        )
    resolved, model_config, shapes = design(config, model_config, mesh)
    devices = list(mesh.devices.flat)
    stored = find(source.directory, devices, is_trusted=config.trust_programs)
    policy = Policy.here(resolved.dtype, mesh)
    model = source.load(model_config, policy, mesh, partial(on_phase, "loading"))
    if config.num_kv_blocks is None:
        free = free_memory(devices[0])
        n_blocks = _stored_blocks(stored, resolved, model_config, devices, free)
        n_blocks = n_blocks or fit_blocks(resolved, model_config, model, shapes, mesh, free)
        resolved = dataclasses.replace(resolved, num_kv_blocks=n_blocks)
    if is_auto:
        resolved, shapes = paced(
            resolved, model, model_config, shapes, mesh, target and target / 1e3
        )
    recipe = recipe_of(model, model_config, resolved, mesh)
    wanted = purpose(resolved, model_config, devices)
    make = maker(recipe, stored if stored and is_for(stored, wanted) else None)
    runner = Runner(model, recipe, shapes, make)
    reload = source.load if source.is_lasting else None
    return Started(resolved, model_config, source.generation_config, runner, reload)


def design(
    config: EngineConfig, model: ModelConfig, mesh: Mesh
) -> tuple[ResolvedConfig, ModelConfig, list[Shape]]:
    """All that follows from a config on the devices of a mesh, which need not be here, but for what
    their memory holds.
    """
    resolved = resolve(config, model, mesh)
    model = fit_rope(model, resolved.max_model_len)
    check_cache(resolved, model, config.num_kv_blocks or 2)
    return resolved, model, _shapes(resolved, model, mesh)


def most_tokens(mesh: Mesh) -> int:
    """The largest token budget that is tried out on the devices of a mesh."""
    return MOST * BACKENDS[mesh.devices.flat[0].platform].max_num_batched_tokens


def paced(
    config: ResolvedConfig,
    model: nnx.Module,
    model_config: ModelConfig,
    shapes: list[Shape],
    mesh: Mesh,
    target: float | None,
) -> tuple[ResolvedConfig, list[Shape]]:
    """With the token budget that this machine, and steps of `target` seconds, want; steps are timed
    where that has not been done before.
    """
    devices, directory = list(mesh.devices.flat), config.compilation_cache
    key = purpose(config, model_config, devices)
    surface = kept(directory, key)
    if surface is None:
        runner = Runner(model, recipe_of(model, model_config, config, mesh), shapes)
        stage = Stage(
            config.max_num_seqs, config.max_model_len, config.block_size, config.num_kv_blocks,
            model_config.vocab_size,
        )  # fmt: skip
        surface = rehearse(runner, stage)
        runner.close()
        keep(directory, key, surface)
    n_tokens = choose(surface, target)
    resolved = dataclasses.replace(
        config,
        max_num_batched_tokens=n_tokens,
        max_num_seqs=min(config.max_num_seqs, n_tokens),
        pace=target and Pace(surface, target),
    )
    shapes = _shapes(resolved, model_config, mesh)
    if target:
        surface = surface._replace(sizes=tuple(shape.n_tokens for shape in shapes))
        resolved = dataclasses.replace(resolved, pace=Pace(surface, target))
    return resolved, shapes


def maker(recipe: Recipe, stored: Stored | None) -> Callable[[Shape | MaskedShape], Any]:
    """Compiles programs, but for those that are stored."""

    def make(shape: Shape | MaskedShape) -> Any:
        found = stored and stored.read(shape)
        if found:
            try:
                return loaded(found, recipe, shape)
            except Exception as error:  # whatever the runtime says of it
                log.warning("a stored program cannot be loaded, and is compiled: %s", error)
        return recipe.compile(shape)

    return make


def loaded(
    found: tuple[bytes, StoredProgram], recipe: Recipe, shape: Shape | MaskedShape
) -> Loaded:
    """An executable that takes and returns what the program of a shape does."""
    content, program = found
    shardings, treedef = jax.tree.flatten(recipe.results(shape))
    outputs = [
        (tuple(size), sharding) for size, sharding in zip(program.outputs, shardings, strict=True)
    ]
    return Loaded(load(content, recipe.program.mesh.devices.flat), treedef, outputs)


def is_for(stored: Stored, wanted: Mapping[str, Any]) -> bool:
    """Whether stored programs are those that are wanted; the log says why not."""
    found = differences(stored, wanted)
    if found:
        log.warning("stored programs are not used: %s", "; ".join(found))
    else:
        log.info("programs %d stored ones fit", len(stored.programs))
    return not found


def _stored_blocks(
    stored: Stored | None, config: ResolvedConfig, model: ModelConfig, devices: list, free: int
) -> int | None:
    """The size of the cache that stored programs are made for, if all else fits and there is room
    for it.
    """
    n_blocks = stored.made_for.get("num_kv_blocks") if stored else None
    size = model.n_layers * layout_of(config, model).block_bytes
    if not stored or not is_integer(n_blocks) or not 2 <= n_blocks * size <= free:
        return None
    sized = dataclasses.replace(config, num_kv_blocks=n_blocks)
    return None if differences(stored, purpose(sized, model, devices)) else n_blocks


def resolve(config: EngineConfig, model: ModelConfig, mesh: Mesh) -> ResolvedConfig:
    """Fills in what the user left open; num_kv_blocks with the most that could ever be used."""
    longest = longest_context(model)
    device = mesh.devices.flat[0]
    backend = BACKENDS[device.platform]
    if config.max_model_len is not None and config.max_model_len > longest:
        raise ConfigError(
            f"max_model_len={config.max_model_len} exceeds the {longest} positions of the model"
        )
    length = config.max_model_len or longest
    block_size = config.block_size or backend.block_size
    batched = config.max_num_batched_tokens or backend.max_num_batched_tokens
    if isinstance(batched, str):
        raise ConfigError(
            "max_num_batched_tokens=auto is measured on the machine that serves; give a number here"
        )
    max_seqs = min(config.max_num_seqs or backend.max_num_seqs, batched)
    attention = config.attention_backend
    if attention == "auto":
        attention = INVARIANT if config.deterministic else available(backend.attention)
    else:
        check_attention(attention, device.platform, getattr(device, "compute_capability", None))
    if config.deterministic and attention != INVARIANT:
        raise ConfigError(
            f"deterministic needs attention_backend={INVARIANT!r}: {attention} orders its "
            "sums by what else is in the batch; leave attention_backend out, and it is chosen"
        )
    chosen = {
        "compile": config.compile or "all",
        "dtype": Policy.here(config.dtype, mesh).weights,
        "kv_cache_dtype": first_name(config.kv_cache_dtype),
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


def first_name(kv_cache_dtype: str) -> str:
    """Of those that mean the same."""
    dtypes = {dtype: name for name, dtype in reversed(KV_CACHE_DTYPES.items())}
    return dtypes[KV_CACHE_DTYPES[kv_cache_dtype]]


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


def available(attention: str) -> str:
    """That attention backend; xla, and says so, where it was not built."""
    try:
        select(attention)
    except ImportError as error:
        log.warning("attention_backend=xla, which is slower: %s", error)
        return "xla"
    return attention


def check_attention(name: str, platform: str, compute_capability: str | None = None) -> None:
    """Raises ConfigError unless that attention backend exists and runs here, on the platform, and
    on a GPU of that compute capability.
    """
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
    wanted = COMPUTE_CAPABILITIES.get(name, compute_capability)
    if wanted != compute_capability:
        raise ConfigError(
            f"attention_backend={name!r} is for GPUs of compute capability {wanted}, and this one "
            f"has {compute_capability}; leave it out, and the right one is chosen"
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
            cache_dtype=jnp.dtype(config.cache_dtype),
        )
        layout_of(config, model).shape(n_blocks)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _shapes(config: ResolvedConfig, model: ModelConfig, mesh: Mesh) -> list[Shape]:
    device = mesh.devices.flat[0]
    backend = BACKENDS[device.platform]
    shapes = make_shapes(
        smallest=backend.smallest_batch,
        max_batched_tokens=config.max_num_batched_tokens,
        max_seqs=config.max_num_seqs,
        table_width=config.table_width,
        tile=backend.sample_tile,
        n_fine=N_FINE if config.pace else 0,
    )
    if config.deterministic:
        shapes = [_only_shape(shapes[-1], device.platform)]
    return [shape._replace(plan=_plan_sizes(shape, config, model, device)) for shape in shapes]


def _only_shape(largest: Shape, platform: str) -> Shape:
    """The one shape of all deterministic steps: whole tiles, whatever the limits are."""

    tile = row_tile(platform)

    def whole(size: int) -> int:
        return math.ceil(size / tile) * tile

    n_tokens, n_seqs = whole(largest.n_tokens), whole(largest.n_seqs)
    return largest._replace(n_tokens=n_tokens, n_seqs=n_seqs)


def _plan_sizes(
    shape: Shape, config: ResolvedConfig, model: ModelConfig, device: Any
) -> PlanSizes | None:
    heads = HeadLayout.of(model, config.tensor_parallel_size)
    n_processors = getattr(device, "core_count", DEFAULT_PROCESSORS)
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


def recipe_of(
    model: nnx.Module, model_config: ModelConfig, config: ResolvedConfig, mesh: Mesh
) -> Recipe:
    """Of a model on the mesh, or one that is not there: its shapes will do."""
    platform = mesh.devices.flat[0].platform
    tile = row_tile(platform)
    return make_recipe(
        model,
        model_config,
        mesh=mesh,
        cache=layout_of(config, model_config),
        n_rows=config.max_num_seqs,
        max_tokens=config.max_model_len,
        n_blocks=config.num_kv_blocks,
        hidden_dtype=Policy.here(config.dtype, mesh).activations,
        sample_tile=tile if config.deterministic else BACKENDS[platform].sample_tile,
        row_tile=tile if config.deterministic else None,
        layers=config.return_hidden_states,
        processors=config.processors,
    )


def layout_of(config: ResolvedConfig, model: ModelConfig) -> CacheLayout:
    return CacheLayout.of(
        model,
        backend=config.attention_backend,
        dtype=config.cache_dtype,
        block_size=config.block_size,
        n_shards=config.tensor_parallel_size,
    )


def fit_blocks(
    config: ResolvedConfig,
    model_config: ModelConfig,
    model: nnx.Module,
    shapes: list[Shape],
    mesh: Mesh,
    free: int,
) -> int:
    """Blocks that memory_fraction of the free bytes holds, at most what can ever be used.

    Raises:
        ConfigError: not even one block fits beside scratch.
    """
    if mesh.devices.flat[0].platform != "cpu":
        small = dataclasses.replace(config, num_kv_blocks=2)
        step = recipe_of(model, model_config, small, mesh).compile(shapes[-1])
        analysis = step.memory_analysis()
        assert analysis is not None
        free -= analysis.temp_size_in_bytes
    layout = layout_of(config, model_config)
    size = model_config.n_layers * layout.block_bytes
    n_blocks = min(config.num_kv_blocks, int(free * config.memory_fraction) // size)
    n_blocks = min(n_blocks, MAX_CACHE_SIZE // layout.block_elements)
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
