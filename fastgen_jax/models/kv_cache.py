"""The KV cache: what a layer's is made of, how large it is, where it lies, and the attention that
reads and writes it.

INVARIANT: nobody else knows that a quantised cache has scales beside its cells. They are one per
token and KV head, made when the token is written (pallas_kernels.quantize): so what a token leaves
in the cache depends on it alone, and nothing has to be calibrated.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Num

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.layout import HeadLayout
from fastgen_jax.models.sharding import cache_sharding
from pallas_kernels import (
    QUANTIZED,
    RaggedMeta,
    RaggedPagedAttention,
    cache_dtype,
    cache_shape,
)

SCALES = jnp.dtype(jnp.float32)


class KVCache(NamedTuple):
    """Of one layer."""

    cells: Num[Array, "B K 2 C H"]
    scales: Float[Array, "B K 2 C"] | None = None  # of quantised cells


@dataclass(frozen=True)
class CacheLayout:
    """What all layers' caches have in common."""

    backend: str  # of attention
    dtype: str  # of cells, as a user knows it
    heads: HeadLayout
    head_size: int
    block_size: int

    @classmethod
    def of(
        cls, model: ModelConfig, *, backend: str, dtype: str, block_size: int, n_shards: int = 1
    ) -> "CacheLayout":
        return cls(backend, dtype, HeadLayout.of(model, n_shards), model.head_dim, block_size)

    @property
    def is_quantized(self) -> bool:
        return jnp.dtype(self.dtype) in QUANTIZED

    @property
    def block_elements(self) -> int:
        """Of the cells of one block on one device."""
        return 2 * self.heads.n_own_kv_slots * self.block_size * self.head_size

    @property
    def block_bytes(self) -> int:
        """Of one block, with its scales, on one device."""
        n_scales = self.block_elements // self.head_size if self.is_quantized else 0
        return self.block_elements * jnp.dtype(self.dtype).itemsize + n_scales * SCALES.itemsize

    def shape(self, n_blocks: int) -> tuple[int, ...]:
        """Of the cells on all devices.

        Raises:
            ValueError: the attention backend does not take it.
        """
        own = cache_shape(
            self.backend,
            n_blocks=n_blocks,
            n_kv_heads=self.heads.n_own_kv_slots,
            block_size=self.block_size,
            head_size=self.head_size,
        )
        return n_blocks, self.heads.n_kv_slots, *own[2:]

    def absent(self, n_blocks: int, mesh: Mesh) -> KVCache:
        """Its arrays as jax.ShapeDtypeStruct, on the devices of the mesh."""
        shape, place = self.shape(n_blocks), cache_sharding(mesh)

        def array(shape: tuple[int, ...], dtype: Any) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

        cells = array(shape, cache_dtype(self.dtype, mesh.devices.flat[0].platform))
        scales = array((*shape[:3], self.block_size), SCALES) if self.is_quantized else None
        return KVCache(cells, scales)


def attend(
    attention: RaggedPagedAttention,
    meta: RaggedMeta,
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    cache: KVCache,
    **options: Any,
) -> tuple[Float[Array, "T N H"], KVCache]:
    """Attention of a ragged batch over a layer's cache, and that cache: see layers.Attend."""
    with jax.named_scope("attention"):
        out, *arrays = attention(q, k, v, cache.cells, meta, kv_scales=cache.scales, **options)
    return out, KVCache(*arrays)
