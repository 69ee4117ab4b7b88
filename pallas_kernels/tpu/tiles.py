"""How the TPU programs cut their work: sizes for a chip and for arrays, bounded by its memory.

`tile_table` holds what `python -m benchmarks.tpu.schedule --tune` chose by the compiler's
schedules, for 8 KV heads; chips that it lacks have DEFAULT.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.tile_table import TILES

Sizes = tuple[int, int, int]  # head size, query heads per KV head, bytes of a cell's element
Entry = tuple[int, int, int, int]  # the first four of Tiles

DEFAULT: dict[Sizes, Entry] = {(128, 4, 2): (4, 1, 256, 4)}
MAX_UNROLLED = 64  # blocks times KV heads of one stream; beyond, four blocks at least


@dataclass(frozen=True)
class Tiles:
    """Sizes of what one iteration works on."""

    decode_blocks: int = 4  # blocks of one sequence's context
    decode_streams: int = 1  # sequences side by side
    chunk_queries: int = 256  # tokens of a tile of queries: lanes
    chunk_blocks: int = 4  # blocks of its context
    n_buffers: int = 3  # tiles of context in flight
    n_cores: int = 1
    vmem_bytes: int = 64 << 20


def nearest(table: dict[Sizes, Entry], sizes: Sizes) -> Entry:
    """The entry whose sizes are the fewest doublings away."""

    def distance(known: Sizes) -> float:
        return sum(abs(math.log2(a / b)) for a, b in zip(known, sizes, strict=True))

    return table[min(table, key=distance)]


def tiles_for(n_tokens: int, n_heads: int, cache, *, interpret: bool) -> Tiles:
    """Sizes for this chip; interpreted on CPU, the default ones.

    Args:
        cache: one layer's, "B K 2 H C".
    """
    vmem, n_cores, table = 128 << 20, 1, DEFAULT
    if not interpret:
        info = pltpu.get_tpu_info()
        vmem, n_cores = info.vmem_capacity_bytes, info.num_cores
        table = TILES.get(str(info.chip_version), DEFAULT)
    _, n_kv_heads, _, head_size, _ = cache.shape
    itemsize = jnp.dtype(cache.dtype).itemsize
    sizes = head_size, n_heads // n_kv_heads, itemsize
    decode_blocks, streams, queries, chunk_blocks = nearest(table, sizes)
    # Few KV heads hide neither a head's latency nor an iteration's overhead: more blocks do.
    n_fewer = max(1, 8 // n_kv_heads)
    streams, decode_blocks = min(4, streams * n_fewer), min(8, decode_blocks * n_fewer)
    # Three buffers of context may fill a quarter of the memory; of chunks, which need more, half.
    room = vmem // 4 // 3 // (cache.size // cache.shape[0] * itemsize)
    decode_blocks = min(decode_blocks, room // streams, max(4, MAX_UNROLLED // n_kv_heads))
    is_wide = n_tokens > 128 and n_heads * head_size <= 8192 and vmem > 32 << 20
    return Tiles(
        decode_blocks=max(1, decode_blocks),
        decode_streams=streams,
        chunk_queries=queries if is_wide else 128,
        chunk_blocks=max(1, min(chunk_blocks, room // 2)),
        n_cores=n_cores,
        vmem_bytes=vmem * 3 // 4,
    )
