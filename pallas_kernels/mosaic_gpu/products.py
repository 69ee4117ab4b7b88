"""The two products of a tile on Hopper's matrix unit, wgmma.

Each has a part that only the simulator runs. It checks plain reads for races, but not wgmma's; and
it has no wgmma with an operand in registers.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

ACC = plgpu.WGMMAAccumulatorRef


def scores(q, k, meanwhile: Callable[[], None], *, interpret: bool) -> Float[Array, "M N"]:
    """q @ k.T of refs "M H" and "N H" in shared memory; `meanwhile` runs while it is made."""

    def product(acc):
        plgpu.wgmma(acc, q, k.T)
        if interpret:
            _read(q)
            _read(k)
        meanwhile()
        return acc[...]

    return pl.run_scoped(product, ACC((q.shape[0], k.shape[0]), jnp.float32))


def add_values(
    acc: Float[Array, "M H"], weights: Float[Array, "M N"], v, *, interpret: bool
) -> Float[Array, "M H"]:
    """acc + weights @ v, v a ref "N H" in shared memory."""
    if interpret:
        return acc + jnp.dot(weights, _read(v), preferred_element_type=jnp.float32)
    begun: Any = ACC.init(acc)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, weights, v))(begun)


def _read(ref) -> Array:
    """As wgmma reads: what is copied there later comes after it without a fence."""
    value = ref[...]
    plgpu.commit_smem()
    return value
