"""Gumbel noise for the draws: jax.random's numbers, bit for bit, in one pass.

On CPU each few rounds of jax's own generator are a pass over memory: 3 to 5 times as long.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
PARITY = 0x1BD11BDA
MANTISSA = 23  # bits of a float32


def gumbel(
    seeds: Int[Array, "S"], positions: Int[Array, "S"], n_columns: int
) -> Float[Array, "S V"]:
    """jax.random.gumbel(fold_in(key(seed), position), V) of each row, in float32."""

    def fold(seed, position):
        key = jax.random.key(seed.astype(jnp.uint32), impl="threefry2x32")
        return jax.random.key_data(jax.random.fold_in(key, position))

    keys = jax.vmap(fold)(seeds, positions)
    columns = lax.broadcasted_iota(jnp.uint32, (len(seeds), n_columns), 1)
    bits = threefry_2x32(keys, columns)
    one = jnp.float32(1.0)
    exponent = lax.bitcast_convert_type(one, jnp.uint32)
    fractions = lax.bitcast_convert_type((bits >> (32 - MANTISSA)) | exponent, jnp.float32) - one
    tiny = jnp.finfo(jnp.float32).tiny  # of what log takes, the least
    return -jnp.log(-jnp.log(jnp.maximum(tiny, fractions * (one - tiny) + tiny)))


def threefry_2x32(keys: UInt32[Array, "S 2"], counts: UInt32[Array, "S V"]) -> UInt32[Array, "S V"]:
    """The words of blocks 0, count, one xor the other, after 20 rounds: Salmon et al., "Parallel
    random numbers: as easy as 1, 2, 3" (2011).
    """
    key, other = keys[:, :1], keys[:, 1:]
    schedule = key, other, key ^ other ^ jnp.uint32(PARITY)
    a, b = jnp.broadcast_to(key, counts.shape), counts + other
    for i in range(5):
        for distance in ROTATIONS[i % 2]:
            a += b
            b = a ^ (b << distance | b >> (32 - distance))
        a += schedule[(i + 1) % 3]
        b += schedule[(i + 2) % 3] + jnp.uint32(i + 1)
    return a ^ b
