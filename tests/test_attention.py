"""The CPU attention backend against the oracle, and what its compiled form may cost."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

import pallas_kernels
from pallas_kernels import AttentionSpec, RaggedMeta, cache_dtype
from pallas_kernels.contract import encode

reference = jax.jit(pallas_kernels.select("reference"), static_argnames="spec")
xla = jax.jit(pallas_kernels.select("xla"), static_argnames="spec", donate_argnames="kv_cache")

SPEC = AttentionSpec(scale=0.125)
MIXED = {"singles": [1, 16, 17, 299], "chunks": [(20, 20), (133, 11)]}
SLOPES = jnp.array([0.5, 0.25, 0.125, 0.0625])
SINKS = jnp.array([-1.0, 0.0, 3.0, 50.0])


@dataclass(frozen=True)
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

    @property
    def n_blocks(self) -> int:
        return self.n_rows * self.blocks_per_row + 1


def make_meta(shape: Shape, contexts, n_single, rng) -> RaggedMeta:
    """A batch of sequences (cached + new tokens, new tokens), their blocks drawn at random."""
    tables = np.zeros((shape.n_rows, shape.blocks_per_row), np.int32)
    seq_lens = np.zeros(shape.n_rows, np.int32)
    cu_q_lens = np.zeros(shape.n_rows + 1, np.int32)
    positions, slots = np.zeros((2, shape.n_tokens), np.int32)
    free = list(rng.permutation(np.arange(1, shape.n_blocks)))
    start = 0
    for s, (seq_len, n_new) in enumerate(contexts):
        n_own = -(-seq_len // shape.n_cells)
        tables[s, :n_own] = [free.pop() for _ in range(n_own)]
        position = np.arange(seq_len - n_new, seq_len)
        block = tables[s, position // shape.n_cells]
        positions[start : start + n_new] = position
        slots[start : start + n_new] = block * shape.n_cells + position % shape.n_cells
        start += n_new
        seq_lens[s], cu_q_lens[s + 1 :] = seq_len, start
    counts = np.int32(len(contexts)), np.int32(n_single)
    arrays = positions, slots, tables, seq_lens, cu_q_lens, *counts
    return RaggedMeta(*(jnp.asarray(x) for x in arrays))


def make_batch(shape: Shape, singles, chunks, *, seed=0, unused=np.nan):
    """Arguments of an attention call; every cell that no sequence has cached holds `unused`.

    singles: context lengths, the new token included; chunks: (context length, new tokens).
    """
    rng = np.random.default_rng(seed)
    contexts = [(n, 1) for n in singles] + list(chunks)
    meta = make_meta(shape, contexts, len(singles), rng)
    heads = shape.n_kv_heads, shape.head_size
    pool = np.full((shape.n_blocks, heads[0], 2, shape.n_cells, heads[1]), unused, np.float32)
    for s, (seq_len, n_new) in enumerate(contexts):
        position = np.arange(seq_len - n_new)
        block = np.asarray(meta.block_tables)[s, position // shape.n_cells]
        cached = rng.standard_normal((len(position), heads[0], 2, heads[1]))
        pool[block, :, :, position % shape.n_cells] = cached
    q = rng.standard_normal((shape.n_tokens, shape.n_heads, shape.head_size))
    k, v = rng.standard_normal((2, shape.n_tokens, *heads))
    pool = encode(jnp.asarray(pool), jnp.dtype(cache_dtype(shape.dtype, "cpu")))
    return *(jnp.asarray(x, shape.dtype) for x in (q, k, v)), pool, meta


def assert_matches_the_oracle(batch, spec=SPEC, *, tolerance=2e-5, **arrays) -> np.ndarray:
    """xla's output, after checking it and the cache (except the scratch block)."""
    expected, expected_cache = reference(*batch, spec=spec, **arrays)
    out, cache = xla(*batch, spec=spec, **arrays)
    out, expected = np.asarray(out, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(out, expected, atol=tolerance, rtol=tolerance)
    np.testing.assert_array_equal(np.asarray(cache[1:]), np.asarray(expected_cache[1:]))
    assert not out[int(batch[4].cu_q_lens[-1]) :].any()
    return out


@pytest.mark.parametrize("head_size", [64, 80, 128])
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (6, 2), (4, 1), (17, 1)])
def test_every_head_layout_matches_the_oracle(head_size, n_heads, n_kv_heads):
    shape = Shape(n_heads=n_heads, n_kv_heads=n_kv_heads, head_size=head_size)
    assert_matches_the_oracle(make_batch(shape, **MIXED))


