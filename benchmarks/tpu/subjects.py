"""The kernels that benchmarks/tpu/schedule.py compiles: how to call each, and what an iteration of
its inner loop does.

Imports jax and the kernels only when a program is made: in the process that compiles it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

BLOCK = 128  # cells
ROWS = 128  # query rows that a chunk kernel's figures are normalised to


class Case(NamedTuple):
    """What to compile, and for which chip."""

    chip: str
    head_size: int
    n_kv_heads: int
    group: int
    dtype: str
    tiles: dict[str, int]


Program = tuple[Callable, list[Any], tuple[int, ...]]  # function, shapes, which are donated


class Work(NamedTuple):
    """What one iteration of a kernel's inner loop does, in units: 128 cells of one KV head, for
    chunk kernels met by 128 query rows."""

    units: float
    bytes_per_unit: float  # that HBM must deliver
    flops_per_unit: float
    n_inner: int = 1  # iterations of the inner loop in one of the loop around it


class Subject(NamedTuple):
    """A kernel: how to call it, how its name in the dump begins, what an iteration does."""

    kernel: str
    program: Callable[[Case], Program]
    work: Callable[[Case], Work]


def _shape(dims: tuple[int, ...], dtype: str = "int32") -> Any:
    import jax
    import jax.numpy as jnp

    return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))


N_TOKENS, N_SEQS, N_POOL, N_TABLE = 512, 64, 1024, 32
QUANTIZED = "int8", "float8_e4m3fn"


class OurArguments(NamedTuple):
    """Shapes that the programs of pallas_kernels.tpu take."""

    q: Any
    new: tuple[Any, ...]  # the step's cells "T K 2 H", and their scales "T K 2"
    cache: tuple[Any, ...]
    meta: Any


def our_arguments(case: Case) -> OurArguments:
    """A batch of N_TOKENS tokens in N_SEQS sequences."""
    from pallas_kernels.contract import RaggedMeta

    n_kv, size = case.n_kv_heads, case.head_size
    cache = [_shape((N_POOL, n_kv, 2, size, BLOCK), case.dtype)]
    new = [_shape((N_TOKENS, n_kv, 2, size), case.dtype)]
    if case.dtype in QUANTIZED:
        cache.append(_shape((N_POOL, n_kv, 2, BLOCK), "float32"))
        new.append(_shape((N_TOKENS, n_kv, 2), "float32"))
    meta = RaggedMeta(
        *map(_shape, [(N_TOKENS,), (N_TOKENS,), (N_SEQS, N_TABLE), (N_SEQS,), (N_SEQS + 1,)]),
        n_seqs=_shape(()),
        n_single=_shape(()),
    )
    dtype = "bfloat16" if case.dtype in QUANTIZED else case.dtype
    q = _shape((N_TOKENS, n_kv * case.group, size), dtype)
    return OurArguments(q, tuple(new), tuple(cache), meta)


def our_options(case: Case) -> dict[str, Any]:
    """A plain causal layer's, with the case's tiles."""
    from pallas_kernels.contract import AttentionSpec

    spec = AttentionSpec(scale=case.head_size**-0.5)
    features = {"spec": spec, "alibi_slopes": None, "sinks": None}
    return features | {"tiles": _our_tiles(case), "interpret": False}


def our_decode(case: Case) -> Program:
    """pallas_kernels.tpu's program for single tokens."""
    from pallas_kernels.tpu.decode import paged_decode

    options = our_options(case)
    return (lambda *args: paged_decode(*args, **options)), [*our_arguments(case)], (2,)


def our_chunk(case: Case) -> Program:
    """... for sequences with more new tokens, which are in the cache already."""
    from pallas_kernels.tpu.chunk import paged_chunk

    options, arguments = our_options(case), our_arguments(case)
    args = [arguments.q, arguments.cache, arguments.meta]
    return (lambda *args: paged_chunk(*args, **options)), args, ()


def _our_tiles(case: Case) -> Any:
    from pallas_kernels.tpu import tiles

    return tiles.Tiles(**case.tiles)


def our_decode_work(case: Case) -> Work:
    """An iteration: `decode_blocks` blocks of each of `decode_streams` sequences, all KV heads."""
    tiles = _our_tiles(case)
    return decode_work(case, tiles.decode_blocks * tiles.decode_streams * case.n_kv_heads)


def our_chunk_work(case: Case) -> Work:
    """An iteration: `chunk_blocks` blocks of one KV head, `chunk_queries` tokens of as many of its
    query heads as paged_chunk takes together.
    """
    tiles = _our_tiles(case)
    n_together = max(n for n in range(1, 9) if case.group % n == 0)
    n_apart = case.group // n_together
    work = chunk_work(case, tiles.chunk_blocks, tiles.chunk_queries * case.group)
    return work._replace(units=work.units / n_apart, n_inner=case.n_kv_heads * n_apart)


def decode_work(case: Case, n_tiles: int) -> Work:
    """n_tiles: blocks times KV heads."""
    return Work(n_tiles, block_bytes(case), 4 * BLOCK * case.head_size * case.group)


def chunk_work(case: Case, n_tiles: int, rows: int) -> Work:
    """rows: of queries that meet a block while it is in VMEM."""
    flops = 4 * BLOCK * case.head_size * ROWS
    return Work(n_tiles * rows / ROWS, block_bytes(case) * ROWS / rows, flops)


