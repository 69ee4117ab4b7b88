"""Experts' products, compiled for an absent GPU or TPU."""

import jax
import jax.numpy as jnp
import pytest

from fastgen_jax.engine.step import compiler_options
from fastgen_jax.models.moe import grouped_product
from tests import targets


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("chip", ["h100", "a100"])
@pytest.mark.parametrize("n_rows", [64, 3072])
def test_on_a_gpu_one_launch_multiplies_with_all_experts_and_copies_none(n_rows, chip):
    x = jax.ShapeDtypeStruct((n_rows, 2880), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((32, 5760, 2880), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((32,), jnp.int32)
    compiled = targets.gpu_target(chip).compile(grouped_product, x, weight, sizes)
    text = compiled.as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 1
    assert " while(" not in text
    assert compiled.memory_analysis().temp_size_in_bytes < 2**16


@pytest.mark.compile
@pytest.mark.parametrize("chip", ["v6e", "tpu7x"])
def test_what_a_tpu_needs_at_once_of_its_fast_memory_fits(chip):
    """Mixtral's second product of 768 tokens: by default XLA gives it less than it then wants."""
    x = jax.ShapeDtypeStruct((1536, 14336), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((4, 4096, 14336), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    target = targets.tpu_target(chip)
    options = compiler_options(target.mesh.devices.flat[0])
    compiled = target.compile(grouped_product, x, weight, sizes, compiler_options=options)
    assert compiled.memory_analysis().output_size_in_bytes == 4 * 1536 * 4096
