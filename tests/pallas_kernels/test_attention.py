"""Every implementation of the attention contract against the float64 oracle; the CPU's costs."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

import pallas_kernels
from pallas_kernels import AttentionSpec, cache_dtype, quantize
from pallas_kernels.contract import QUANTIZED, decode
from pallas_kernels.cpu.build import library
from tests.pallas_kernels.attention_cases import (
    CASES,
    FEATURES,
    FEW_CASES,
    HAS_SIMULATOR,
    MODULES,
    Batch,
    Case,
    check,
    load,
    make_batch,
    run,
)

# For this machine; the others are interpreted, which is slow.
COMPILED = ("reference", "xla", "invariant", "cpu")
INTERPRETED = tuple(name for name in MODULES if name not in COMPILED)
PLAIN = Case(n_tokens=80)
IS_BUILT = pytest.mark.skipif(
    not library().exists(), reason="pallas_kernels.cpu is not built: `make setup`, with a compiler"
)

IS_SIMULATED = pytest.mark.skipif(
    not HAS_SIMULATOR, reason="jax 0.10 has no simulator of Mosaic GPU kernels; jax 0.11 has"
)
# The simulator multiplies in numpy, which warns of scores of unused cells before they are masked.
HAS_INF = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
MARKS = {"cpu": [IS_BUILT], "mosaic_gpu": [IS_SIMULATED, pytest.mark.newer_jax, HAS_INF]}


def marked(name: str, *arguments, marks: tuple = ()):
    """Parameters of a test of that implementation."""
    return pytest.param(name, *arguments, marks=[*marks, *MARKS.get(name, [])])


EVERY, EVERY_INTERPRETED, ON_CPU, EVERY_COMPILED = (
    [marked(name) for name in names] for names in (MODULES, INTERPRETED, ("xla", "cpu"), COMPILED)
)


def is_sampled(name: str, case: Case) -> bool:
    """Interpreted kernels are slow: by default they run few cases."""
    return name in ("xla", "cpu") or case in FEW_CASES


EVERY_CASE = [
    marked(name, case, marks=() if is_sampled(name, case) else (pytest.mark.exhaustive,))
    for name in MODULES
    for case in (FEW_CASES if name == "mosaic_gpu" else CASES)
]


def assert_matches_the_oracle(name: str, case: Case, batch: Batch) -> np.ndarray:
    """The implementation's output, after checking all that it returns."""
    result = load(name)(case, batch)
    check(case, batch, result)
    return result.out


def plain(name: str) -> Case:
    return load(name).fit(PLAIN)


@pytest.mark.parametrize(("name", "case"), EVERY_CASE, ids=str)
def test_every_pair_of_features_matches_the_oracle(name, case):
    run(name, case)


def test_cases_hold_every_pair_of_features():
    for a, b in itertools.combinations(FEATURES, 2):
        wanted = set(itertools.product(FEATURES[a], FEATURES[b]))
        assert wanted == {(getattr(case, a), getattr(case, b)) for case in CASES}
    for name, values in FEATURES.items():
        assert set(values) == {getattr(case, name) for case in FEW_CASES}


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("n_cells", [1, 8, 32, 256])
def test_every_block_size_matches_the_oracle_on_cpu(name, n_cells):
    case = Case(n_cells=n_cells)
    contexts = [(1, 1), (16, 1), (17, 1), (299, 1), (20, 20), (133, 11)]
    assert_matches_the_oracle(name, case, make_batch(case, contexts))


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("window", [5, 64, 150, 10_000])
def test_every_window_matches_the_oracle_on_cpu(name, window):
    run(name, Case(window=window))


@pytest.mark.parametrize("name", EVERY)
def test_many_tiles_of_queries_and_keys_match_the_oracle(name):
    tested = load(name, is_cut_small=False)
    case = tested.fit(Case(n_tokens=420, longest=1200, n_cells=64, heads=(2, 1)))
    batch = make_batch(case, [(1000, 1), (3, 1), (1100, 300), (90, 90)])
    check(case, batch, tested(case, batch))


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize(
    ("sizes", "contexts"),
    [
        ({"n_tokens": 2}, [(40, 1), (7, 1)]),
        ({"n_tokens": 1}, [(5, 1)]),
        ({"n_rows": 1}, [(48, 48)]),
    ],
)
def test_fewer_tokens_than_rows_and_fewer_rows_than_tokens_work_on_cpu(name, sizes, contexts):
    case = dataclasses.replace(PLAIN, **sizes)
    assert_matches_the_oracle(name, case, make_batch(case, contexts))


