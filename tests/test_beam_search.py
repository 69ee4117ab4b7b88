"""Beam search against searches that forget nothing."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen_jax.beam_search import BeamSearchSequence, search
from fastgen_jax.errors import ConfigError, ContextLengthExceeded, InvalidRequest
from fastgen_jax.llm import LLM
from fastgen_jax.results import Logprob
from fastgen_jax.sampling_params import BeamSearchParams, SamplingParams
from fastgen_jax.tokenizer import Tokenizer
from tests import tiny, tiny_tokenizers

EOS = 2  # of the toy models, whose vocabulary is 0, 1 and 2
PROMPT = [1, 0]
LIKELY_ENDS = [36, 44]  # of the tiny model, which says them often


def toy(seed):
    """A model of three tokens: what it returns depends on all that came before."""

    def continue_(beams):
        return [dict(enumerate(map(likely, toy_logprobs(seed, tokens)))) for tokens in beams]

    return continue_


def toy_logprobs(seed, tokens):
    logits = np.random.default_rng([seed, *tokens]).normal(size=3) * 2
    return (logits - np.log(np.exp(logits).sum())).tolist()


def likely(logprob):
    return Logprob(logprob, None, None)


def all_texts(seed, max_tokens):
    """Every (tokens, logprob) that the toy model can say after PROMPT."""
    for n in range(1, max_tokens + 1):
        for output in itertools.product(range(3), repeat=n):
            if EOS not in output[:-1] and (n == max_tokens or output[-1] == EOS):
                known = [PROMPT + list(output[:i]) for i in range(n)]
                steps = [toy_logprobs(seed, k)[t] for k, t in zip(known, output, strict=True)]
                yield PROMPT + list(output), sum(steps)


@given(st.integers(0, 2**32), st.floats(-2, 2), st.integers(1, 4))
def test_a_beam_wide_enough_finds_the_best_of_all_texts(seed, penalty, max_tokens):
    def score(text):
        tokens, logprob = text
        return logprob / (len(tokens) - (tokens[-1] == EOS)) ** penalty

    params = BeamSearchParams(beam_width=8, max_tokens=max_tokens, length_penalty=penalty)
    [found] = search([PROMPT], params, {EOS}, toy(seed))
    best = sorted(all_texts(seed, max_tokens), key=score, reverse=True)[:8]
    assert [s.tokens for s in found.sequences] == [tokens for tokens, _ in best]
    for sequence, (_, logprob) in zip(found.sequences, best, strict=True):
        assert math.isclose(sequence.cum_logprob, logprob)
        assert sequence.finish_reason == ("stop" if sequence.tokens[-1] == EOS else "length")


@given(st.integers(0, 2**32))
def test_a_beam_of_one_that_ignores_ends_is_greedy(seed):
    params = BeamSearchParams(beam_width=1, max_tokens=5, ignore_eos=True)
    [found] = search([PROMPT], params, {EOS}, toy(seed))
    tokens = list(PROMPT)
    for _ in range(5):
        tokens.append(int(np.argmax(toy_logprobs(seed, tokens))))
    [sequence] = found.sequences
    assert (sequence.tokens, sequence.finish_reason) == (tokens, "length")
    assert [max(step, key=lambda t: step[t].logprob) for step in sequence.logprobs] == tokens[2:]


def test_the_score_counts_prompt_and_output_but_not_the_end():
    ended = BeamSearchSequence([5, 6, 7, EOS], [], -6.0, finish_reason="stop")
    assert (ended.score(1.0), ended.score(2.0), ended.score(0.0)) == (-2.0, -6 / 9, -6.0)
    assert BeamSearchSequence([5, 6, EOS], [], -6.0, finish_reason="length").score(1.0) == -2.0


def test_a_beam_that_the_model_fails_on_ends_alone():
    def fail_after_0(beams):
        return [None if ids[-1] == 0 else toy(1)([ids])[0] for ids in beams]

    params = BeamSearchParams(beam_width=8, max_tokens=3)
    failed, other = search([[1, 0], [0, 1]], params, {EOS}, fail_after_0)
    assert [(s.tokens, s.finish_reason) for s in failed.sequences] == [([1, 0], "error")]
    assert {s.finish_reason for s in other.sequences} == {"stop", "length", "error"}


def test_no_prompts_have_no_outputs():
    assert search([], BeamSearchParams(beam_width=2, max_tokens=3), {EOS}, toy(1)) == []


# --- the engine


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    ends = json.dumps({"eos_token_id": LIKELY_ENDS})
    (directory / "generation_config.json").write_text(ends)
    engine = tiny.make_engine(directory, make=tiny.one_program)
    tokenizer = Tokenizer(tiny_tokenizers.byte_level(directory))
    with LLM.from_engine(engine, tokenizer) as llm:
        yield llm


def naive_search(twin, prompt, params, ends):
    """(score, tokens, cumulative logprob) of beams that are each continued alone, densely."""
    live, ended = [(0.0, prompt)], []
    for _ in range(params.max_tokens):
        longer = []
        for total, tokens in live:
            logits = twin.logits(tokens)[-1].astype(np.float64)
            logprobs = logits - np.log(np.exp(logits).sum())
            for token in np.argsort(-logprobs)[: 2 * params.beam_width].tolist():
                grown = (total + logprobs[token], [*tokens, token])
                (ended if token in ends else longer).append(grown)
        live = sorted(longer, reverse=True)[: params.beam_width]
    lengths = [(*beam, len(beam[1]) - 1) for beam in ended]
    lengths += [(*beam, len(beam[1])) for beam in live]
    scored = [(total / n**params.length_penalty, tokens, total) for total, tokens, n in lengths]
    return sorted(scored, reverse=True)[: params.beam_width]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 3.0])
def test_the_engine_finds_what_a_naive_loop_finds(llm, penalty):
    params = BeamSearchParams(beam_width=3, max_tokens=6, length_penalty=penalty)
    prompts = [r.prompt_token_ids for r in tiny.random_requests(3, 4, longest=20)]
    found = llm.beam_search(prompts, params)
    twin = tiny.Naive(llm.engine)
    for prompt, output in zip(prompts, found, strict=True):
        expected = naive_search(twin, prompt, params, llm.engine.eos_token_ids)
        assert [s.tokens for s in output.sequences] == [tokens for _, tokens, _ in expected]
        for sequence, (_, _, total) in zip(output.sequences, expected, strict=True):
            assert math.isclose(sequence.cum_logprob, total, abs_tol=1e-4)
    assert {s.finish_reason for output in found for s in output.sequences} == {"stop", "length"}


def test_known_tokens_come_from_the_prefix_cache(llm):
    before = llm.engine.stats().n_prefix_hits
    llm.beam_search([[5] * 40], BeamSearchParams(beam_width=2, max_tokens=4))
    assert llm.engine.stats().n_prefix_hits - before >= 2 * 2 * 40


def test_texts_begin_with_the_prompt(llm):
    params = BeamSearchParams(beam_width=2, max_tokens=3)
    ids = llm.tokenizer.encode("7!", add_special_tokens=False)
    [output] = llm.beam_search({"prompt": "7!", "prompt_token_ids": ids}, params)
    assert [len(s.logprobs) for s in output.sequences] == [3, 3]
    assert all(s.text == llm.get_tokenizer().decode(s.tokens) for s in output.sequences)
    assert all(s.text.startswith("7!") for s in output.sequences)


def test_without_a_tokenizer_there_is_no_text(llm):
    ids_only = LLM.from_engine(llm.engine)
    [output] = ids_only.beam_search([1, 2], BeamSearchParams(beam_width=1, max_tokens=1))
    assert output.sequences[0].text is None


def test_beams_that_would_not_fit_are_refused_before_any_runs(llm):
    params = BeamSearchParams(beam_width=2, max_tokens=90)
    with pytest.raises(ContextLengthExceeded, match=r"prompt 1: .* is 96 tokens"):
        llm.beam_search([[1], [1] * 10], params)
    assert not llm.engine.has_work


def test_options_of_vllms_beam_search(llm):
    params = BeamSearchParams(beam_width=1, max_tokens=1)
    llm.beam_search([1], params, lora_request=None, use_tqdm=False, concurrency_limit=2)
    with pytest.raises(ConfigError, match="use_tqdm=True is not supported; it may be False"):
        llm.beam_search([1], params, use_tqdm=True)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"beam_width": 11}, "beam_width must be an integer from 1 to 10, got 11"),
        ({"beam_width": 0}, "beam_width must be an integer from 1 to 10, got 0"),
        ({"max_tokens": 0}, "max_tokens must be an integer from 1 to"),
        ({"temperature": 0.5}, "temperature=0.5 is not supported; it may be 0.0"),
        ({"length_penalty": math.nan}, r"length_penalty must be in \[-10.0, 10.0\], got nan"),
    ],
)
def test_beam_search_params_are_checked(given_, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 3} | given_)
    assert [caught.value.param] == list(given_)


def test_the_best_of_a_wide_search_beats_greedy(llm):
    prompts = [request.prompt_token_ids for request in tiny.random_requests(5, 6, longest=20)]
    params = BeamSearchParams(beam_width=10, max_tokens=8, ignore_eos=True)
    beams = llm.beam_search(prompts, params)
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
    for output, alone in zip(beams, llm.generate(prompts, greedy, use_tqdm=False), strict=True):
        best = output.sequences[0].cum_logprob
        assert best >= alone.outputs[0].cumulative_logprob - 1e-4
