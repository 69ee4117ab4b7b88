"""Steps that take as long as they may: what is measured and kept, and the budget of each step."""

import itertools
import json
import logging
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen_jax.engine import budget, startup
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.pace import SMALLEST_CHUNK, Pace
from fastgen_jax.engine.rehearsal import Stage, scenes
from fastgen_jax.engine.runner import FINE_MULTIPLE, buckets
from fastgen_jax.engine.surface import Surface, Work, fit
from fastgen_jax.errors import ConfigError
from tests.engine.sequences import make_sequence
from tests.tiny import assert_idle, make_engine, random_requests, run, tokens

SIZES = (2, 8, 16, 32, 64, 128, 256, 512)
TRUTH = Surface(1e-3, 3e-3, 5e-5, 2e-8, 6e-10, SIZES)
STAGE = Stage(max_seqs=32, max_model_len=1024, block_size=16, n_blocks=400, vocab_size=62)
WORKS = [Work.of(scene) for n in SIZES for scene in scenes(n, STAGE)]


def test_fit_finds_the_surface_that_times_come_from():
    truth, works = Surface(1e-3, 3e-3, 5e-5, 3e-7, 2e-8, SIZES), WORKS * 6
    noise = np.random.default_rng(0).normal(1, 0.02, len(works))
    found = fit(works, [truth(work) * x for work, x in zip(works, noise, strict=True)], SIZES)
    assert found.e + found.a == pytest.approx(truth.e + truth.a, rel=0.05)
    assert found[2:5] == pytest.approx(truth[2:5], rel=0.05)
    assert found.sizes == SIZES
    assert [found(work) for work in WORKS] == pytest.approx(
        [truth(work) for work in WORKS], rel=0.02
    )


def test_fit_meets_the_mean_of_noisy_times():
    works, rng = WORKS * 100, np.random.default_rng(0)
    seconds = [
        TRUTH(work) * x for work, x in zip(works, rng.gamma(4, 1 / 4, len(works)), strict=True)
    ]
    found = fit(works, seconds, SIZES)
    assert sum(map(found, works)) == pytest.approx(sum(seconds), rel=0.05)


@pytest.mark.parametrize("n_tokens", SIZES)
def test_scenes_fill_the_program_and_fit_the_stage(n_tokens):
    found = list(scenes(n_tokens, STAGE))
    assert found
    for scene in found:
        assert sum(q for q, _ in scene) == n_tokens
        assert all(0 < q <= c <= STAGE.max_model_len for q, c in scene)
        assert len(scene) <= STAGE.max_seqs
    assert any(work.n_context > 10 * work.n_tokens for work in map(Work.of, found)) == (
        n_tokens < 128  # of more tokens a context is at most eight times as long
    )


@pytest.mark.parametrize("seconds", [4.1e-3, 7e-3, 9.99e-3, 0.02, 0.1])
def test_most_tokens_that_take_so_long_are_one_less_than_takes_longer(seconds):
    exact = TRUTH._replace(sizes=(1, 512))
    n = exact.tokens_within(seconds)
    plain = TRUTH._replace(sizes=())
    assert plain(Work(n, 0, 0)) <= seconds
    assert n == 512 or plain(Work(n + 1, 0, 0)) > seconds


def test_no_tokens_fit_into_less_than_the_plateau():
    assert TRUTH.tokens_within(3.9e-3) == 0


def test_knee_is_where_more_tokens_are_hardly_more_a_second():
    assert TRUTH.knee() == 256
    assert TRUTH._replace(e=0).knee() == 64  # the plateau ends at 60 tokens


counts = st.tuples(st.integers(1, 1000), st.integers(1, 200), st.booleans())


@given(given_=st.lists(counts, max_size=60), seconds=st.floats(1e-3, 0.05))
def test_step_of_the_budget_takes_no_longer_than_it_may(given_, seconds):
    sequences = []
    for i, (cached, owed, is_running) in enumerate(given_):
        sequences.append(make_sequence(cached + owed, cached, row=i if is_running else -1))
    pace = Pace(TRUTH, seconds)
    n = pace.budget(sequences)
    singles = [s for s in sequences if s.row >= 0 and s.n_tokens - s.n_cached == 1]
    prompts = [s for s in sequences if s.n_tokens - s.n_cached > 1]
    assert n >= len(singles)
    if not prompts or n <= len(singles) + SMALLEST_CHUNK:
        return
    assert n in SIZES

    def seconds_of(size: int) -> float:
        prompt = (size - len(singles), prompts[0].n_cached + size - len(singles))
        return TRUTH(Work.of([*((1, s.n_tokens) for s in singles), prompt]))

    assert seconds_of(n) <= seconds
    larger = [size for size in SIZES if size > n]
    assert not larger or seconds_of(larger[0]) > seconds


@pytest.mark.parametrize("largest", [16, 100, 480, 512, 1056, 2048])
def test_programs_of_paced_steps_are_close_together_where_budgets_are(largest):
    sizes = buckets(2, largest, n_fine=3)
    assert sizes == sorted(set(sizes)) and sizes[-1] == largest
    for small, large in itertools.pairwise(sizes):
        fine = small >= max(largest / 7, 128)  # above the third half
        assert large - small <= small / 4 + FINE_MULTIPLE if fine else large <= 4 * small


