"""The GPU attention kernels at serving shapes, compiled by the real compiler for absent GPUs."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from benchmarks.gpu.sass import PACKAGES, find_tool, read_kernels, read_mosaic_kernel
from benchmarks.gpu.schedule import Case, measure, measure_mosaic
from fastgen_jax.models.moe import grouped_product
from pallas_kernels.mosaic_gpu.chunk import GIVEN
from tests import targets
from tests.gpu.serving import SHAPES, Serving, compile_attention

# Newer versions of jax give it when a program is lowered.
pytestmark = [
    pytest.mark.compile,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),
]

GPUS = ("h100", "a100")
MOSAIC_SHAPES = [  # not those of BOUNDS: a process dumps each kernel once
    Serving(head_size=64, sinks=True, window=128, n_cells=128),
    Serving(heads=(32, 32), dtype="float16", cache_dtype="float16", n_cells=16),
    Serving(heads=(16, 8), soft_cap=50.0, window=4096),
    Serving(heads=(64, 8), alibi=True, sinks=True),
    Serving(heads=(64, 4)),
]
# Instructions of a warp for 64 cells without masks: GPU, kernel, head size, dtype of the cache.
BOUNDS = {
    ("h100", "decode", 128, "bfloat16"): 270,
    ("h100", "decode", 128, "float8_e4m3fn"): 500,
    ("h100", "decode", 128, "int8"): 500,
    ("h100", "chunks", 128, "bfloat16"): 270,
    ("h100", "chunks", 64, "bfloat16"): 240,
    ("h100", "chunks_mosaic", 128, "bfloat16"): 270,
    ("h100", "chunks_mosaic", 64, "bfloat16"): 240,
    ("a100", "decode", 128, "float8_e4m3fn"): 505,
    ("a100", "chunks", 128, "bfloat16"): 535,
}


@pytest.fixture
def tools():
    try:
        for name in PACKAGES:
            find_tool(name)
    except FileNotFoundError as error:
        targets.absent(str(error))


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("serving", SHAPES, ids=str)
def test_kernels_compile_in_place_with_small_temporaries_and_no_spill(
    gpu, serving, tmp_path, tools
):
    compiled, cache_bytes = compile_attention(targets.gpu_target(gpu), serving, dump=tmp_path)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < 64 * 2**20
    kernels = read_kernels(tmp_path, "attention_")
    assert not any(x.is_serialized for x in kernels)
    spilled = {x.name: x.spilled_size for x in kernels}
    if serving.dtype != "float32":  # whose products have no matrix unit: in registers, and slow
        assert len(spilled) >= 2 and not any(spilled.values()), spilled


@pytest.mark.parametrize("serving", MOSAIC_SHAPES, ids=str)
def test_mosaic_kernel_compiles_in_place_without_a_spill(serving, tmp_path, tools):
    target, attention = targets.gpu_target("h100"), pallas_kernels.select("mosaic_gpu")
    compiled, cache_bytes = compile_attention(target, serving, attention, dump=tmp_path)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < 64 * 2**20
    assert len(re.findall(r"custom_call_target=.*mosaic_gpu", compiled.as_text())) == 1
    kernel = read_mosaic_kernel(tmp_path, "chunks_mosaic", 0)
    assert (kernel.spilled_size, kernel.n_registers, kernel.n_threads) == (0, GIVEN, 384)
    assert len(kernel.tile_loops) == (3 if serving.window else 2)


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float8_e4m3fn"])
def test_temporaries_do_not_grow_with_the_pool(cache_dtype):
    target = targets.gpu_target("h100")
    few = Serving(n_tokens=64, cache_dtype=cache_dtype, n_blocks=64)
    many = dataclasses.replace(few, n_blocks=16_000)  # as many cells as a kernel can address
    sizes = [
        compile_attention(target, serving)[0].memory_analysis().temp_size_in_bytes
        for serving in (few, many)
    ]
    assert sizes[0] == sizes[1]


def test_decode_programs_have_no_chunk_kernel():
    serving = Serving(n_tokens=64, n_seqs=64)
    target = targets.gpu_target("h100")
    with_chunks, _ = compile_attention(target, serving)
    without, _ = compile_attention(target, serving, max_short=64)
    assert "attention_chunks" in with_chunks.as_text()
    assert "attention_chunks" not in without.as_text()


def test_eight_gpus_attend_to_their_own_heads_without_a_word_to_each_other():
    compiled, cache_bytes = compile_attention(targets.gpu_target("h100", 8), Serving())
    assert compiled.memory_analysis().alias_size_in_bytes >= cache_bytes // 8
    assert not re.findall(targets.COLLECTIVE, compiled.as_text())


@pytest.mark.parametrize(
    ("chip", "head_size", "dtype"), sorted({(c, h, d) for c, _, h, d in BOUNDS})
)
def test_kernels_take_few_instructions(chip, head_size, dtype, tools):
    case = Case(chip, head_size, dtype)
    found = measure(case) | (measure_mosaic(case) if case.has_mosaic else {})
    assert not any(x.spilled for x in found.values())
    taken = {name.removeprefix("attention_"): x.interior for name, x in found.items()}
    bounds = {k: n for (c, k, h, d), n in BOUNDS.items() if (c, h, d) == (chip, head_size, dtype)}
    assert not {k: taken[k] for k, bound in bounds.items() if not 0 < taken[k] <= bound}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("n_rows", [64, 3072])
def test_products_of_experts_spill_nothing_and_use_the_matrix_unit(gpu, n_rows, tmp_path, tools):
    x = jax.ShapeDtypeStruct((n_rows, 2880), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((32, 5760, 2880), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((32,), jnp.int32)
    dump = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True}
    targets.gpu_target(gpu).compile(grouped_product, x, weight, sizes, compiler_options=dump)
    (kernel,) = read_kernels(tmp_path, "grouped_product")
    assert kernel.spilled_size == 0
    assert kernel.tile_loops
