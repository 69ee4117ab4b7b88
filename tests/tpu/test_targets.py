"""The TPU attention kernels at serving shapes, compiled by the real compiler for absent TPUs."""

import dataclasses
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

import pallas_kernels
from fastgen_jax.models.sharding import CACHE, HEADS, shard_attention
from pallas_kernels.contract import QUANTIZED, AttentionSpec, RaggedMeta, cache_shape
from tests import targets

pytestmark = pytest.mark.compile

N_CELLS = 128


@dataclass(frozen=True)
class Serving:
    """One compiled shape; the cache is that of a large pool."""

    chip: str = "v5e"
    heads: tuple[int, int] = (32, 8)
    head_size: int = 128
    n_tokens: int = 512
    n_seqs: int = 64
    n_blocks: int = 2048
    max_context: int = 131_072
    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    window: int | None = None
    soft_cap: float | None = None
    alibi: bool = False
    sinks: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("window", "soft_cap", "alibi", "sinks") if getattr(self, name)]
        sizes = f"{self.heads[0]}x{self.heads[1]}x{self.head_size}-T{self.n_tokens}-S{self.n_seqs}"
        return "-".join([self.chip, sizes, self.dtype, self.cache_dtype, *flags])

    @property
    def activation_bytes(self) -> int:
        """Of q, k, v and the output."""
        n_heads = 2 * self.heads[0] + 2 * self.heads[1]
        return self.n_tokens * n_heads * self.head_size * jnp.dtype(self.dtype).itemsize


# Most have the heads that one device of several has: they compile in a third of the time.
SHAPES = [
    Serving(),
    Serving("v4", heads=(8, 2), cache_dtype="int8"),
    Serving("v5p", heads=(8, 2), head_size=64, window=128, sinks=True),
    Serving("v5e", heads=(8, 2), n_tokens=2048, n_seqs=512, cache_dtype="int8", window=4096),
    Serving("v5e", heads=(4, 1), head_size=160, soft_cap=30.0, n_tokens=64),
    Serving("v5e", heads=(8, 1), cache_dtype="float8_e4m3fn", n_tokens=2048, n_seqs=256),
    Serving("v6e", heads=(8, 2), n_tokens=16, n_seqs=16, sinks=True),
    Serving("v6e", heads=(8, 8), head_size=80, n_tokens=1024, alibi=True, cache_dtype="int8"),
    Serving("v6e", heads=(8, 2), head_size=192, cache_dtype="float8_e4m3fn"),
    Serving("v6e", heads=(8, 4), head_size=256, soft_cap=50.0, window=4096, n_tokens=2048),
    Serving("tpu7x", n_tokens=2048, n_seqs=512),
    Serving("tpu7x", heads=(8, 8), head_size=96, cache_dtype="float8_e4m3fn"),
    Serving("tpu7x", heads=(71, 1), head_size=64, alibi=True, n_blocks=8192),
    Serving("tpu7x", heads=(8, 8), dtype="float32", cache_dtype="int8", n_tokens=256),
]


def compile_attention(serving: Serving, n_devices: int = 1):
    """The compiled call, split by heads, and the bytes of its cache, of all devices."""
    target = targets.tpu_target(serving.chip, n_devices)
    attention = shard_attention(pallas_kernels.select("pallas_tpu"), target.mesh)
    (n_heads, n_kv_heads), head_size = serving.heads, serving.head_size
    t, s = serving.n_tokens, serving.n_seqs

    def array(dtype, *shape, split=None):
        sharding = split and NamedSharding(target.mesh, split)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def int32(*shape):
        return array(jnp.int32, *shape)

    width = serving.max_context // N_CELLS
    meta = RaggedMeta(int32(t), int32(t), int32(s, width), int32(s), int32(s + 1), int32(), int32())
    q = array(serving.dtype, t, n_heads, head_size, split=HEADS)
    k = array(serving.dtype, t, n_kv_heads, head_size, split=HEADS)
    own = cache_shape(
        "pallas_tpu",
        n_blocks=serving.n_blocks,
        n_kv_heads=n_kv_heads // n_devices,
        block_size=N_CELLS,
        head_size=head_size,
    )
    cache = array(serving.cache_dtype, own[0], n_kv_heads, *own[2:], split=CACHE)
    scales, extras = {}, {}
    if jnp.dtype(serving.cache_dtype) in QUANTIZED:
        scales["kv_scales"] = array(jnp.float32, *cache.shape[:3], N_CELLS)
    if serving.alibi:
        extras["alibi_slopes"] = array(jnp.float32, n_heads)
    if serving.sinks:
        extras["sinks"] = array(jnp.float32, n_heads)
    spec = AttentionSpec(head_size**-0.5, serving.window, serving.soft_cap)

    def call(cache, scales, extras, q, k, v, meta):
        return attention(q, k, v, cache, meta, spec=spec, **scales, **extras)

    compiled = target.compile(call, cache, scales, extras, q, k, k, meta, donate_argnums=(0, 1))
    return compiled, sum(x.size * x.dtype.itemsize for x in (cache, *scales.values()))


def test_shapes_hold_every_head_size_cache_and_chip():
    assert {serving.chip for serving in SHAPES} == {*targets.TPUS}
    assert {serving.head_size for serving in SHAPES} == {64, 80, 96, 128, 160, 192, 256}
    for chip in ("v5e", "v6e", "tpu7x"):
        caches = {serving.cache_dtype for serving in SHAPES if serving.chip == chip}
        assert caches == {"bfloat16", "int8", "float8_e4m3fn"}


@pytest.mark.parametrize("serving", SHAPES, ids=str)
def test_programs_compile_in_place_with_small_temporaries(serving):
    compiled, cache_bytes = compile_attention(serving)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < 0.05 * cache_bytes + 4 * serving.activation_bytes


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_temporaries_do_not_grow_with_the_pool(cache_dtype):
    few = Serving(heads=(8, 2), n_tokens=64, cache_dtype=cache_dtype, n_blocks=64)
    many = dataclasses.replace(few, n_blocks=32_767)  # as many cells as a cache may have
    sizes = [
        compile_attention(serving)[0].memory_analysis().temp_size_in_bytes
        for serving in (few, many)
    ]
    assert sizes[1] - sizes[0] < 1 << 20


def test_four_chips_attend_to_their_own_heads_without_a_word_to_each_other():
    compiled, cache_bytes = compile_attention(Serving("v5e"), n_devices=4)
    assert compiled.memory_analysis().alias_size_in_bytes >= cache_bytes // 4
    text = compiled.as_text()
    assert {*re.findall(r"paged_(decode|write|chunk)", text)} == {"decode", "write", "chunk"}
    assert not re.findall(targets.COLLECTIVE, text)
