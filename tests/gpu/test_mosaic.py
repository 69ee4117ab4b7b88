"""What is particular to mosaic_gpu: what it refuses, windows whose blocks are gone,
blocks and groups of all sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import pallas_kernels
from fastgen_jax.engine.startup import check_attention
from fastgen_jax.errors import ConfigError
from pallas_kernels import cache_shape, check_heads
from pallas_kernels.mosaic_gpu.chunk import chunks, make_tiles
from tests.pallas_kernels.attention_cases import (
    HAS_SIMULATOR,
    Case,
    Implementation,
    check,
    expected,
    gpu_plan,
    load,
    make_batch,
)

BFLOAT16 = "bfloat16", "bfloat16"
CASE = Case(dtypes=BFLOAT16, heads=(2, 1), n_cells=64)
is_simulated = pytest.mark.skipif(
    not HAS_SIMULATOR, reason="jax 0.10 has no simulator of Mosaic GPU kernels; jax 0.11 has"
)


def test_chips_but_hopper_are_refused_by_name():
    check_attention("mosaic_gpu", "gpu", "9.0")
    check_attention("pallas_gpu", "gpu", "8.0")
    with pytest.raises(ConfigError, match=r"'mosaic_gpu' is for .* 9\.0, and this one has 8\.0"):
        check_attention("mosaic_gpu", "gpu", "8.0")
    with pytest.raises(ConfigError, match=r"9\.0, and this one has 10\.0"):
        check_attention("mosaic_gpu", "gpu", "10.0")
    with pytest.raises(ConfigError, match="'mosaic_gpu' runs on gpu, and this is cpu"):
        check_attention("mosaic_gpu", "cpu")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"head_size": 80}, "head size 80 with 4 query heads per KV head: mosaic_gpu has head"),
        ({"group_size": 7}, "head size 128 with 7 query heads per KV head: mosaic_gpu has head"),
        ({"dtype": jnp.float32}, "mosaic_gpu has bfloat16 and float16, not .*float32"),
        ({"cache_dtype": "int8"}, "a KV cache of the queries' bfloat16, not of int8; pallas_gpu"),
    ],
)
def test_heads_that_the_kernel_does_not_take_are_refused(changed, message):
    sizes = {"head_size": 128, "group_size": 4, "dtype": jnp.bfloat16}
    check_heads("mosaic_gpu", **sizes)
    with pytest.raises(ValueError, match=message):
        check_heads("mosaic_gpu", **sizes | changed)


@pytest.mark.parametrize("n_cells", [4, 48, 192])
def test_blocks_that_the_kernel_does_not_take_are_refused(n_cells):
    sizes = {"n_blocks": 2, "n_kv_heads": 1, "head_size": 64}
    for good in (8, 16, 64, 128, 256):
        cache_shape("mosaic_gpu", block_size=good, **sizes)
    with pytest.raises(ValueError, match=f"not {n_cells}; use block_size=64"):
        cache_shape("mosaic_gpu", block_size=n_cells, **sizes)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float16"])
def test_caches_of_another_dtype_are_refused(dtype):
    case = dataclasses.replace(CASE, dtypes=("bfloat16", dtype))
    attention = Implementation("mosaic_gpu", pallas_kernels.select("mosaic_gpu"), plan=gpu_plan)
    with pytest.raises(ValueError, match=f"of the queries' bfloat16, not of {dtype}; pallas_gpu"):
        attention(case, make_batch(case))


@pytest.mark.parametrize("head_size", [64, 128])
def test_what_a_program_shares_fits_into_shared_memory(head_size):
    tiles = make_tiles(32, 8, head_size, 64, jnp.bfloat16)
    assert 0 < tiles.shared_size + 1024 <= 232_448


@pytest.mark.newer_jax
@is_simulated
@pytest.mark.parametrize("window", [40, 200])
def test_blocks_behind_the_window_may_be_gone(window):
    case = dataclasses.replace(CASE, window=window, longest=640)
    batch = make_batch(case, [(600, 20), (300, 2)])
    want = expected(case, batch)
    tables = batch.meta.block_tables.copy()
    for s, first in enumerate((600 - 20, 300 - 2)):
        n_gone = max(first - window + 1, 0) // case.n_cells
        assert n_gone
        tables[s, :n_gone] = 0  # scratch, which holds NaN
    batch = batch._replace(meta=batch.meta._replace(block_tables=tables))
    check(case, batch, load("mosaic_gpu")(case, batch), want)


@pytest.mark.newer_jax
@is_simulated
@pytest.mark.parametrize("n_cells", [8, 256])
def test_small_and_large_blocks_match_the_oracle(n_cells):
    case = dataclasses.replace(CASE, n_cells=n_cells, longest=512)
    batch = make_batch(case, [(1, 1), (290, 20), (128, 9), (256, 1)])
    check(case, batch, load("mosaic_gpu")(case, batch))


@pytest.mark.newer_jax
@is_simulated
@pytest.mark.parametrize("heads", [(1, 1), (16, 1)])
def test_whole_and_partial_tiles_of_the_smallest_and_largest_groups_match_the_oracle(heads):
    case = dataclasses.replace(CASE, heads=heads, n_tokens=160)
    batch = make_batch(case, [(128, 128), (9, 9), (70, 8)])
    check(case, batch, load("mosaic_gpu")(case, batch))


@pytest.mark.newer_jax
@pytest.mark.parametrize("head_size", [64, 128])
def test_kernel_lowers_for_hopper_with_this_jax(head_size):
    kind = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="cuda")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=kind)
    shapes = (16, 8, head_size), (16, 8, head_size), (9, 2, 2, 64, head_size)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    arrays += [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((3, 8), (2, 4))]
    call = jax.jit(functools.partial(chunks, spec=CASE.spec))
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = call.trace(*arrays).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 1
