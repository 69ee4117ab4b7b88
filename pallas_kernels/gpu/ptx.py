"""Elementwise operations that the GPU has and jax has no name for, as PTX.

Each has a plain twin of the same bits, which interpretation runs. Operations on 16 bits are on two
elements of a register at once, which Triton makes of no expression of jax's.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float16, Float32, Int16, Num

from pallas_kernels.contract import QUANTIZED

# Cells of two words, $1, as float16, $0: those in the words' low bytes and those in the high ones.
UNPACK = {
    jnp.dtype(jnp.float8_e4m3fn): (
        """{ .reg .b32 sign;
             shl.b32 $0, $1, 7; and.b32 $0, $0, 0x3f803f80;
             shl.b32 sign, $1, 8; and.b32 sign, sign, 0x80008000; or.b32 $0, $0, sign; }""",
        """{ .reg .b32 sign;
             shr.u32 $0, $1, 1; and.b32 $0, $0, 0x3f803f80;
             and.b32 sign, $1, 0x80008000; or.b32 $0, $0, sign; }""",
    ),
    jnp.dtype(jnp.int8): (
        """{ .reg .b32 nine; mov.b32 nine, 0xc880c880;
             and.b32 $0, $1, 0x00ff00ff; xor.b32 $0, $0, 0x48804880; add.f16x2 $0, $0, nine; }""",
        """{ .reg .b32 nine; mov.b32 nine, 0xc880c880;
             shr.u32 $0, $1, 8; and.b32 $0, $0, 0x00ff00ff;
             xor.b32 $0, $0, 0x48804880; add.f16x2 $0, $0, nine; }""",
    ),
}


def as_words(kv_cache: Num[Array, "*dims H"]) -> Num[Array, "*dims _"]:
    """A quantised cache's bytes as words of two cells, others as they are; moves nothing."""
    if kv_cache.dtype not in QUANTIZED:
        return kv_cache
    pairs = kv_cache.reshape(*kv_cache.shape[:-1], -1, 2)
    return lax.bitcast_convert_type(pairs, jnp.int16)


def unpack(
    words: Int16[Array, "M W"], cache_dtype, *, interpret: bool
) -> tuple[Float16[Array, "M W"], Float16[Array, "M W"]]:
    """Cells of a quantised cache, two to a word: the low bytes and the high ones, each cell divided
    by its dtype's FACTORS. It is most of what a decode kernel of such a cache does.

    - float8_e4m3fn: exponent and mantissa, moved to the places of float16's, are the same number
      but for the exponents' biases.
    - int8 x: in float16 the numbers from 8 to 16 are 1 / 128 apart, so that the bits of x + 128 as
      the mantissa are 9 + x / 128.
    """
    if interpret:
        plain = _int8 if cache_dtype == jnp.int8 else _float8
        return plain(words << 8), plain(words)
    shape = jax.ShapeDtypeStruct(words.shape, jnp.float16)
    low, high = (
        pltriton.elementwise_inline_asm(
            code, args=[words], constraints="=&r,r", pack=2, result_shape_dtypes=[shape]
        )[0]
        for code in UNPACK[cache_dtype]
    )
    return low, high


def exp2(
    x: Float32[Array, "*dims"],
    scale: Float32[Array, "*dims"],
    shift: Float32[Array, "*dims"],
    *,
    interpret: bool,
) -> Float32[Array, "*dims"]:
    """2 ** (x * scale + shift) in two operations; zero where that is no normal number, which three
    more see to in jax's own.
    """
    if interpret:
        return jnp.exp2(x * scale + shift)
    (out,) = pltriton.elementwise_inline_asm(
        "{ .reg .f32 y; fma.rn.f32 y, $1, $2, $3; ex2.approx.ftz.f32 $0, y; }",
        args=[jnp.broadcast_to(array, x.shape) for array in (x, scale, shift)],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return out


def _float8(words: Int16[Array, "M W"]) -> Float16[Array, "M W"]:
    """Of the high bytes: bit 14, after the shift one more sign, is cleared."""
    return lax.bitcast_convert_type((words >> 1) & -0x4080, jnp.float16)


def _int8(words: Int16[Array, "M W"]) -> Float16[Array, "M W"]:
    bits = ((words >> 8) & 0xFF) ^ 0x4880
    return lax.bitcast_convert_type(bits, jnp.float16) - jnp.float16(9)
