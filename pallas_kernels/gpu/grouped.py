"""Products of groups of rows with a matrix each, as of experts' tokens, in Pallas-Triton.

A program makes one tile of rows of one group times a block of its matrix's rows. Programs of the
same block are neighbours, tile after tile: a matrix that several tiles need is read from memory
once, and where no group has more rows than a tile, as in decoding, all are.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

# Given when a program is lowered, so it cannot be caught around a call.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)


def tiles_product(
    x: Float[Array, "M I"],
    weight: Float[Array, "E O I"],
    rows: Int[Array, "n"],
    groups: Int[Array, "n"],
    n_rows: Int[Array, "n"],
    *,
    tile: int,
    interpret: bool = False,
) -> Float[Array, "M O"]:
    """Row r of x times the transposed matrix of its group, in float32; undefined in no tile.

    Args:
        rows, groups, n_rows: of each tile its first row, its matrix and how many rows it has.
        tile: the most rows of a tile, a power of two, at least 16.
        interpret: runs the kernel on any platform, slowly.

    Raises:
        ValueError: Pallas-Triton cannot address so many weights: it counts elements with 32 signed
            bits up to 2**32 of them, and with 64 only beyond.
    """
    assert tile >= 16, tile
    if 2**31 <= weight.size <= 2**32:
        raise ValueError(
            f"a layer's experts have {weight.size} weights on one device, which kernels cannot "
            "address; use a larger tensor_parallel_size"
        )
    n_out = weight.shape[1]
    block_out = 128 if tile > 64 else 64
    return pl.pallas_call(
        functools.partial(_kernel, tile=tile, block_out=block_out),
        out_shape=jax.ShapeDtypeStruct((len(x), n_out), jnp.float32),
        grid=(len(rows), pl.cdiv(n_out, block_out)),
        compiler_params=pltriton.CompilerParams(num_warps=8 if tile > 64 else 4, num_stages=4),
        interpret=interpret,
        name="grouped_product",
    )(x, weight, rows, groups, n_rows)


def _kernel(x, weight, rows, groups, n_rows, out, *, tile: int, block_out: int):
    i, n_in = pl.program_id(0), x.shape[1]
    block_in = 32 if x.dtype == jnp.float32 else 64
    place = jnp.arange(tile, dtype=jnp.int32)
    column = pl.program_id(1) * block_out + jnp.arange(block_out, dtype=jnp.int32)
    is_row, is_column = place < n_rows[i], column < out.shape[1]

    @pl.when(n_rows[i] > 0)
    def run():
        row, group = rows[i] + place, groups[i]

        def add(k, acc):
            inner = k * block_in + jnp.arange(block_in, dtype=jnp.int32)
            is_inner = (inner < n_in)[None]
            a = _load(x.at[row[:, None], inner[None]], is_row[:, None] & is_inner)
            b = _load(weight.at[group, column[:, None], inner[None]], is_column[:, None] & is_inner)
            exact = lax.Precision.HIGHEST
            return acc + jnp.dot(a, b.T, precision=exact, preferred_element_type=jnp.float32)

        acc = jnp.zeros((tile, block_out), jnp.float32)
        acc = lax.fori_loop(0, pl.cdiv(n_in, block_in), add, acc)
        mask = is_row[:, None] & is_column[None]
        pltriton.store(out.at[row[:, None], column[None]], acc, mask=mask)


def _load(ref, mask):
    return pltriton.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))
