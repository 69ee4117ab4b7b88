"""How the TPU programs cut their work: sizes for a chip and for arrays, by their memory.

Chosen with `python -m benchmarks.tpu_schedule --tune`, which reads the compiler's schedules.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu


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


def tiles_for(n_tokens: int, n_heads: int, cache, *, interpret: bool) -> Tiles:
    """Sizes for this chip; interpreted on CPU, those of a v5e.

    Args:
        cache: one layer's, "B K 2 H C".
    """
    vmem, n_cores = 128 << 20, 1
    if not interpret:
        info = pltpu.get_tpu_info()
        vmem, n_cores = info.vmem_capacity_bytes, info.num_cores
    block = cache.size // cache.shape[0] * jnp.dtype(cache.dtype).itemsize
    # Six independent blocks hide a head's latency; a few buffers of them may fill half the memory.
    n_heads_kv = cache.shape[1]
    streams = max(1, min(4, 8 // n_heads_kv))
    room = vmem // 8 // 3 // block
    decode_blocks = max(1, min(4, room // streams))
    chunk_blocks = max(1, min(4, room))
    queries = (
        256 if n_tokens > 128 and n_heads * cache.shape[3] <= 8192 and vmem > 32 << 20 else 128
    )
    return Tiles(
        decode_blocks=decode_blocks,
        decode_streams=streams,
        chunk_queries=queries,
        chunk_blocks=chunk_blocks,
        n_cores=n_cores,
        vmem_bytes=vmem * 3 // 4,
    )
