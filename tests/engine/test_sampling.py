"""sample() against a plain loop over rows: parameters, isolation of rows, and the draw itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen_jax.engine.batch import HostTables
from fastgen_jax.engine.pipeline import read_logprobs
from fastgen_jax.engine.sampling import (
    RowParams,
    RowTables,
    adjust,
    adjust_row,
    draw,
    first_best,
    keep_likely,
    likeliest,
    sample,
)
from fastgen_jax.engine.step import StepResult, pack_result
from fastgen_jax.sampling_params import MAX_LOGPROBS, SamplingParams
from tests.engine.sequences import make_sequence

S, V, M = 8, 40, 24  # rows, vocabulary, tokens per row
ENDING = frozenset([3, 5])

sample = jax.jit(sample)
adjust = jax.jit(adjust)
keep_likely = jax.jit(keep_likely)
draw = jax.jit(draw)


def random_logits(seed=0, shape=(S, V), step=0.25):
    """Logits on a grid, so that many are equal."""
    logits = np.random.default_rng(seed).normal(0, 2, shape)
    return (np.round(logits / step) * step).astype(np.float32)


def random_histories(seed=0, n=S):
    """(prompt, output) token ids of each row."""
    rng = np.random.default_rng(seed)
    sizes = [(rng.integers(1, 12), rng.integers(0, 12)) for _ in range(n)]
    return [(rng.integers(0, V, a).tolist(), rng.integers(0, V, b).tolist()) for a, b in sizes]


def arguments(params, histories=None):
    """What sample() takes after the logits, through the host tables as in the engine."""
    histories = histories or [([1], [])] * len(params)
    host = HostTables(len(params), M, 1)
    sequences = []
    for i, (p, (prompt, output)) in enumerate(zip(params, histories, strict=True)):
        ids = np.array(prompt, np.int32)
        seed = i if p.seed is None else p.seed
        n_tokens = len(prompt) + len(output)
        s = make_sequence(n_tokens, prompt_ids=ids, params=p, seed=seed, ending_ids=ENDING)
        s.output_ids = list(output)
        host.enter(s)
        sequences.append(s)
    rows = np.array([s.row for s in sequences], np.int32)
    scratch = np.full((1, M), 7, np.int32)
    known = np.maximum(np.concatenate([host.token_ids, scratch]), 0)
    tables = RowTables(*map(jnp.asarray, (known, host.bias_ids, host.bias, host.banned_ids)))
    n_tokens = jnp.array([s.n_tokens for s in sequences], jnp.int32)
    return RowParams.unpack(jnp.asarray(host.params[rows])), tables, jnp.asarray(rows), n_tokens


def run(logits, params, histories=None):
    """Sampled, as numpy."""
    out = sample(jnp.asarray(logits), *arguments(params, histories))
    return type(out)(*map(np.asarray, out))


def padded(params):
    return params + [SamplingParams(temperature=0.0)] * (S - len(params))


def plain_adjust(logits, p, prompt, output):
    """One row's logits after penalties, bias and bans, in the obvious way."""
    logits = logits.astype(np.float64)
    for token in set(prompt) | set(output):
        is_positive = logits[token] > 0
        logits[token] *= 1 / p.repetition_penalty if is_positive else p.repetition_penalty
    for token in output:
        logits[token] -= p.frequency_penalty
    for token in set(output):
        logits[token] -= p.presence_penalty
    for token, bias in (p.logit_bias or {}).items():
        logits[token] += bias
    if len(output) < p.min_tokens:
        logits[list(ENDING)] = -np.inf
    return logits


def softmax(logits):
    e = np.exp(logits - logits.max())
    return e / e.sum()


def plain_allowed(scaled, p):
    """Which tokens one row may draw, and how near any of them is to the border of a filter."""
    kept = np.ones(len(scaled), bool)
    if p.top_k > 0:
        kept = scaled >= np.sort(scaled)[::-1][min(p.top_k, len(scaled)) - 1]
    probabilities = softmax(np.where(kept, scaled, -np.inf))
    values = np.unique(scaled)[::-1]
    mass = np.array([probabilities[scaled >= v].sum() for v in values])
    distance = np.abs(mass - p.top_p).min() if p.top_p < 1 else 1.0
    last = values[np.argmax(mass >= p.top_p)] if p.top_p < 1 else -np.inf
    floor = p.min_p * probabilities.max()
    kept = kept & (scaled >= last) & (probabilities >= floor)
    return kept, min(distance, np.abs(probabilities - floor).min() if p.min_p else 1.0)