@pytest.mark.parametrize("name", EVERY)
def test_empty_batch_gives_zeros_and_changes_no_owned_block(name):
    batch = make_batch(plain(name), [], unused=1.5)
    assert not assert_matches_the_oracle(name, plain(name), batch).any()


@pytest.mark.parametrize("name", EVERY)
def test_sequence_without_new_tokens_is_skipped(name):
    batch = make_batch(plain(name), [(30, 1), (40, 0), (9, 4), (128, 0)])
    assert assert_matches_the_oracle(name, plain(name), batch)[:5].any()


@pytest.mark.parametrize("name", EVERY)
def test_what_unused_cells_hold_changes_nothing(name):
    case = plain(name)
    nan, inf, zero = (
        load(name)(case, make_batch(case, unused=unused)).out for unused in (np.nan, np.inf, 0.0)
    )
    np.testing.assert_array_equal(nan, zero)
    np.testing.assert_array_equal(inf, zero)


@pytest.mark.parametrize("name", EVERY)
def test_poisoned_sequence_leaves_the_others_alone(name):
    case = plain(name)
    batch = make_batch(case, unused=0.0)
    healthy = load(name)(case, batch).out
    batch.q[[1, 4 + 7]] = np.nan
    out = load(name)(case, batch).out
    others = [t for t in range(35) if t not in (1, 4 + 7)]
    np.testing.assert_allclose(out[others], healthy[others], atol=2e-5)


# A context and how many of its tokens are new; nothing says that only the first owe one token.
LENGTHS = st.integers(1, 320)
CHUNKS = st.tuples(LENGTHS, st.integers(0, 24)).map(lambda c: (max(c), c[1]))
RANDOM_CASES = [
    Case(n_tokens=80, window=40, alibi=True, dtypes=("float32", "int8")),
    PLAIN,
    Case(n_tokens=80, window=40, sinks=True, soft_cap=2.0, dtypes=("bfloat16", "bfloat16")),
]
RAGGED = {
    "singles": st.lists(LENGTHS.map(lambda n: (n, 1)), max_size=5),
    "chunks": st.lists(CHUNKS, max_size=3),
    "seed": st.integers(0, 2**16),
}


@pytest.mark.parametrize("name", EVERY_COMPILED)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(**RAGGED, case=st.sampled_from(RANDOM_CASES))
def test_random_ragged_batches_match_the_oracle(name, singles, chunks, seed, case):
    case = load(name).fit(case)
    assert_matches_the_oracle(name, case, make_batch(case, singles + chunks, seed=seed))


@pytest.mark.parametrize("name", EVERY_INTERPRETED)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(**RAGGED)
def test_random_ragged_batches_match_the_oracle_interpreted(name, singles, chunks, seed):
    case = plain(name)
    assert_matches_the_oracle(name, case, make_batch(case, singles + chunks, seed=seed))


TPU_BATCHES = {
    # More sequences on a stream than tables in flight, each of one to four tiles of its own.
    "many singles": [(n, 1) for n in (1, 128, 129, 256, 300, 5, 127, 384, 500, 512, 257, 77, 1)],
    # Pieces of one token at the borders of tiles; new tokens begin and end within blocks.
    "borders": [(500, 1), (40, 31), (200, 2), (129, 30), (255, 1), (257, 1), (258, 5), (256, 26)],
    "empty sequences": [(30, 0), (128, 0), (300, 0)],
    "nothing": [],
}
# The simulator compiles each core's program anew for each batch: two cores get one batch.
TWO_CORES = {"decode_streams": 2, "decode_blocks": 1, "chunk_blocks": 1, "n_cores": 2}
SCHEDULES = [
    ({"decode_streams": 1, "decode_blocks": 1, "chunk_blocks": 1, "n_buffers": 2}, TPU_BATCHES),
    (TWO_CORES, {"both": TPU_BATCHES["many singles"][:8] + TPU_BATCHES["borders"]}),
]


