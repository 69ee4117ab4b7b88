"""How much text a token can stand for is known, or said to be unknown."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from fastgen_jax.tokenizer.vocabulary import NFC_SHRINKS, longest_token
from tests import tiny_tokenizers


@pytest.fixture
def backend(tmp_path):
    path = tiny_tokenizers.byte_level(tmp_path)
    return tokenizers.Tokenizer.from_file(f"{path}/tokenizer.json")


def test_the_longest_token_counts_bytes_of_text(backend):
    assert longest_token(backend) == len("<|assistant|>")
    backend.add_tokens(["你好世界你好世界"])
    assert longest_token(backend) == 8 * 3


def test_a_normalizer_that_composes_counts(backend):
    plain = longest_token(backend)
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    assert longest_token(backend) == NFC_SHRINKS * plain


@pytest.mark.parametrize("normalizer", [
    normalizers.Strip(), normalizers.StripAccents(), normalizers.NFKC(),
    normalizers.Replace("  ", " "), normalizers.Replace(tokenizers.Regex(" +"), " "),
    normalizers.Sequence([normalizers.NFC(), normalizers.Strip()]),
])  # fmt: skip
def test_no_bound_where_a_normalizer_may_drop_text(backend, normalizer):
    backend.normalizer = normalizer
    assert longest_token(backend) is None


def test_no_bound_where_words_or_spaces_may_vanish(backend):
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()]
    )
    assert longest_token(backend) is None


def test_no_bound_where_a_token_swallows_the_spaces_beside_it(backend):
    backend.add_special_tokens([AddedToken("<|end|>", rstrip=True)])
    assert longest_token(backend) is None


def test_no_bound_where_unknown_characters_share_a_token(backend):
    spec = json.loads(backend.to_str())
    spec["pre_tokenizer"] = None
    assert longest_token(tokenizers.Tokenizer.from_str(json.dumps(spec))) is None
    assert longest_token(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))) is None


@given(st.text())
def test_composing_shrinks_no_text_further_than_assumed(text):
    composed = normalizers.NFC().normalize_str(text)
    assert len(text.encode()) <= NFC_SHRINKS * len(composed.encode())