FILTERS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([-1, 0, 1, 2, 7, V - 1, V, 10**6]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 1e-3]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)
PENALTIES = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3]),
    presence_penalty=st.sampled_from([0.0, -1.5, 2.0]),
    frequency_penalty=st.sampled_from([0.0, -0.5, 1.0]),
    logit_bias=st.sampled_from([None, {0: 3.5}, {V - 1: -100.0, 3: 100.0, 7: 0.5}]),
    min_tokens=st.sampled_from([0, 3, 15]),
)


def rows_of(strategy):
    return st.lists(strategy, min_size=S, max_size=S)


@settings(deadline=None)
@given(rows_of(FILTERS), st.integers(0, 1000), st.sampled_from([0.5, 1e-3]))
def test_allowed_tokens_equal_a_plain_loops(params, seed, step):
    logits = random_logits(seed, step=step)
    scaled = logits / np.array([[p.temperature] for p in params], np.float32)
    kept = np.isfinite(keep_likely(jnp.asarray(scaled), arguments(params)[0]))
    for i, p in enumerate(params):
        expected, distance = plain_allowed(scaled[i].astype(np.float64), p)
        if distance > 1e-5:  # nearer than that float32 may decide either way
            assert kept[i].tolist() == expected.tolist(), p


def test_both_zeros_are_equally_likely():
    logits = np.full((S, V), -9.0, np.float32)
    logits[:, 0], logits[:, 1] = 0.0, -0.0
    for params in ({"top_k": 1}, {"top_p": 0.3}):
        kept = keep_likely(jnp.asarray(logits), arguments(padded([SamplingParams(**params)]))[0])
        assert np.isfinite(kept[0, :2]).all()


def test_tokens_as_likely_as_the_last_one_kept_stay():
    logits = np.zeros((S, V), np.float32)
    logits[:, :3] = 2.0
    params = padded([SamplingParams(top_k=1), SamplingParams(top_p=0.05), SamplingParams(min_p=1)])
    kept = np.isfinite(keep_likely(jnp.asarray(logits), arguments(params)[0]))
    assert kept[:3].sum(axis=1).tolist() == [3, 3, 3]


@settings(deadline=None)
@given(rows_of(PENALTIES), st.integers(0, 1000))
def test_penalties_bias_and_bans_equal_a_plain_loop(params, seed):
    logits, histories = random_logits(seed), random_histories(seed)
    adjusted = np.asarray(adjust(jnp.asarray(logits), *arguments(params, histories)))
    for i, p in enumerate(params):
        expected = plain_adjust(logits[i], p, *histories[i])
        np.testing.assert_allclose(adjusted[i], expected, rtol=1e-5, atol=1e-4)


def test_rows_adjusted_one_after_the_other_as_on_a_tpu_are_those_adjusted_at_once():
    logits, histories = jnp.asarray(random_logits()), random_histories()
    params, tables, rows, n_tokens = arguments(MIXED, histories)
    found = jax.lax.map(lambda row: adjust_row(tables, *row), (logits, params, rows, n_tokens))
    expected = adjust(logits, params, tables, rows, n_tokens)
    assert (np.asarray(expected) != np.asarray(logits)).any()
    np.testing.assert_array_equal(found, expected)


def test_greedy_takes_the_best_of_the_adjusted_logits():
    logits, histories = random_logits(step=1e-4), random_histories()
    params = [SamplingParams(temperature=0, logit_bias={i: 9.0}, min_tokens=15) for i in range(S)]
    best = [plain_adjust(logits[i], p, *histories[i]).argmax() for i, p in enumerate(params)]
    assert run(logits, params, histories).token_ids.tolist() == best


@settings(deadline=None, max_examples=30)
@given(rows_of(FILTERS), st.integers(0, 1000))
def test_draw_is_among_the_allowed(params, seed):
    logits = random_logits(seed)
    tokens = run(logits, params).token_ids
    for i, p in enumerate(params):
        scaled = logits[i] / np.float32(p.temperature)
        allowed, distance = plain_allowed(scaled.astype(np.float64), p)
        assert allowed[tokens[i]] or distance < 1e-5


