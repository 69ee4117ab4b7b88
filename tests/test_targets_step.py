"""The engine's step, compiled by the real compilers for accelerators that this machine lacks."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fastgen_jax.batch import MAX_BANNED, Shape, packed_size
from fastgen_jax.checkpoint import abstract_model
from fastgen_jax.config import MAX_LOGIT_BIAS, ModelConfig
from fastgen_jax.layers import Policy
from fastgen_jax.runner import DeviceState, Program, step
from tests import targets

CONFIG = ModelConfig(
    family="llama",
    vocab_size=32000,
    hidden_size=1024,
    n_layers=4,
    n_heads=8,
    n_kv_heads=4,
    head_dim=128,  # of 64, TPU would store the cache transposed, to save lanes, and copy it
    ffn_size=2816,
    max_position=4096,
)
SHAPE = Shape(n_tokens=256, n_seqs=64, n_blocks=64)
N_ROWS, MAX_TOKENS, BLOCK_SIZE = 64, 4096, 64


def compile_step(target, n_blocks):
    """The compiled step in bfloat16, and the bytes of its cache."""
    graphdef, params = nnx.split(abstract_model(CONFIG, Policy("bfloat16", "bfloat16")))
    leaves, treedef = jax.tree.flatten(params)
    program = Program(graphdef, treedef, "xla", target.mesh, sample_tile=64)
    cache = jax.ShapeDtypeStruct(
        (n_blocks, CONFIG.n_kv_heads, 2, BLOCK_SIZE, CONFIG.head_dim), jnp.bfloat16
    )
    known = jax.ShapeDtypeStruct((N_ROWS + 1, MAX_TOKENS), jnp.int32)
    tables = (
        jax.ShapeDtypeStruct((N_ROWS, MAX_LOGIT_BIAS), jnp.int32),
        jax.ShapeDtypeStruct((N_ROWS, MAX_LOGIT_BIAS), jnp.float32),
        jax.ShapeDtypeStruct((N_ROWS, MAX_BANNED), jnp.int32),
    )
    compiled = target.compile(
        functools.partial(step.__wrapped__, program=program, shape=SHAPE),
        tuple(leaves),
        DeviceState((cache,) * CONFIG.n_layers, known),
        jax.ShapeDtypeStruct((packed_size(SHAPE),), jnp.int32),
        tables,
        donate_argnums=(1,),
    )
    return compiled, CONFIG.n_layers * cache.size * 2


@pytest.mark.parametrize("platform", ["v5e", "h100"])
def test_step_aliases_the_whole_cache_and_temporaries_do_not_grow_with_it(platform):
    make = targets.tpu_target if platform == "v5e" else targets.gpu_target
    small, _ = compile_step(make(platform), n_blocks=256)
    large, cache_bytes = compile_step(make(platform), n_blocks=4096)
    memory = large.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    activations = 4 * SHAPE.n_tokens * (8 * CONFIG.ffn_size) + 16 * SHAPE.n_seqs * CONFIG.vocab_size
    assert memory.temp_size_in_bytes < 0.05 * cache_bytes + 4 * activations
    growth = memory.temp_size_in_bytes - small.memory_analysis().temp_size_in_bytes
    assert growth < 0.01 * cache_bytes
