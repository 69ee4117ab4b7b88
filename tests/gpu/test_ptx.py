"""PTX against its plain twins, without a GPU: its few operations, carried out by numpy."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gpu.layout import FACTORS
from pallas_kernels.gpu.ptx import UNPACK, as_words, unpack

CELLS = np.arange(256, dtype=np.uint8)
# Every pair of bytes, so that every word.
PAIRS = np.stack(np.meshgrid(CELLS, CELLS, indexing="ij"), axis=-1).reshape(-1, 2)


def _add_halves(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.view(np.float16) + b.view(np.float16)).view(np.uint32)


OPERATIONS: dict[str, Callable] = {
    "mov.b32": lambda a: a,
    "shl.b32": np.left_shift,
    "shr.u32": np.right_shift,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "xor.b32": np.bitwise_xor,
    "add.f16x2": _add_halves,
}


def carry_out(code: str, words: np.ndarray) -> np.ndarray:
    """What `code` makes of registers "W" of 32 bits."""
    values = {"$1": words}
    for operation, to, operands in re.findall(r"([a-z]+\.\w+) ([$\w]+), ([^;]+);", code):
        read = [
            np.full_like(words, int(x, 0)) if x[0].isdigit() else values[x]
            for x in operands.split(", ")
        ]
        values[to] = OPERATIONS[operation](*read)
    return values["$0"]


def cells_of(cache_dtype: str) -> jax.Array:
    """All pairs of cells "P 2"."""
    return jax.lax.bitcast_convert_type(jnp.asarray(PAIRS), cache_dtype)


@pytest.mark.parametrize("cache_dtype", ["int8", "float8_e4m3fn"])
def test_all_cells_of_a_quantised_cache_are_unpacked_to_their_values(cache_dtype):
    cells = cells_of(cache_dtype)
    low, high = unpack(as_words(cells), cells.dtype, interpret=True)
    unpacked = np.concatenate([low, high], axis=1).astype(np.float32) * FACTORS[cells.dtype]
    values = np.asarray(cells, np.float32)
    is_number = ~np.isnan(values)
    assert is_number.mean() == (1 if cache_dtype == "int8" else 254 / 256)
    np.testing.assert_array_equal(unpacked[is_number], values[is_number])


@pytest.mark.parametrize("cache_dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("half", [0, 1])
def test_ptx_unpacks_every_word_to_the_same_bits_as_its_plain_twin(cache_dtype, half):
    words = as_words(cells_of(cache_dtype))[:, 0]
    plain = unpack(words[:, None], jnp.dtype(cache_dtype), interpret=True)[half]
    two_in_a_register = np.array(words).view(np.uint32)
    got = carry_out(UNPACK[jnp.dtype(cache_dtype)][half], two_in_a_register)
    np.testing.assert_array_equal(got.view(np.uint16), np.array(plain)[:, 0].view(np.uint16))
