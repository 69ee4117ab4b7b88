"""LLM.score and prompt_logprobs: what vLLM's users and trainers get."""

import itertools

import numpy as np
import pytest

from fastgen_jax import LLM, SamplingParams
from fastgen_jax.errors import FastGenError, InvalidRequest
from fastgen_jax.tokenizer import Tokenizer
from tests.tiny import Naive, make_engine, one_program
from tests.tiny_tokenizers import byte_level


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return LLM.from_engine(make_engine(tmp_path_factory.mktemp("tiny"), one_program))


@pytest.fixture(scope="module")
def naive(llm):
    return Naive(llm.engine)


def naive_scores(naive, prompt, completion) -> np.ndarray:
    logits = naive.logits([*prompt, *completion]).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logprobs[np.arange(len(prompt) - 1, len(logits) - 1), completion]


def test_scores_are_the_logprobs_of_the_ids_joined(llm, naive):
    pairs = [([5, 6], [7, 8, 9]), ([1], [2]), ([3] * 40, list(range(50))), ([4, 4], [])]
    found = llm.score(*zip(*pairs, strict=True), use_tqdm=False)
    for (prompt, completion), scores in zip(pairs, found, strict=True):
        assert (scores.dtype, scores.shape) == (np.float32, (len(completion),))
        np.testing.assert_allclose(scores, naive_scores(naive, prompt, completion), atol=1e-4)


def test_sampled_tokens_have_the_score_that_they_were_sampled_with(llm):
    params = SamplingParams(max_tokens=20, logprobs=0, n=3, seed=1, ignore_eos=True)
    prompt = list(range(10, 30))
    samples = llm.generate([prompt], params, use_tqdm=False)[0].outputs
    scores = llm.score([prompt] * 3, [sample.token_ids for sample in samples], use_tqdm=False)
    for sample, own in zip(samples, scores, strict=True):
        logprobs = [
            at[id].logprob for id, at in zip(sample.token_ids, sample.logprobs, strict=True)
        ]
        np.testing.assert_allclose(own, logprobs, atol=1e-5)


def test_prompt_logprobs_are_vllms(llm):
    prompt = [5, 6, 7, 8]
    params = SamplingParams(max_tokens=2, prompt_logprobs=2, n=2)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    first, *others = output.prompt_logprobs
    assert first is None and len(others) == 3
    for id, position in zip(prompt[1:], others, strict=True):
        assert next(iter(position)) == id and len(position) in (2, 3)
        ranked = sorted((p for p in position.values() if p.rank), key=lambda p: p.rank)
        assert [p.rank for p in ranked] == [1, 2]
        assert all(a.logprob >= b.logprob for a, b in itertools.pairwise(ranked))
    assert [len(sample.token_ids) for sample in output.outputs] == [2, 2]


def test_max_tokens_0_scores_and_generates_nothing(llm):
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    (output,) = llm.generate([[5, 6, 7]], params, use_tqdm=False)
    (sample,) = output.outputs
    assert (sample.token_ids, sample.text, sample.finish_reason) == ([], "", "length")
    assert [position and list(position) for position in output.prompt_logprobs] == [None, [6], [7]]


def test_texts_become_ids_each_by_itself(tmp_path):
    engine = make_engine(tmp_path, one_program, hf_overrides={"vocab_size": 400})
    llm = LLM.from_engine(engine, Tokenizer(byte_level(tmp_path)))
    encode = llm.tokenizer.encode
    prompt, completion = encode("Anna"), encode(" has", add_special_tokens=False)
    assert len(prompt) == len(encode("Anna", add_special_tokens=False)) + 1
    scores = llm.score(["Anna", prompt], [" has", completion], use_tqdm=False)
    assert len(scores[0]) == len(completion)
    np.testing.assert_allclose(*scores, atol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ([[1], [2]], [[3]], "1 completions for 2 prompts"),
        ([[1], []], [[3], [4]], "prompt 1: a prompt needs at least one token"),
        ([[1]], [[62]], "prompt 0: prompt holds 62; token ids are integers from 0 to 61"),
        ([[1]], ["text"], "prompt 0: a text completion needs a tokenizer"),
        ([[1] * 50], [[1] * 47], "prompt 0: This model's maximum context length is 96"),
    ],
)
def test_what_cannot_be_scored_is_refused(llm, prompts, completions, message):
    with pytest.raises(InvalidRequest, match=message):
        llm.score(prompts, completions, use_tqdm=False)


def test_a_completion_that_could_not_be_scored_says_why(llm, monkeypatch):
    fetch = llm.engine._runner.fetch_scores

    def poison(launched):
        scores = fetch(launched)
        return scores._replace(logprobs=scores.logprobs * np.nan)

    monkeypatch.setattr(llm.engine._runner, "fetch_scores", poison)
    with pytest.raises(FastGenError, match=r"left nothing of its prompt: .* non-finite logits"):
        llm.score([[1]], [[2]], use_tqdm=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt_logprobs": 21}, "prompt_logprobs must be an integer from 0 to 20, got 21"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be .* no more than the 20 likeliest"),
        ({"max_tokens": 0}, "max_tokens must be an integer from 1 to"),
        ({"max_tokens": 0, "prompt_logprobs": 0, "n": 2}, "generates nothing, which n is about"),
        ({"max_tokens": 0, "prompt_logprobs": 0, "min_tokens": 1}, "min_tokens=1 exceeds"),
        (
            {"max_tokens": 0, "prompt_logprobs": 0, "structured_outputs": {"regex": "a"}},
            "generates nothing, which structured_outputs is about",
        ),
    ],
)
def test_params_that_make_no_sense_together_are_refused(given, message):
    with pytest.raises(InvalidRequest, match=message):
        SamplingParams(**given)