@pytest.mark.parametrize(("schedule", "batches"), SCHEDULES, ids=["one core", "two cores"])
def test_every_schedule_matches_the_oracle_without_races_on_tpu(schedule, batches):
    case = Case(n_tokens=112, n_rows=16, longest=512, n_cells=128, window=200, sinks=True)
    case = dataclasses.replace(case, dtypes=("float32", "int8"), heads=(2, 1))
    tested = load("pallas_tpu", **schedule)
    for contexts in batches.values():
        batch = make_batch(case, contexts)
        check(case, batch, tested(case, batch))


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_quantised_values_differ_by_half_a_step_at_most(dtype):
    x = np.random.default_rng(0).standard_normal((200, 64), np.float32)
    x[7] = 0.0
    cells, scales = jax.jit(quantize, static_argnums=1)(x, dtype)
    cells = np.asarray(decode(cells), np.float32)
    assert (np.asarray(scales)[7], cells[7].any()) == (1.0, False)
    error = np.abs(cells * np.asarray(scales)[:, None] - x)
    step = np.asarray(scales)[:, None] if dtype == jnp.int8 else np.abs(x) / 8
    assert (error <= 0.5001 * step + 1e-2 * np.asarray(scales)[:, None] * (dtype != jnp.int8)).all()


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_quantised_values_that_are_not_finite_stay_so(dtype, bad):
    x = np.ones((3, 64), np.float32)
    x[1, 5] = bad
    cells, scales = quantize(jnp.asarray(x), dtype)
    read = np.asarray(decode(cells).astype(jnp.float32) * scales[:, None])
    assert np.isfinite(read).all(axis=1).tolist() == [True, False, True]


def xla_arguments(case: Case) -> tuple[tuple, dict]:
    """Of a call of the CPU's backend."""
    q, k, v, cache, scales, meta = make_batch(case)
    cache = cache.view(cache_dtype(cache.dtype.name, "cpu"))
    arguments = jax.tree.map(jnp.asarray, (q, k, v, cache, meta))
    return arguments, {} if scales is None else {"kv_scales": jnp.asarray(scales)}


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
def test_compiled_call_updates_the_cache_in_place(name, dtype):
    case = Case(
        dtypes=("float32" if dtype == "float32" else "bfloat16", dtype),
        n_rows=64,
        n_cells=64,
        longest=64 * 64,
    )
    arguments, scales = xla_arguments(case)
    compiled = load(name).function.lower(*arguments, spec=case.spec, **scales).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    size = arguments[3].nbytes + sum(x.nbytes for x in scales.values())
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < 0.1 * size


def largest_intermediate(case: Case) -> int:
    """Elements of the largest array that a call makes, besides the cache and its scales."""
    arguments, scales = xla_arguments(case)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.size for v in equation.outvars)
            for sub in jaxprs_in_params(equation.params):
                yield from sizes(sub)

    call = functools.partial(pallas_kernels.select("xla"), spec=case.spec)
    jaxpr = jax.make_jaxpr(call)(*arguments, **scales)
    own = {arguments[3].size, *(x.size for x in scales.values())}
    return max(n for n in sizes(jaxpr.jaxpr) if n not in own)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_no_intermediate_grows_with_the_longest_possible_context(dtype):
    small = Case(dtypes=("float32", dtype))
    large = dataclasses.replace(small, longest=20_000)
    assert largest_intermediate(large) == largest_intermediate(small)


def test_unknown_backend_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'cuda'.*reference, xla"):
        pallas_kernels.select("cuda")


def test_shapes_that_do_not_fit_are_refused():
    (q, k, v, cache, meta), _ = xla_arguments(PLAIN)
    xla = functools.partial(pallas_kernels.select("xla"), spec=PLAIN.spec)
    with pytest.raises(ValueError, match="do not fit q"):
        xla(q, k[:, :1], v, cache, meta)
    with pytest.raises(ValueError, match="does not fit T=80, S=8"):
        xla(q, k, v, cache, meta._replace(seq_lens=meta.seq_lens[1:]))
    with pytest.raises(ValueError, match="a cache of float32 with kv_scales=True"):
        xla(q, k, v, cache, meta, kv_scales=jnp.ones(cache.shape[:-1]))
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        AttentionSpec(0.125, window=0)