def test_budget_shrinks_as_contexts_grow():
    def budget_at(n: int) -> int:
        running = [make_sequence(n, n - 1, row=i) for i in range(32)]
        return Pace(TRUTH, 0.022).budget([*running, make_sequence(900)])

    assert [budget_at(n) for n in (10, 5000, 20000)] == [256, 256, 128]


def test_pace_learns_how_far_off_its_surface_is():
    pace, work = Pace(TRUTH, 0.02), Work.of([(128, 128), (1, 500)])
    for _ in range(100):
        pace = pace.after(work, 1.7 * TRUTH(work))
    assert pace.off == pytest.approx(1.7, rel=0.01)
    sequences = [make_sequence(900)]
    assert pace.budget(sequences) == Pace(TRUTH, 0.02 / pace.off).budget(sequences)


def test_one_step_that_hangs_changes_the_pace_by_little():
    work = Work.of([(128, 128)])
    assert 1 < Pace(TRUTH, 0.02).after(work, 60.0).off < 1.1
    assert 0.9 < Pace(TRUTH, 0.02).after(work, 1e-9).off < 1


def test_engine_learns_from_its_steps(folder, kept_truth):
    """Its own are a fraction of what TRUTH says."""
    engine = make_engine(folder, max_num_batched_tokens="auto", target_itl_ms=9.0)
    run(engine, random_requests(5, 20))
    assert engine._placement._pace.off != 1.0


def test_kept_surface_is_read_back_for_the_same_key_only(tmp_path):
    budget.keep(str(tmp_path), {"chip": "a"}, TRUTH)
    assert budget.kept(str(tmp_path), {"chip": "a"}) == TRUTH
    assert budget.kept(str(tmp_path), {"chip": "b"}) is None
    assert budget.kept(None, {"chip": "a"}) is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"coefficients": [1, 2, 3, 4], "sizes": [2]}',
     '{"coefficients": [1, 2, 3, 4, -5], "sizes": [2]}',
     '{"coefficients": [1, 2, 3, 4, 5], "sizes": []}',
     '{"coefficients": [1, 2, 3, 4, "5"], "sizes": [2]}',
     '{"coefficients": [0, 0, 0, 4, 5], "sizes": [2]}'],
)  # fmt: skip
def test_damaged_file_is_as_none(tmp_path, text):
    budget.keep(str(tmp_path), {}, TRUTH)
    (file,) = tmp_path.rglob("*.json")
    file.write_text(text)
    assert budget.kept(str(tmp_path), {}) is None


def test_directory_that_takes_no_file_is_told_of(tmp_path, caplog):
    (tmp_path / "file").touch()
    budget.keep(f"{tmp_path}/file", {}, TRUTH)
    assert "how long steps take is not kept" in caplog.text


def test_budget_that_no_step_meets_is_the_smallest_and_said(caplog):
    assert budget.choose(TRUTH, 1e-3) == SMALLEST_CHUNK
    assert "no step takes less than 4.0 ms: target_itl_ms=1.0 will be missed" in caplog.text


@pytest.fixture
def kept_truth(monkeypatch):
    """Every machine is as TRUTH says."""
    monkeypatch.setattr(startup, "kept", lambda directory, key: TRUTH)


def test_engine_keeps_to_the_target_and_says_so(folder, kept_truth, caplog):
    caplog.set_level(logging.INFO)
    engine = make_engine(folder, max_num_batched_tokens="auto", target_itl_ms=9.0)
    assert engine.config.max_num_batched_tokens == 160
    assert engine.config.pace == Pace(
        TRUTH._replace(sizes=(2, 8, 16, 32, 64, 112, 128, 144, 160)), 0.009
    )
    assert "max_num_batched_tokens=160: with nothing cached such a step takes 9.0 ms" in caplog.text


def test_engine_without_a_target_takes_the_knee(folder, kept_truth):
    config = make_engine(folder, max_num_batched_tokens="auto").config
    assert (config.max_num_batched_tokens, config.pace) == (256, None)


def test_tokens_are_those_of_a_fixed_budget(folder, engine, kept_truth):
    paced = make_engine(folder, max_num_batched_tokens="auto", target_itl_ms=4.5)
    requests = random_requests(3, 12)
    expected = [tokens(outputs) for outputs in run(engine, requests)]
    assert [tokens(outputs) for outputs in run(paced, requests)] == expected
    assert_idle(paced)


def test_first_start_measures_and_the_next_one_reads(folder, tmp_path, monkeypatch):
    options = {"max_num_batched_tokens": "auto", "compilation_cache": str(tmp_path)}
    with monkeypatch.context() as patch:
        patch.setattr(startup, "most_tokens", lambda mesh: 64)
        measured = make_engine(folder, **options).config
        (file,) = tmp_path.rglob("surfaces/*.json")
        told = json.loads(file.read_text())
        assert told["sizes"] == [2, 8, 16, 32, 64] and sum(told["coefficients"]) > 0
        patch.setattr(startup, "rehearse", None)
        assert make_engine(folder, **options).config == measured


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_itl_ms": 20.0}, "target_itl_ms chooses the token budget of steps; give max_num"),
        ({"target_itl_ms": -1.0, "max_num_batched_tokens": "auto"}, "must be a positive number"),
        ({"max_num_batched_tokens": "automatic"}, "must be a positive integer, got 'automatic'"),
        ({"max_num_batched_tokens": "auto", "deterministic": True}, "of one size only"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        EngineConfig(**options)
