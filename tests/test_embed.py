"""LLM.embed against the dense model."""

import io

import numpy as np
import pytest
from tqdm import tqdm

from fastgen_jax import EmbeddingOutput
from fastgen_jax.errors import ConfigError, ContextLengthExceeded, InvalidRequest
from fastgen_jax.llm import LLM
from fastgen_jax.tokenizer import Tokenizer
from tests import tiny, tiny_tokenizers

PROMPTS = [request.prompt_token_ids for request in tiny.random_requests(0, 6)]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    engine = tiny.make_engine(directory, make=tiny.one_program, max_queued_requests=2)
    tokenizer = Tokenizer(tiny_tokenizers.byte_level(directory))
    with LLM.from_engine(engine, tokenizer) as llm:
        yield llm


@pytest.fixture(scope="module")
def naive(llm):
    return tiny.Naive(llm.engine)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_vectors_are_those_of_the_dense_model_in_the_prompts_order(llm, naive, pooling):
    outputs = llm.embed(PROMPTS, pooling=pooling, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == PROMPTS
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        hidden = naive.hidden(prompt)
        vector = hidden[-1] if pooling == "last" else hidden.mean(axis=0)
        found = np.array(output.outputs.embedding)
        np.testing.assert_allclose(found, vector / np.linalg.norm(vector), atol=1e-4)
        assert (output.outputs.hidden_size, output.finished) == (32, True)


def test_vectors_may_keep_their_length(llm, naive):
    (output,) = llm.embed(PROMPTS[0], normalize=False, use_tqdm=False)
    np.testing.assert_allclose(output.outputs.embedding, naive.hidden(PROMPTS[0])[-1], atol=1e-4)


def test_texts_are_embedded_as_their_tokens(llm):
    text = "1+2"
    ids = llm.tokenizer.encode(text)
    by_text, by_ids = llm.embed([text, {"prompt_token_ids": ids}], use_tqdm=False)
    assert by_text.outputs == by_ids.outputs
    assert by_text.prompt_token_ids == ids


def test_cached_prefixes_are_counted(llm):
    prompt = [i * 5 % 62 for i in range(40)]
    counts = [llm.embed(prompt, use_tqdm=False)[0].num_cached_tokens for _ in range(2)]
    assert counts == [0, 32]


def test_no_prompts_have_no_vectors(llm):
    assert llm.embed([], use_tqdm=False) == []


def test_a_bar_counts_prompts(llm):
    shown = io.StringIO()
    llm.embed(PROMPTS, use_tqdm=lambda **options: tqdm(**options, file=shown))
    assert "6/6" in shown.getvalue()
    assert "tokens/s" not in shown.getvalue()


def test_vector_that_is_not_finite_is_an_error_of_its_own(llm, monkeypatch):
    fetch = llm.engine._runner.fetch_pooled
    monkeypatch.setattr(llm.engine._runner, "fetch_pooled", lambda step: fetch(step) * np.nan)
    (output,) = llm.embed([[9, 8, 7]], use_tqdm=False)
    assert output.outputs == EmbeddingOutput([], "the model produced non-finite logits")


@pytest.mark.parametrize(("prompts", "options", "error", "message"), [
    ([[1], []], {}, InvalidRequest, "prompt 1: the prompt is empty"),
    ([[1], [1] * 97], {}, ContextLengthExceeded, "the prompt has 97 tokens"),
    ([[1]], {"pooling": "cls"}, InvalidRequest, "pooling must be last or mean, got 'cls'"),
    ([[1]], {"normalise": True}, ConfigError, "normalise"),
    ([[1]], {"truncate_prompt_tokens": 5}, ConfigError, "give as many token ids"),
])  # fmt: skip
def test_what_cannot_be_embedded_is_refused_and_nothing_runs(llm, prompts, options, error, message):
    with pytest.raises(error, match=message):
        llm.embed(prompts, use_tqdm=False, **options)
    tiny.assert_idle(llm.engine)
