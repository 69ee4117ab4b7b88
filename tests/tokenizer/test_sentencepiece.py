"""A tokenizer.model gives the ids that SentencePiece itself gives."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from fastgen_jax.errors import CheckpointError
from fastgen_jax.tokenizer import Tokenizer
from tests import tiny_tokenizers

README = (Path(__file__).parents[2] / "README.md").read_text()
LINES = [line for line in README[:6000].splitlines() if line.strip()] + tiny_tokenizers.TEXTS * 5
TEXTS = [
    *LINES,
    " hello",
    "  two  spaces ",
    "",
    " ",
    "a",
    "\n\n x",
    "漢字 and 😀",
    "x\u00a0y ﬁ",
    "a\tb",
]
SYMBOLS = "\n,▁▁,123"
KINDS = {
    "llama": {},
    "yi": {"add_dummy_prefix": False},
    "squeezed": {"remove_extra_whitespaces": True},
    "normalized": {"normalization_rule_name": "nmt_nfkc"},
    "symbols": {"user_defined_symbols": SYMBOLS},
    "no_bytes": {"byte_fallback": False},
    "unigram": {"model_type": "unigram"},
    "unigram_symbols": {"model_type": "unigram", "user_defined_symbols": "\n,123"},
}


def train(
    directory: Path, config: dict | None = None, **changes
) -> sentencepiece.SentencePieceProcessor:
    """A directory with nothing but a tokenizer.model, and a config."""
    options = {
        "model_type": "bpe", "vocab_size": 600, "byte_fallback": True, "num_threads": 1,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "hard_vocab_limit": False, "minloglevel": 2,
    }  # fmt: skip
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=written, **options | changes
    )
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.model").write_bytes(written.getvalue())
    config = {"tokenizer_class": "LlamaTokenizer"} | (config or {})
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    original = train(directory, **KINDS[request.param])
    return original, Tokenizer(str(directory))


def test_texts_have_the_same_ids_and_ids_the_same_text(pair):
    original, tokenizer = pair
    for text in TEXTS:
        ids = original.encode(text)
        assert ids_of(tokenizer, text) == ids, text
        if original.unk_id() not in ids:
            assert tokenizer.decode(ids) == original.decode(ids)


@given(text=st.text(st.sampled_from(" abt1235e\n.\té你>"), max_size=40))
def test_random_texts_have_the_same_ids(pair, text):
    original, tokenizer = pair
    if original.unk_id() not in original.encode(text):
        assert ids_of(tokenizer, text) == original.encode(text)


def test_special_tokens_that_no_file_names_are_those_of_the_model(tmp_path):
    train(tmp_path)
    tokenizer = Tokenizer(str(tmp_path))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.special_ids == {0, 1, 2}
    assert [tokenizer.token_text(id) for id in tokenizer.encode("<s>")] == ["<s>", "<s>"]


@pytest.mark.parametrize(
    ("config", "ends"),
    [({}, (1, 0)), ({"add_bos_token": False}, (0, 0)), ({"add_eos_token": True}, (1, 1)),
     ({"tokenizer_class": "YiTokenizer", "auto_map": {"AutoTokenizer": ["x.Y", None]}}, (1, 0))],
)  # fmt: skip
def test_texts_begin_with_bos_unless_the_config_says_otherwise(tmp_path, config, ends):
    original = train(tmp_path, config)
    bos, eos = ends
    assert Tokenizer(str(tmp_path)).encode("a b") == [1] * bos + original.encode("a b") + [2] * eos


def test_added_tokens_have_their_ids_and_may_rename_pieces(tmp_path):
    added = {"600": {"content": "<|im_end|>", "special": True}, "599": {"content": "<|x|>"}}
    train(tmp_path, {"added_tokens_decoder": added})
    tokenizer = Tokenizer(str(tmp_path))
    assert ids_of(tokenizer, "<|im_end|><|x|>") == [600, 599]
    assert tokenizer.special_id("<|im_end|>") == 600


@pytest.mark.parametrize("is_listed", [True, False])
def test_an_added_token_that_would_get_another_id_is_refused(tmp_path, is_listed):
    listed = {"added_tokens_decoder": {"700": {"content": "<|im_end|>"}}}
    train(tmp_path, listed if is_listed else None)
    if not is_listed:
        (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 700}')
    with pytest.raises(CheckpointError, match=r"'<\|im_end\|>' has id 700 in .*, and gets 600"):
        Tokenizer(str(tmp_path))


@pytest.mark.parametrize(("is_legacy", "n_spaces"), [(True, 2), (None, 2), (False, 1)])
def test_what_follows_a_control_token_has_a_space_as_legacy_says(tmp_path, is_legacy, n_spaces):
    train(tmp_path, {"legacy": is_legacy})
    tokenizer = Tokenizer(str(tmp_path))
    shown = tokenizer.decode(ids_of(tokenizer, "a</s>a"), skip_special_tokens=False)
    ids = ids_of(tokenizer, "a</s>a")
    assert sum(tokenizer.token_text(id) == " a" for id in ids) == n_spaces, shown


def test_symbols_that_look_like_markup_are_tokens_of_chats(tmp_path):
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    train(tmp_path, {"chat_template": template}, user_defined_symbols="<|im_end|>")
    tokenizer = Tokenizer(str(tmp_path))
    [end] = ids_of(tokenizer, "<|im_end|>")
    assert end in tokenizer.eos_token_ids
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "<|im_end|>"}]).count(end) == 1
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "char"}, "a model of type 4, neither Unigram nor BPE"),
        ({"treat_whitespace_as_suffix": True}, "spaces at the ends of words"),
        ({"model_type": "unigram", "user_defined_symbols": SYMBOLS}, "symbols of spaces alone"),
        (
            {"normalization_rule_name": "nmt_nfkc", "user_defined_symbols": SYMBOLS},
            "normalize the symbol",
        ),
    ],
)
def test_what_nothing_here_computes_is_refused(tmp_path, changes, message):
    train(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=f"from tokenizer.model: .*{message}"):
        Tokenizer(str(tmp_path))


def test_other_and_cut_files_are_refused(tmp_path):
    train(tmp_path)
    whole = (tmp_path / "tokenizer.model").read_bytes()
    for damaged in (whole[:-9], b"IQ== 0\nIg== 1\n", b"{}"):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"from tokenizer\.model: it is no SentencePiece"):
            Tokenizer(str(tmp_path))
