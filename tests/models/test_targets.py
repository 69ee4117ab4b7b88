"""Experts' products, compiled for an absent GPU."""

import jax
import jax.numpy as jnp
import pytest

from fastgen_jax.models.moe import grouped_product
from tests import targets


@pytest.mark.compile
@pytest.mark.parametrize("n_rows", [256, 3072])
def test_on_a_gpu_at_most_one_expert_is_copied(n_rows):
    x = jax.ShapeDtypeStruct((n_rows, 2048), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((32, 1536, 2048), jnp.bfloat16)  # 201 MB
    sizes = jax.ShapeDtypeStruct((32,), jnp.int32)
    compiled = targets.gpu_target().compile(grouped_product, x, weight, sizes)
    rows = (n_rows + 128) * (2 * 2048 + 4 * 1536)  # padded by a tile, in bfloat16 and float32
    expert = 2 * 1536 * 2048
    assert compiled.memory_analysis().temp_size_in_bytes < rows + expert + 2**20
