"""The CPU attention backend against the oracle, and what its compiled form may cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels
from pallas_kernels import AttentionSpec, RaggedMeta

reference = jax.jit(pallas_kernels.select("reference"), static_argnames="spec")
xla = jax.jit(pallas_kernels.select("xla"), static_argnames="spec", donate_argnames="kv_cache")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static sizes of a test batch."""

    n_heads: int = 4
    n_kv_heads: int = 2
    head_size: int = 64
    n_tokens: int = 48
    n_rows: int = 8
    n_cells: int = 16
    blocks_per_row: int = 20
    dtype: str = "float32"


def make_batch(shape: Shape, singles, chunks, seed=0, unused=np.nan):
    """Arguments of an attention call. singles: context lengths; chunks: (context, new tokens).

    The pool is full of `unused`, except for the cells that the sequences have cached.
    """
    rng = np.random.default_rng(seed)
    n_blocks = shape.n_rows * shape.blocks_per_row + 1
    heads = shape.n_kv_heads, shape.head_size
    contexts = [(n, 1) for n in singles] + list(chunks)
    assert len(contexts) <= shape.n_rows
    pool = np.full((n_blocks, heads[0], 2, shape.n_cells, heads[1]), unused, np.float32)
    tables = np.zeros((shape.n_rows, shape.blocks_per_row), np.int32)
    seq_lens = np.zeros(shape.n_rows, np.int32)
    cu_q_lens = np.zeros(shape.n_rows + 1, np.int32)
    positions = np.zeros(shape.n_tokens, np.int32)
    slots = np.zeros(shape.n_tokens, np.int32)
    free = list(rng.permutation(np.arange(1, n_blocks)))
    n_used = 0
    for s, (seq_len, n_new) in enumerate(contexts):
        n_own = -(-seq_len // shape.n_cells)
        tables[s, :n_own] = [free.pop() for _ in range(n_own)]
        position = np.arange(seq_len)
        block, cell = tables[s, position // shape.n_cells], position % shape.n_cells
        n_cached = seq_len - n_new
        cached = rng.standard_normal((n_cached, heads[0], 2, heads[1]))
        pool[block[:n_cached], :, :, cell[:n_cached]] = cached
        new = slice(n_used, n_used + n_new)
        positions[new] = position[n_cached:]
        slots[new] = (block * shape.n_cells + cell)[n_cached:]
        seq_lens[s] = seq_len
        n_used += n_new
        cu_q_lens[s + 1] = n_used
    cu_q_lens[len(contexts) + 1 :] = n_used
    assert n_used <= shape.n_tokens
    meta = RaggedMeta(
        positions=jnp.asarray(positions),
        slots=jnp.asarray(slots),
        block_tables=jnp.asarray(tables),
        seq_lens=jnp.asarray(seq_lens),
        cu_q_lens=jnp.asarray(cu_q_lens),
        n_seqs=jnp.asarray(len(contexts), jnp.int32),
        n_single=jnp.asarray(len(singles), jnp.int32),
    )
    q = rng.standard_normal((shape.n_tokens, shape.n_heads, shape.head_size))
    k, v = rng.standard_normal((2, shape.n_tokens, *heads))
    return [jnp.asarray(x, shape.dtype) for x in (q, k, v, pool)] + [meta]


MIXED = dict(singles=[1, 16, 17, 299], chunks=[(20, 20), (133, 11)])
SPEC = AttentionSpec(scale=0.125)


def check(batch, spec=SPEC, tolerance=2e-5, **arrays):
    """xla gives what the oracle gives; returns its output."""
    expected, expected_cache = reference(*batch, spec=spec, **arrays)
    n_used = int(batch[4].cu_q_lens[-1])
    out, cache = xla(*batch, spec=spec, **arrays)
    out, expected = np.asarray(out, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(out, expected, atol=tolerance, rtol=tolerance)
    np.testing.assert_array_equal(np.asarray(cache[1:]), np.asarray(expected_cache[1:]))
    assert not out[n_used:].any()
    return out


@pytest.mark.parametrize("head_size", [64, 80, 128])
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_matches_the_oracle_for_every_head_layout(head_size, n_heads, n_kv_heads):
    shape = Shape(n_heads=n_heads, n_kv_heads=n_kv_heads, head_size=head_size)
    check(make_batch(shape, **MIXED))


@pytest.mark.parametrize("n_cells", [1, 8, 16, 32, 64, 128, 256])
def test_matches_the_oracle_for_every_block_size(n_cells):
    shape = Shape(n_cells=n_cells, blocks_per_row=-(-304 // n_cells))
    check(make_batch(shape, **MIXED))


@pytest.mark.parametrize("window", [1, 5, 64, 150, 10_000])
def test_matches_the_oracle_within_a_window(window):
    check(make_batch(Shape(), **MIXED), AttentionSpec(scale=0.125, window=window))


def test_matches_the_oracle_with_a_soft_cap():
    check(make_batch(Shape(), **MIXED), AttentionSpec(scale=0.5, soft_cap=2.0))


def test_matches_the_oracle_with_alibi_slopes():
    check(make_batch(Shape(), **MIXED), alibi_slopes=jnp.array([0.5, 0.25, 0.125, 0.0625]))


def test_matches_the_oracle_with_sinks():
    check(make_batch(Shape(), **MIXED), sinks=jnp.array([-1.0, 0.0, 3.0, 50.0]))


def test_matches_the_oracle_with_everything_at_once():
    check(
        make_batch(Shape(), **MIXED),
        AttentionSpec(scale=0.3, window=33, soft_cap=3.0),
        alibi_slopes=jnp.array([0.5, 0.25, 0.125, 0.0625]),
        sinks=jnp.array([-1.0, 0.0, 1.0, 2.0]),
    )


def test_bfloat16_cache_matches_the_oracle():
    out = check(make_batch(Shape(dtype="bfloat16"), **MIXED), tolerance=2e-2)
    assert out.any()