EDGES = [
    {"temperature": 1e-6},
    {"temperature": 1e-30},
    {"temperature": 1e-30, "top_p": 0.9},
    {"temperature": 2e-38},
    {"temperature": 2e-38, "top_p": 0.9, "min_p": 0.1},
    {"temperature": 1e-50},
    {"top_p": 1e-30},
    {"top_p": 1e-50},
    {"top_p": 1e-50, "top_k": 5},
    {"top_k": 1},
    {"min_p": 1.0},
]


@pytest.mark.parametrize("edge", EDGES, ids=str)
def test_extreme_parameters_take_the_best_token(edge):
    logits = 30 * random_logits(step=1e-3)
    params = padded([SamplingParams(**edge)])
    assert run(logits, params).token_ids[0] == logits[0].argmax()


def test_neutral_parameters_keep_every_token():
    logits = random_logits()
    params = padded([SamplingParams(top_k=1)])  # makes the filter run for all rows
    kept = np.isfinite(keep_likely(jnp.asarray(logits), arguments(params)[0]))
    assert kept[1:].all()


def test_banned_tokens_may_be_said_once_the_minimum_is_reached():
    logits = np.zeros((S, V), np.float32)
    logits[:, 3] = 50.0
    params = [SamplingParams(temperature=0, min_tokens=4)] * S
    histories = [([1, 2], [6] * n) for n in range(S)]
    tokens = run(logits, params, histories).token_ids
    assert [t == 3 for t in tokens] == [False] * 4 + [True] * 4


def test_logprobs_are_of_the_raw_logits():
    logits, histories = random_logits(step=1e-3), random_histories()
    params = [
        SamplingParams(temperature=t, logprobs=5, repetition_penalty=1.7, top_k=3, seed=9)
        for t in np.linspace(0, 2, S).tolist()
    ]
    out = run(logits, params, histories)
    expected = np.log([softmax(row.astype(np.float64)) for row in logits])
    best = np.argsort(-expected, kind="stable")[:, :MAX_LOGPROBS]
    chosen = expected[np.arange(S), out.token_ids]
    np.testing.assert_allclose(out.logprobs, chosen, rtol=1e-5, atol=1e-6)
    tops = np.take_along_axis(expected, best, axis=1)
    np.testing.assert_allclose(out.top_logprobs, tops, rtol=1e-5, atol=1e-6)
    assert out.top_ids.tolist() == best.tolist()


def test_logprob_of_the_drawn_token_is_the_one_among_the_top():
    params = [SamplingParams(temperature=1.0, top_k=4, logprobs=20)] * S
    out = run(random_logits(), params)
    for i in range(S):
        assert out.logprobs[i] in out.top_logprobs[i][out.top_ids[i] == out.token_ids[i]]


@pytest.mark.parametrize("step", [0.25, 8.0])  # of a grid: nearly all are equal on the coarse one
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_likeliest_tokens_and_their_order_are_those_of_top_k(step, share):
    logits = random_logits(shape=(S, 1501), step=step) + np.float32(0)  # one zero
    logits[np.random.default_rng(1).random(logits.shape) < share] = -np.inf
    found = likeliest(jnp.array(logits), 20)
    for found_one, expected in zip(found, jax.lax.top_k(logits, 20), strict=True):
        np.testing.assert_array_equal(found_one, expected)


def test_small_vocabulary_leaves_the_rest_of_the_top_empty():
    out = run(random_logits(shape=(S, 6)), [SamplingParams(temperature=0, logprobs=20)] * S)
    assert np.isfinite(out.top_logprobs).sum(axis=1).tolist() == [6] * S


def test_logprobs_of_a_small_vocabulary_are_those_of_its_tokens_alone():
    params = [SamplingParams(temperature=0, logprobs=20)] * S
    out = run(random_logits(shape=(S, 6)), params)
    result = StepResult.unpack(np.asarray(pack_result(out)))
    for i, row in enumerate(out.top_logprobs):
        logprobs = read_logprobs(result, i, params[i])
        assert sorted(dict(logprobs.top)) == list(range(6))
        assert [logprob for _, logprob in logprobs.top] == row[:6].tolist()


MIXED = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0, seed=4),
    SamplingParams(temperature=0.7, top_p=0.8, logprobs=3),
    SamplingParams(temperature=1.3, top_k=5, min_p=0.05),
    SamplingParams(temperature=0.0, repetition_penalty=1.5, logprobs=20),
    SamplingParams(temperature=1.0, presence_penalty=1.0, frequency_penalty=-1.0),
    SamplingParams(temperature=0.5, logit_bias={2: 5.0, 9: -3.0}),
    SamplingParams(temperature=1.0, min_tokens=16, top_k=2),
]


