"""Whole engine steps of Llama models for absent accelerators, as the engine compiles them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fastgen_jax.checkpoints.loading import abstract_model, flat_params
from fastgen_jax.engine.batch import MAX_BANNED, Shape, packed_size
from fastgen_jax.engine.startup import BACKENDS, DEFAULT_PROCESSORS
from fastgen_jax.engine.step import DeviceState, Program, step
from fastgen_jax.engine.step import compiler_options as engine_options
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.decoder import Model
from fastgen_jax.models.kv_cache import CacheLayout
from fastgen_jax.models.layers import Policy
from fastgen_jax.models.layout import HeadLayout
from fastgen_jax.models.sharding import placed
from fastgen_jax.sampling_params import MAX_LOGIT_BIAS
from pallas_kernels import plan_sizes
from tests import targets

LLAMA_3_8B = ModelConfig(
    family="llama",
    vocab_size=128256,
    hidden_size=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    ffn_size=14336,
    max_position=8192,
)
QWEN3_8B = dataclasses.replace(
    LLAMA_3_8B,
    vocab_size=151936,
    n_layers=36,
    ffn_size=12288,
    qk_norm="head",
    max_position=40960,
)
LLAMA_2_7B = dataclasses.replace(
    LLAMA_3_8B, vocab_size=32000, n_kv_heads=32, ffn_size=11008, max_position=4096
)
SMALL = dataclasses.replace(
    LLAMA_2_7B, vocab_size=2048, hidden_size=1024, n_layers=2, n_heads=8, n_kv_heads=4
)
N_TOKENS, N_SEQS = 768, 256
ROW_TABLES = (
    jax.ShapeDtypeStruct((N_SEQS, MAX_LOGIT_BIAS), jnp.int32),
    jax.ShapeDtypeStruct((N_SEQS, MAX_LOGIT_BIAS), jnp.float32),
    jax.ShapeDtypeStruct((N_SEQS, MAX_BANNED), jnp.int32),
)


def make_target(chip: str, n_devices: int = 1) -> targets.Target:
    make = targets.gpu_target if chip in targets.GPUS else targets.tpu_target
    return make(chip, n_devices)


def placed_params(model: Model, mesh: Mesh) -> tuple[jax.ShapeDtypeStruct, ...]:
    params = flat_params(model).items()
    return tuple(placed(path, param, model.config, mesh) for path, param in params)


def compile_step(
    config: ModelConfig,
    target: targets.Target,
    *,
    n_tokens: int = N_TOKENS,
    attention: str = "",
    cache_bytes: int = 1 << 30,
    row_tile: int | None = None,
    kv_dtype: str = "bfloat16",
    **compiler_options: Any,
):
    """The compiled step in bfloat16 with the engine's sizes, and its cache's bytes on a device.

    attention: a backend's name; by default that of the platform.
    cache_bytes: about as many on each device, of a cache of kv_dtype.
    row_tile: see Program; rows are drawn in tiles of that size too.
    compiler_options: beside the engine's.
    """
    platform = "gpu" if target.platform == "cuda" else "tpu"
    backend, n_seqs = BACKENDS[platform], min(n_tokens, N_SEQS)
    attention = attention or backend.attention
    mesh, n_devices = target.mesh, target.mesh.size
    heads, width = HeadLayout.of(config, n_devices), config.max_position // backend.block_size
    plan = plan_sizes(
        attention,
        n_tokens=n_tokens,
        n_seqs=n_seqs,
        n_heads=heads.n_own_query_slots,
        n_kv_heads=heads.n_own_kv_slots,
        head_size=config.head_dim,
        max_context=config.max_position,
        n_ctas=2 * getattr(mesh.devices.flat[0], "core_count", DEFAULT_PROCESSORS),
    )
    shape = Shape(n_tokens, n_seqs, width, plan)
    model = abstract_model(config, Policy("bfloat16", "bfloat16", mesh))
    sample_tile = row_tile or backend.sample_tile
    program = Program(jax.tree.structure(model), attention, mesh, sample_tile, row_tile)
    layout = CacheLayout.of(
        config,
        backend=attention,
        dtype=kv_dtype,
        block_size=backend.block_size,
        n_shards=n_devices,
    )
    block_bytes = config.n_layers * layout.block_bytes
    n_blocks = cache_bytes // block_bytes
    compiled = target.compile(
        functools.partial(step, program=program, shape=shape),
        placed_params(model, mesh),
        DeviceState(
            (layout.absent(n_blocks, mesh),) * config.n_layers,
            jax.ShapeDtypeStruct((N_SEQS + 1, config.max_position), jnp.int32),
        ),
        jax.ShapeDtypeStruct((packed_size(shape),), jnp.int32),
        ROW_TABLES,
        donate_argnums=(1,),
        compiler_options=engine_options(mesh.devices.flat[0]) | compiler_options,
    )
    return compiled, n_blocks * block_bytes