def item_size(case: Case) -> int:
    """Bytes of a cell's element."""
    return {"float32": 4, "bfloat16": 2}.get(case.dtype, 1)


def block_bytes(case: Case) -> float:
    """Keys and values of 128 cells of one KV head, with their scales if quantised."""
    size = item_size(case)
    return 2 * BLOCK * (case.head_size * size + (4 if size == 1 else 0))


JAX_TILES = {"pages": 4, "queries": 32}


def jax_program(case: Case) -> Program:
    """jax's own kernel: blocks of 128 cells, `pages` blocks and `queries` tokens per iteration."""
    from jax.experimental.pallas.ops.tpu import ragged_paged_attention as rpa

    if case.head_size % 128:
        raise ValueError(f"jax_rpa has head sizes of 128 or its multiples, not {case.head_size}")
    tiles = JAX_TILES | case.tiles
    q = _shape((N_TOKENS, case.n_kv_heads * case.group, case.head_size), "bfloat16")
    cache = _shape((N_POOL, BLOCK, 2 * case.n_kv_heads, case.head_size), case.dtype)
    metadata = map(_shape, [(N_SEQS,), (N_SEQS, N_TABLE), (N_SEQS + 1,), (1,)])

    def run(*args):
        return rpa.ragged_paged_attention(
            *args,
            sm_scale=0.1,
            num_kv_pages_per_block=tiles["pages"],
            num_queries_per_block=tiles["queries"],
            vmem_limit_bytes=64 << 20,
        )

    return run, [q, cache, *metadata], ()


def jax_chunk_work(case: Case) -> Work:
    """An iteration: `pages` blocks, `queries` tokens, all heads."""
    tiles = JAX_TILES | case.tiles
    return chunk_work(case, tiles["pages"] * case.n_kv_heads, tiles["queries"] * case.group)


def jax_decode_work(case: Case) -> Work:
    """The same code serves one token, in a tile of `queries`."""
    return decode_work(case, (JAX_TILES | case.tiles)["pages"] * case.n_kv_heads)


RPA3_TILES = {"cells": 512, "queries": 32}


def rpa3_program(case: Case) -> Program:
    """tpu-inference's RPA v3, which pads heads to 128 lanes; one call holds all its kernels."""
    from tpu_inference.kernels.ragged_paged_attention.v3.kernel import (  # pyright: ignore
        ragged_paged_attention,
    )

    tiles, padded = RPA3_TILES | case.tiles, _padded(case).head_size
    dtype = "bfloat16" if case.dtype in QUANTIZED else case.dtype
    packing = {"float32": 1, "bfloat16": 2}.get(case.dtype, 4)
    q = _shape((N_TOKENS, case.n_kv_heads * case.group, case.head_size), dtype)
    kv = _shape((N_TOKENS, case.n_kv_heads, case.head_size), case.dtype)
    cache = _shape(
        (N_POOL, BLOCK, 2 * case.n_kv_heads // packing, packing, padded),
        case.dtype,
    )
    metadata = map(_shape, [(N_SEQS,), (N_SEQS * N_TABLE,), (N_SEQS + 1,), (3,)])
    decode = (1, tiles["cells"], 1, tiles["cells"])
    chunk = (tiles["queries"], tiles["cells"]) * 2

    def run(*args):
        return ragged_paged_attention(
            *args,
            sm_scale=0.1,
            d_block_sizes=decode,
            p_block_sizes=chunk,
            m_block_sizes=chunk,
            vmem_limit_bytes=64 << 20,
        )

    return run, [q, kv, kv, cache, *metadata], (0, 1, 2, 3)


def _padded(case: Case) -> Case:
    return case._replace(head_size=-(-case.head_size // 128) * 128)


def rpa3_decode_work(case: Case) -> Work:
    """An iteration: `cells` of one sequence, all KV heads."""
    n_blocks = (RPA3_TILES | case.tiles)["cells"] / BLOCK
    return decode_work(_padded(case), int(n_blocks * case.n_kv_heads))


def rpa3_chunk_work(case: Case) -> Work:
    """An iteration: `cells`, `queries` tokens, all heads."""
    tiles = RPA3_TILES | case.tiles
    n_tiles = tiles["cells"] // BLOCK * case.n_kv_heads
    return chunk_work(_padded(case), n_tiles, tiles["queries"] * case.group)


SUBJECTS = {
    "ours_decode": Subject("paged_decode", our_decode, our_decode_work),
    "ours_chunk": Subject("paged_chunk", our_chunk, our_chunk_work),
    "jax_decode": Subject("ragged_paged_attention_kernel", jax_program, jax_decode_work),
    "jax_chunk": Subject("ragged_paged_attention_kernel", jax_program, jax_chunk_work),
    "rpa3_decode": Subject("RPAd", rpa3_program, rpa3_decode_work),
    "rpa3_chunk": Subject("RPAm", rpa3_program, rpa3_chunk_work),
}
DEFAULT_KERNELS = "ours_decode,jax_decode,ours_chunk,jax_chunk"
DEFAULT_TILES = {"jax_decode": {"pages": 4, "queries": 8}}
