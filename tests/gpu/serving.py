"""One attention call at serving shapes, compiled for absent GPUs."""

import os
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

import pallas_kernels
from fastgen_jax.models.sharding import CACHE, HEADS, shard_attention
from pallas_kernels.contract import QUANTIZED, AttentionSpec, RaggedMeta
from pallas_kernels.gpu.plan import PlanSizes, WorkPlan
from tests import targets


@dataclass(frozen=True)
class Serving:
    """One compiled shape; the cache is that of a large pool."""

    heads: tuple[int, int] = (32, 8)
    head_size: int = 128
    n_tokens: int = 512
    n_seqs: int = 64
    n_blocks: int = 2048
    n_cells: int = 64
    max_context: int = 8192
    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    window: int | None = None
    soft_cap: float | None = None
    alibi: bool = False
    sinks: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("window", "soft_cap", "alibi", "sinks") if getattr(self, name)]
        sizes = f"{self.heads[0]}x{self.heads[1]}x{self.head_size}-T{self.n_tokens}-S{self.n_seqs}"
        return "-".join([sizes, self.dtype, self.cache_dtype, f"c{self.n_cells}", *flags])


SHAPES = [
    Serving(),
    Serving(n_cells=128),
    Serving(max_context=8128, window=4096),  # a table of odd width
    Serving(soft_cap=30.0),
    Serving(n_tokens=16, n_seqs=16),
    Serving(n_tokens=2048, n_seqs=512, cache_dtype="float8_e4m3fn"),
    Serving(cache_dtype="int8", window=4096, sinks=True),
    Serving(head_size=64, sinks=True, window=128),
    Serving(heads=(32, 32), head_size=80, dtype="float16", cache_dtype="float16"),
    Serving(heads=(32, 32), head_size=96, n_cells=16),
    Serving(heads=(16, 4), head_size=160),
    Serving(heads=(16, 4), head_size=192, cache_dtype="float8_e4m3fn"),
    Serving(heads=(16, 8), head_size=256, soft_cap=50.0, window=4096),
    Serving(heads=(71, 1), head_size=64, n_blocks=8192),
    Serving(heads=(32, 32), head_size=64, alibi=True),
    Serving(dtype="float32", cache_dtype="float32", soft_cap=30.0),
    Serving(heads=(16, 8), head_size=256, dtype="float32", cache_dtype="float32"),
]


def compile_attention(
    target: targets.Target,
    serving: Serving,
    attention=None,
    *,
    dump: Path | None = None,
    **plan_sizes,
):
    """The compiled call, split by heads, and the bytes of its cache, of all devices.

    attention: a backend's `ragged_paged_attention`, pallas_gpu's if None.
    dump: a directory for all that the compiler dumps.
    """
    device = target.mesh.devices.flat[0]
    attention = attention or pallas_kernels.select("pallas_gpu", device)
    attention = shard_attention(attention, target.mesh)
    (n_heads, n_kv_heads), head_size = serving.heads, serving.head_size
    t, s = serving.n_tokens, serving.n_seqs
    sizes = PlanSizes(
        n_tokens=t,
        n_seqs=s,
        n_heads=n_heads // target.mesh.size,
        n_kv_heads=n_kv_heads // target.mesh.size,
        head_size=head_size,
        max_context=serving.max_context,
        **plan_sizes,
    )

    def array(dtype, *shape, split=None):
        sharding = split and NamedSharding(target.mesh, split)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def int32(*shape):
        return array(jnp.int32, *shape)

    plan = WorkPlan(**{name: int32(*shape) for name, shape in sizes.shapes.items()})
    width = serving.max_context // serving.n_cells
    meta = RaggedMeta(
        int32(t), int32(t), int32(s, width), int32(s), int32(s + 1), int32(), int32(), plan
    )
    q = array(serving.dtype, t, n_heads, head_size, split=HEADS)
    k = array(serving.dtype, t, n_kv_heads, head_size, split=HEADS)
    pool = serving.n_blocks, n_kv_heads, 2, serving.n_cells
    cache = array(serving.cache_dtype, *pool, head_size, split=CACHE)
    scales, extras = {}, {}
    if jnp.dtype(serving.cache_dtype) in QUANTIZED:
        scales["kv_scales"] = array(jnp.float32, *pool)
    if serving.alibi:
        extras["alibi_slopes"] = array(jnp.float32, n_heads)
    if serving.sinks:
        extras["sinks"] = array(jnp.float32, n_heads)
    spec = AttentionSpec(head_size**-0.5, serving.window, serving.soft_cap)

    def call(cache, scales, extras, q, k, v, meta):
        return attention(q, k, v, cache, meta, spec=spec, **scales, **extras)

    options, environment = {"donate_argnums": (0, 1)}, {}
    if dump:
        environment = {"MOSAIC_GPU_DUMP_TO": str(dump)}
        # The machine code of a user's program, which the tests' other programs are not.
        flags = {"xla_dump_to": str(dump), "xla_backend_optimization_level": 3}
        options["compiler_options"] = flags
    with mock.patch.dict(os.environ, environment):
        compiled = target.compile(call, cache, scales, extras, q, k, k, meta, **options)
    return compiled, sum(x.size * x.dtype.itemsize for x in (cache, *scales.values()))