@pytest.mark.parametrize("seed", range(4))
def test_row_among_others_equals_the_row_alone(seed):
    logits, histories = random_logits(seed), random_histories(seed)
    seeded = [dataclasses.replace(p, seed=i) for i, p in enumerate(MIXED)]
    together = run(logits, seeded, histories)
    for i, p in enumerate(seeded):
        alone = run(logits[i : i + 1], [p], histories[i : i + 1])
        assert alone.token_ids[0] == together.token_ids[i], p
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[i], rtol=1e-6)


def test_draw_depends_on_neither_row_nor_batch():
    logits, histories = random_logits(5), random_histories(5)
    params = [dataclasses.replace(p, seed=i) for i, p in enumerate(MIXED)]
    order = np.random.default_rng(1).permutation(S)
    tokens = run(logits, params, histories).token_ids
    moved = run(logits[order], [params[i] for i in order], [histories[i] for i in order])
    assert moved.token_ids.tolist() == tokens[order].tolist()
    half = run(logits[order[:5]], [params[i] for i in order[:5]], [histories[i] for i in order[:5]])
    assert half.token_ids.tolist() == tokens[order[:5]].tolist()


def test_seed_and_position_make_the_draw():
    logits = np.zeros((S, V), np.float32)
    params = [SamplingParams(seed=s) for s in (1, 1, 2, 1, 2**32 - 1, 1, 1, 1)]
    lengths = [3, 3, 3, 4, 3, 3, 3, 3]
    histories = [(list(range(n)), []) for n in lengths]
    tokens = run(logits, params, histories).token_ids
    assert len({tokens[i] for i in (0, 1, 5, 6, 7)}) == 1
    assert len({tokens[i] for i in (0, 2, 3, 4)}) > 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    n, logits = 4096, np.array([1.0, 0.5, 0.0, -0.5, -1.0, -2.0, 0.25, 0.75], np.float32)
    params = jax.tree.map(
        lambda x: jnp.broadcast_to(x[:1], (n,)),
        arguments([SamplingParams(temperature=temperature)])[0],
    )
    params = params._replace(seed=jnp.arange(n, dtype=jnp.int32) * 7919)
    tokens = draw(jnp.broadcast_to(logits, (n, 8)), params, jnp.full(n, 5, jnp.int32))
    expected = n * softmax(logits / temperature)
    chi_square = ((np.bincount(tokens, minlength=8) - expected) ** 2 / expected).sum()
    assert chi_square < 30  # 7 degrees of freedom: less than one in 10,000 seeds


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_non_finite_row_is_reported_and_the_others_do_not_change(poison):
    logits, histories = random_logits(), random_histories()
    params = [dataclasses.replace(p, seed=3) for p in MIXED]
    clean = run(logits, params, histories)
    logits[2, 7] = poison
    out = run(logits, params, histories)
    assert out.is_finite.tolist() == [i != 2 for i in range(S)]
    others = np.arange(S) != 2
    assert out.token_ids[others].tolist() == clean.token_ids[others].tolist()
    assert out.logprobs[others].tolist() == clean.logprobs[others].tolist()


def test_impossible_tokens_are_finite_logits_and_never_drawn():
    logits = random_logits()
    logits[:, ::2] = -np.inf
    params = [SamplingParams(temperature=5.0, top_p=0.99)] * S
    out = run(logits, params)
    assert out.is_finite.all()
    assert (out.token_ids % 2 == 1).all()


def test_parameters_never_recompile(forbid_compile):
    logits = jnp.asarray(random_logits())
    every = [arguments([p] * S, random_histories()) for p in MIXED] + [arguments(MIXED)]
    sample(logits, *every[0])
    with forbid_compile():
        for args in every:
            sample(logits, *args)


@pytest.mark.parametrize("vocab_size", [5, 64, 65, 1000])
def test_first_of_equally_good_tokens_is_best_wherever_runs_end(vocab_size):
    logits = np.random.default_rng(0).integers(0, 9, (40, vocab_size)).astype(np.float32)
    logits[0] = -np.inf
    logits[1, -1] = 100.0
    np.testing.assert_array_equal(
        jax.jit(first_best)(jnp.asarray(logits))[1:], logits.argmax(1)[1:]
    )
    strange = jnp.asarray(logits).at[2, vocab_size // 2].set(jnp.nan)
    assert np.all(np.asarray(jax.jit(first_best)(strange)) < vocab_size)
