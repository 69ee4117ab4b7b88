"""Files of ranked strings give the ids that tiktoken itself gives."""

import base64
import json
import unicodedata
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from fastgen_jax.errors import CheckpointError
from fastgen_jax.tokenizer import Tokenizer
from fastgen_jax.tokenizer.ranks import CLASSES
from tests import tiny_tokenizers

README = (Path(__file__).parents[2] / "README.md").read_text()[:8000]
BYTE_LEVEL = tokenizers.pre_tokenizers.ByteLevel
TEXTS = [*README.splitlines(), *tiny_tokenizers.TEXTS, "", " ", "aaaaaaaaa bbbbbbb"]
TEXTS += ["I'LL don't 12345 漢字かな漢", "\r\n\n x", "Ünïcode e\u0301 ABCdef ǅx", "  a   b\t\t"]
ADDED = {0: "[BOS]", 1: "[EOS]", 3: "<|im_end|>"}  # after the last rank


def train() -> list[bytes]:
    """Ranked strings: every byte, and what a few hundred merges make."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = BYTE_LEVEL(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=BYTE_LEVEL.alphabet(), show_progress=False
    )
    backend.train_from_iterator([README, *tiny_tokenizers.TEXTS * 3], trainer)
    backend.decoder = tokenizers.decoders.ByteLevel()
    merges = json.loads(backend.to_str())["model"]["merges"]
    letters = {BYTE_LEVEL(add_prefix_space=False, use_regex=False).pre_tokenize_str(chr(b))[0][0]: b
               for b in range(128)}  # fmt: skip
    made = ["".join(pair) for pair in merges]
    ascii_only = [bytes(letters[c] for c in text) for text in made if set(text) <= letters.keys()]
    return [*(bytes([byte]) for byte in range(256)), *dict.fromkeys(ascii_only)]


RANKED = train()
BASE = len(RANKED)


def write_tiktoken(directory: Path, file: str, config: dict) -> str:
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(RANKED)]
    directory.mkdir(exist_ok=True)
    (directory / file).write_text("\n".join(lines))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return str(directory)


def qwen(directory: Path) -> str:
    auto_map = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    config = {"tokenizer_class": "QWenTokenizer", "auto_map": auto_map}
    return write_tiktoken(directory, "qwen.tiktoken", config)


def kimi(directory: Path) -> str:
    added = {str(BASE + id): {"content": text, "special": True} for id, text in ADDED.items()}
    config = {"tokenizer_class": "TikTokenTokenizer", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    return write_tiktoken(directory, "tiktoken.model", config | {"added_tokens_decoder": added})


def tekken(directory: Path, **changes) -> str:
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate(RANKED)
    ]
    named = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    specials = [
        {"rank": id, "token_str": text, "is_control": True} for id, text in enumerate(named)
    ]
    config = {
        "pattern": CLASSES["TikTokenTokenizer"].pattern,
        "default_num_special_tokens": 10,
        "default_vocab_size": BASE + 10 - 5,
    }
    directory.mkdir(exist_ok=True)
    file = {"config": config, "vocab": vocab, "special_tokens": specials} | changes
    (directory / "tekken.json").write_text(json.dumps(file))
    return str(directory)


def oracle(name: str, n_ranked: int = BASE) -> tiktoken.Encoding:
    ranks = {token: rank for rank, token in enumerate(RANKED[:n_ranked])}
    return tiktoken.Encoding(
        name, pat_str=CLASSES[name].pattern, mergeable_ranks=ranks, special_tokens={}
    )


CASES = {
    "qwen": (qwen, oracle("QWenTokenizer"), 0),
    "kimi": (kimi, oracle("TikTokenTokenizer"), 0),
    "tekken": (tekken, oracle("TikTokenTokenizer", BASE - 5), 10),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    write, encoding, first = CASES[request.param]
    tokenizer = Tokenizer(write(tmp_path_factory.mktemp(request.param)))

    def expected(text):
        text = unicodedata.normalize("NFC", text) if request.param == "qwen" else text
        return [first + id for id in encoding.encode(text, disallowed_special=())]

    return tokenizer, expected


def test_texts_have_the_same_ids_and_are_decoded(case):
    tokenizer, expected = case
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == expected(text), text
        assert tokenizer.decode(ids) in (text, unicodedata.normalize("NFC", text))


@given(text=st.text(st.sampled_from("aabBeinst ' 129\n.é漢か|_>\t"), max_size=40))
def test_random_texts_have_the_same_ids(case, text):
    tokenizer, expected = case
    assert tokenizer.encode(text, add_special_tokens=False) == expected(text)


def test_qwen_has_the_special_tokens_of_its_class(tmp_path):
    tokenizer = Tokenizer(qwen(tmp_path))
    assert tokenizer.encode("<|endoftext|><|im_start|><|extra_204|>") == [
        BASE,
        BASE + 1,
        BASE + 207,
    ]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, BASE)
    assert tokenizer.vocab_size == BASE + 208


def test_kimi_has_those_of_its_config_and_no_bos(tmp_path):
    tokenizer = Tokenizer(kimi(tmp_path))
    assert tokenizer.encode("[EOS]<|im_end|>") == [BASE + 1, BASE + 3]
    assert tokenizer.token_text(BASE + 2) == f"<|reserved_token_{BASE + 2}|>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BASE, BASE + 1)


def test_mistral_has_its_special_tokens_first_and_bos(tmp_path):
    template = "{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}"
    tokenizer = Tokenizer(tekken(tmp_path), chat_template=template)
    assert tokenizer.encode("</s>[INST]") == [1, 2, 3]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "[INST]"}])
    assert [id for id in ids if id < 10] == [3, 4]


def test_a_class_that_is_not_known_is_refused_by_name(tmp_path):
    write_tiktoken(tmp_path, "tiktoken.model", {"tokenizer_class": "OtherTokenizer"})
    with pytest.raises(
        CheckpointError, match="of its class OtherTokenizer says how it splits text"
    ):
        Tokenizer(str(tmp_path))


def test_what_names_no_class_is_refused_by_name(tmp_path):
    path = write_tiktoken(tmp_path, "qwen.tiktoken", {})
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"qwen\.tiktoken without tokenizer_config\.json"):
        Tokenizer(path)


@pytest.mark.parametrize("text", ["IQ==", "IQ== 1", "?? 0", "IQ== x"])
def test_damaged_ranks_are_refused(tmp_path, text):
    path = qwen(tmp_path)
    (tmp_path / "qwen.tiktoken").write_text(text)
    with pytest.raises(
        CheckpointError, match=r"cannot load the tokenizer of .* from qwen\.tiktoken"
    ):
        Tokenizer(path)


def test_an_old_tekken_without_special_tokens_is_refused(tmp_path):
    path = tekken(tmp_path)
    file = json.loads((tmp_path / "tekken.json").read_text())
    del file["special_tokens"]
    (tmp_path / "tekken.json").write_text(json.dumps(file))
    with pytest.raises(CheckpointError, match="names no special_tokens; add the model's tokenizer"):
        Tokenizer(path)
