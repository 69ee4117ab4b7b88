"""Constrained sequences: what they may say, beside neighbours whose tokens do not change."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fastgen_jax.engine.constraint import Constraint, bits
from fastgen_jax.engine.sampling import is_allowed, sample
from fastgen_jax.engine.types import Request
from fastgen_jax.errors import InvalidRequest
from fastgen_jax.grammar import Grammar
from fastgen_jax.sampling_params import SamplingParams
from tests.engine.test_engine import assert_idle
from tests.engine.test_sampling import S, V, arguments, random_logits
from tests.tiny import make_engine, one_program, random_requests, run, tokens

VOCAB_SIZE, EOS = 62, 7  # of the tiny models
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,:;!?(){}[]\"'+-*/=<>_#"


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    """A character per token of the tiny models; token 7 is the end."""
    characters = [*LETTERS[:EOS], "</s>", *LETTERS[EOS:]][:VOCAB_SIZE]
    vocab = {character: id for id, character in enumerate(characters)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    assert backend.get_vocab_size() <= VOCAB_SIZE
    return LLTokenizer(backend.to_str(), n_vocab=VOCAB_SIZE, eos_token=[EOS])


def grammar(tokenizer: LLTokenizer, regex: str) -> Grammar:
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_regex(regex))
    assert not matcher.is_error(), matcher.get_error()
    return Grammar(matcher, tokenizer.vocab_size)


def says(tokenizer: LLTokenizer, outputs) -> str:
    return tokenizer.decode_str([id for id in tokens(outputs) if id != EOS])


def sample_of(outputs, index: int) -> list[int]:
    return tokens([o for o in outputs if o.index == index])


def constrained(seed: int, grammar: Grammar, **params) -> Request:
    params = {"max_tokens": 24, "temperature": 1.0, "seed": seed} | params
    return Request([1, seed], SamplingParams(**params), grammar=grammar)


def test_masks_bits_are_the_tokens_that_they_name():
    ids = [0, 31, 32, 39]
    allowed = is_allowed(jnp.asarray(bits(ids, V))[None], V)
    assert np.flatnonzero(allowed[0]).tolist() == ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_masked_rows_equal_rows_whose_other_logits_are_minus_infinity(temperature):
    logits = random_logits()
    kept = np.random.default_rng(1).random((S, V)) < 0.2
    kept[:, 5] = True
    masks = np.stack([bits(np.flatnonzero(row), V) for row in kept])
    given = arguments([SamplingParams(temperature=temperature)] * S)
    got = jax.jit(sample)(logits, *given, masks)
    wanted = jax.jit(sample)(jnp.where(kept, logits, -jnp.inf), *given)
    assert got.token_ids.tolist() == wanted.token_ids.tolist()
    assert kept[np.arange(S), got.token_ids].all()
    assert got.is_possible.all()


def test_a_row_that_may_say_nothing_is_told_apart_from_one_that_is_not_finite():
    masks = np.full((S, 2), -1, np.int32)
    masks[3] = 0
    got = jax.jit(sample)(random_logits(), *arguments([SamplingParams()] * S), masks)
    assert np.flatnonzero(~got.is_possible).tolist() == [3]
    assert got.is_finite.all()


@pytest.mark.parametrize("regex", ["[ab]{3,9}", "(ab|cd)+e", "x{20}", "[0-9]+[.][0-9]{2}"])
def test_every_sample_matches_or_begins_what_matches(engine, tokenizer, regex):
    allowed = grammar(tokenizer, regex)
    [outputs] = run(engine, [constrained(3, allowed, n=8)])
    for index in range(8):
        sample = [o for o in outputs if o.index == index]
        copy = allowed.matcher.deep_copy()
        said = [id for id in tokens(sample) if id != EOS]
        assert copy.consume_tokens(said)
        assert sample[-1].finish_reason == ("stop" if copy.is_accepting() else "length")
    assert_idle(engine)


def test_a_complete_grammar_ends_its_sample_after_a_token_that_counts(engine, tokenizer):
    [outputs] = run(engine, [constrained(1, grammar(tokenizer, "abc"), ignore_eos=True)])
    assert says(tokenizer, outputs) == "abc"
    assert [o.finish_reason for o in outputs] == [None, None, None, "stop"]
    assert outputs[-1].token_id is None


def test_a_grammar_complete_with_the_last_token_allowed_has_stopped(engine, tokenizer):
    [outputs] = run(engine, [constrained(1, grammar(tokenizer, "abc"), max_tokens=3)])
    assert says(tokenizer, outputs) == "abc"
    assert outputs[-1].finish_reason == "stop"


def test_the_end_waits_for_min_tokens_where_the_grammar_can(engine, tokenizer):
    request = constrained(1, grammar(tokenizer, "a+"), min_tokens=9, logit_bias={EOS: 100.0})
    [outputs] = run(engine, [request])
    assert says(tokenizer, outputs) == "a" * 9


def test_a_stop_token_is_possible_only_where_the_grammar_may_end(engine, tokenizer):
    bias = {2: 100.0}  # "c", which the grammar does not know
    params = {"stop_token_ids": [2], "logit_bias": bias, "temperature": 0.0}
    [outputs] = run(engine, [constrained(1, grammar(tokenizer, "(ab)+"), **params)])
    assert says(tokenizer, outputs) == "abc"
    assert outputs[-1].stop_reason == 2


def test_neighbours_of_a_constrained_sequence_say_the_same(engine, tokenizer):
    """But for the last bits: other programs compute their logits then, on some CPUs in another
    order.
    """
    neighbours = random_requests(5, 6, temperature=0.8, logprobs=3, seed=4)
    free = Request([1, 1], SamplingParams(max_tokens=24, seed=1, ignore_eos=True))
    anything = constrained(1, grammar(tokenizer, "(?s:.)*"), ignore_eos=True)

    def outputs_beside(first: Request, salt: bytes):  # which keeps the cached prefixes apart
        requests = [replace(request, cache_salt=salt) for request in (first, *neighbours)]
        return run(engine, requests)

    alone, beside = outputs_beside(free, b"free"), outputs_beside(anything, b"anything")
    for a, b in zip(alone[1:], beside[1:], strict=True):
        assert [o.token_id for o in a] == [o.token_id for o in b]
        for x, y in zip(a, b, strict=True):
            assert x.logprobs.logprob == pytest.approx(y.logprobs.logprob, abs=2e-6)
            tops, others = dict(x.logprobs.top), dict(y.logprobs.top)
            assert tops == pytest.approx(others, abs=2e-6)


def test_preempted_samples_say_what_they_would_have_said(folder, tokenizer):
    matcher, prompts = grammar(tokenizer, "([a-e]{2}[0-9])+"), random_requests(2, 8)
    params = SamplingParams(n=2, max_tokens=24, seed=1, ignore_eos=True)
    requests = [Request(r.prompt_token_ids, params, grammar=matcher) for r in prompts]
    roomy = make_engine(folder, one_program)
    wanted = run(roomy, requests)
    tight = make_engine(folder, one_program, num_kv_blocks=15, enable_prefix_caching=False)
    got = run(tight, requests)
    assert tight.stats().n_preemptions > 0
    for a, b in zip(got, wanted, strict=True):
        assert [sample_of(a, i) for i in range(2)] == [sample_of(b, i) for i in range(2)]


def test_a_grammar_that_fails_while_running_ends_that_request_alone(engine, tokenizer, monkeypatch):
    failing, fine = grammar(tokenizer, "a{9}"), grammar(tokenizer, "b{5}")
    advance, said = Constraint.advance, []

    def slip(self, token):
        said.append(token)
        return advance(self, 1 if token == 0 and said.count(0) == 3 else token)

    monkeypatch.setattr(Constraint, "advance", slip)
    first, second = run(engine, [constrained(1, failing), constrained(2, fine)])
    assert said.count(0) >= 3
    assert [o.finish_reason for o in first if o.finish_reason] == ["error"]
    assert "the grammar failed" in first[-1].error
    assert says(tokenizer, second) == "bbbbb"
    assert_idle(engine)


def test_what_may_say_nothing_ends_alone_and_counts_not_as_damage(engine):
    params = SamplingParams(allowed_token_ids=[3], max_tokens=4)
    hopeless = Request([1, 2], params, bad_words=((3,),))
    fine = Request([1, 2], SamplingParams(allowed_token_ids=[3], max_tokens=4))
    first, second = run(engine, [hopeless, fine])
    assert first[-1].finish_reason == "error"
    assert "no token is allowed" in first[-1].error
    assert tokens(second) == [3, 3, 3, 3]
    assert engine.stats().n_nonfinite == 0


def test_bad_words_are_never_completed(engine):
    words = ((4, 4), (9,), (4, 5, 6))
    params = SamplingParams(n=8, max_tokens=24, allowed_token_ids=[4, 5, 6, 9], seed=3)
    [outputs] = run(engine, [Request([1, 2], params, bad_words=words)])
    for index in range(8):
        said = sample_of(outputs, index)
        runs = [said[i : i + n] for n in (1, 2, 3) for i in range(len(said))]
        assert len(said) == 24
        assert not any(list(word) in runs for word in words)


def test_constrained_batches_compile_nothing(engine, tokenizer, forbid_compile):
    matcher = grammar(tokenizer, "[a-f]{12}")
    with forbid_compile():
        run(engine, [constrained(i, matcher) for i in range(8)])


@pytest.mark.parametrize("word", [(62,), (1, -1)])
def test_words_of_tokens_that_do_not_exist_are_refused(engine, word):
    with pytest.raises(InvalidRequest, match="bad_words holds"):
        engine.submit(Request([1], SamplingParams(), bad_words=(word,)))