@pytest.mark.parametrize("n_cells", [1, 8, 32, 64, 256])
def test_every_block_size_matches_the_oracle(n_cells):
    shape = Shape(n_cells=n_cells, blocks_per_row=-(-304 // n_cells))
    assert_matches_the_oracle(make_batch(shape, **MIXED))


@pytest.mark.parametrize("window", [1, 5, 64, 150, 10_000])
def test_window_matches_the_oracle(window):
    assert_matches_the_oracle(make_batch(Shape(), **MIXED), AttentionSpec(0.125, window=window))


def test_soft_cap_matches_the_oracle():
    assert_matches_the_oracle(make_batch(Shape(), **MIXED), AttentionSpec(0.5, soft_cap=2.0))


def test_alibi_matches_the_oracle():
    assert_matches_the_oracle(make_batch(Shape(), **MIXED), alibi_slopes=SLOPES)


def test_sinks_match_the_oracle():
    assert_matches_the_oracle(make_batch(Shape(), **MIXED), sinks=SINKS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_everything_at_once_matches_the_oracle(dtype):
    assert_matches_the_oracle(
        make_batch(Shape(dtype=dtype), **MIXED),
        AttentionSpec(scale=0.3, window=33, soft_cap=3.0),
        alibi_slopes=SLOPES,
        sinks=SINKS,
        tolerance=2e-5 if dtype == "float32" else 3e-2,
    )


def test_many_tiles_of_queries_and_keys_match_the_oracle():
    shape = Shape(n_tokens=700, blocks_per_row=70)
    assert_matches_the_oracle(make_batch(shape, [1000, 3], [(1100, 600), (90, 90)]))


def test_fewer_tokens_than_rows_and_fewer_rows_than_tokens_work():
    assert_matches_the_oracle(make_batch(Shape(n_tokens=2), [40, 7], []))
    assert_matches_the_oracle(make_batch(Shape(n_tokens=1), [], [(5, 1)]))
    assert_matches_the_oracle(make_batch(Shape(n_rows=1), [], [(48, 48)]))


def test_empty_batch_gives_zeros_and_changes_no_owned_block():
    batch = make_batch(Shape(), [], [], unused=1.5)
    out, cache = xla(*batch, spec=SPEC)
    assert not np.asarray(out).any()
    assert (np.asarray(cache[1:]) == 1.5).all()


def test_sequence_without_new_tokens_is_skipped():
    batch = make_batch(Shape(), [30], [(40, 0), (9, 4)])
    assert assert_matches_the_oracle(batch)[:5].any()


def test_what_unused_cells_hold_changes_nothing():
    results = [
        xla(*make_batch(Shape(dtype=dtype), **MIXED, unused=unused), spec=SPEC)[0]
        for dtype in ("float32", "bfloat16")
        for unused in (np.nan, np.inf, 0.0)
    ]
    for nan, inf, zero in (results[:3], results[3:]):
        np.testing.assert_array_equal(nan, zero)
        np.testing.assert_array_equal(inf, zero)


def test_poisoned_sequence_leaves_the_others_alone():
    q, *rest = make_batch(Shape(), **MIXED, unused=0.0)
    healthy, _ = reference(q, *rest, spec=SPEC)
    out, _ = xla(q.at[1].set(np.nan).at[4 + 7].set(np.nan), *rest, spec=SPEC)
    others = [t for t in range(35) if t not in (1, 4 + 7)]
    np.testing.assert_allclose(out[np.array(others)], healthy[np.array(others)], atol=2e-5)


def test_new_tokens_are_written_to_their_cells_and_nothing_else_changes():
    shape = Shape(dtype="bfloat16")
    q, k, v, before, meta = make_batch(shape, **MIXED, unused=7.0)
    before = np.asarray(before)
    _, cache = xla(q, k, v, jnp.array(before), meta, spec=SPEC)
    cache, bits = np.array(cache), functools.partial(encode, dtype=jnp.uint16)
    slots = np.asarray(meta.slots)[:35]
    written = slots // shape.n_cells, slice(None), slice(None), slots % shape.n_cells
    np.testing.assert_array_equal(cache[written][:, :, 0], bits(k[:35]))
    np.testing.assert_array_equal(cache[written][:, :, 1], bits(v[:35]))
    cache[written] = before[written]
    np.testing.assert_array_equal(cache[1:], before[1:])


LENGTHS = st.integers(1, 320)
CHUNKS = st.tuples(LENGTHS, st.integers(1, 24)).map(lambda c: (max(c), c[1]))
FEATURES = st.fixed_dictionaries(
    {},
    optional={"alibi_slopes": st.just(SLOPES), "sinks": st.just(SINKS)},
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    singles=st.lists(LENGTHS, max_size=5),
    chunks=st.lists(CHUNKS, max_size=3),
    window=st.sampled_from([None, 40]),
    features=FEATURES,
    seed=st.integers(0, 2**16),
)
def test_random_ragged_batches_match_the_oracle(singles, chunks, window, features, seed):
    batch = make_batch(Shape(n_tokens=80), singles, chunks, seed=seed)
    assert_matches_the_oracle(batch, AttentionSpec(0.125, window=window), **features)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_call_updates_the_cache_in_place(dtype):
    shape = Shape(n_rows=64, n_cells=64, blocks_per_row=64, dtype=dtype)
    batch = make_batch(shape, **MIXED)
    memory = xla.lower(*batch, spec=SPEC).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= batch[3].nbytes
    assert memory.temp_size_in_bytes < 0.1 * batch[3].nbytes


def largest_intermediate(shape: Shape) -> int:
    """Elements of the largest array that a call makes, besides the cache itself."""
    batch = make_batch(shape, **MIXED)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.size for v in equation.outvars)
            for sub in jaxprs_in_params(equation.params):
                yield from sizes(sub)

    jaxpr = jax.make_jaxpr(functools.partial(pallas_kernels.select("xla"), spec=SPEC))(*batch)
    return max(n for n in sizes(jaxpr.jaxpr) if n != batch[3].size)


def test_no_intermediate_grows_with_the_longest_possible_context():
    small, large = Shape(blocks_per_row=20), Shape(blocks_per_row=2000)
    assert largest_intermediate(large) == largest_intermediate(small)


def test_unknown_backend_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'cuda'.*reference, xla"):
        pallas_kernels.select("cuda")


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu", "jax_triton", "mosaic_gpu"])
def test_backend_that_is_not_there_yet_is_refused(name):
    with pytest.raises(NotImplementedError, match=f"'{name}' is not there yet.*reference, xla"):
        pallas_kernels.select(name)


def test_shapes_that_do_not_fit_are_refused():
    q, k, v, cache, meta = make_batch(Shape(), **MIXED)
    with pytest.raises(ValueError, match="do not fit q"):
        xla(q, k[:, :1], v, cache, meta, spec=SPEC)
    with pytest.raises(ValueError, match="does not fit T=48, S=8"):
        xla(q, k, v, cache, meta._replace(seq_lens=meta.seq_lens[1:]), spec=SPEC)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        AttentionSpec(0.125, window=0)
