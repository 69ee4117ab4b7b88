"""A tokenizer comes from files that are all there, or an error names the one that is not."""

import json
import time
from pathlib import Path

import pytest
import tokenizers

from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.errors import CheckpointError, ConfigError
from fastgen_jax.llm import LLM
from fastgen_jax.server import loading
from fastgen_jax.server.config import ServerConfig
from fastgen_jax.tokenizer import Tokenizer, has_tokenizer
from tests import tiny, tiny_tokenizers

CLASSES = ("LlamaTokenizer", "GemmaTokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast")


@pytest.fixture
def directory(tmp_path) -> Path:
    return Path(tiny_tokenizers.byte_level(tmp_path / "model"))


def configure(directory: Path, **changes):
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def serve_it(directory: Path):
    """What the command line loads, up to the first word of the engine."""

    def on_phase(name, done, total):
        raise AssertionError("the engine began to load")

    loading.load(EngineConfig(model=str(directory)), ServerConfig(), on_phase)


@pytest.mark.parametrize("name", CLASSES)
def test_a_tokenizer_config_alone_is_no_tokenizer(directory, name):
    configure(directory, tokenizer_class=name)
    (directory / "tokenizer.json").unlink()
    (directory / "special_tokens_map.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"has no tokenizer, which would be in tokenizer\.json"
    ):
        Tokenizer(str(directory))
    assert not has_tokenizer(str(directory))


def test_a_file_that_belongs_to_another_is_missed_by_name(directory):
    tiny_tokenizers.make_old(directory)
    (directory / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"has vocab\.json without merges\.txt"):
        Tokenizer(str(directory))
    assert has_tokenizer(str(directory))


def test_vocabulary_and_merges_make_a_tokenizer(directory):
    configure(directory, tokenizer_class="GPT2Tokenizer")
    whole = Tokenizer(str(directory))
    tiny_tokenizers.make_old(directory)
    old = Tokenizer(str(directory))
    for text in tiny_tokenizers.TEXTS[:2]:
        assert old.encode(text, add_special_tokens=False) == whole.encode(text)[1:]


@pytest.mark.parametrize("name", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_a_class_that_leaves_the_vocabulary_unread_is_refused(directory, name):
    configure(directory, tokenizer_class=name)
    tiny_tokenizers.make_old(directory)
    with pytest.raises(CheckpointError, match=r"cannot load the tokenizer of .* from vocab\.json"):
        Tokenizer(str(directory))


@pytest.mark.parametrize("auto_map", [["x.T", None], {"AutoTokenizer": [None, "o/r--x.T"]}])
def test_a_tokenizer_that_is_code_is_refused_by_its_name(directory, auto_map):
    configure(directory, auto_map=auto_map)
    assert Tokenizer(str(directory)).vocab_size
    (directory / "tokenizer.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"class (o/r--)?x\.T of its own code, and code .* never"
    ):
        Tokenizer(str(directory))


def test_damaged_and_missing_files_are_checkpoint_errors(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    for path in (str(tmp_path), "no-such-org/no-such-model", str(tmp_path / "absent")):
        with pytest.raises(CheckpointError, match="cannot load the tokenizer of"):
            Tokenizer(path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json must hold a JSON object"):
        Tokenizer(str(tmp_path))


def test_directory_without_tokenizer_files_is_recognised(tmp_path):
    assert not has_tokenizer(str(tmp_path))
    assert has_tokenizer(tiny_tokenizers.byte_level(tmp_path))
    assert has_tokenizer("some-org/some-model")


# --- BOS and EOS of texts


def template_of(path: Path, text: str, tokens: dict[str, int]):
    """Has tokenizer.json put these tokens around texts."""
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    around = tokenizers.processors.TemplateProcessing(single=text, special_tokens=[*tokens.items()])
    tokenizer.post_processor = around
    tokenizer.save(str(path))


@pytest.mark.parametrize("has_bos", [True, False])
@pytest.mark.parametrize(
    ("name", "config", "ends"),
    [
        ("LlamaTokenizerFast", {"add_bos_token": True, "add_eos_token": False}, (1, 0)),
        ("LlamaTokenizer", {"add_bos_token": False}, (0, 0)),
        ("LlamaTokenizer", {"add_eos_token": True}, (1, 1)),
        ("LlamaTokenizer", {"add_bos_token": True, "bos_token": None}, (0, 0)),
        ("GemmaTokenizer", {"add_bos_token": True}, (1, 0)),
        ("CohereTokenizerFast", {"add_bos_token": True}, (1, 0)),
        ("GPTNeoXTokenizerFast", {"add_eos_token": True}, (0, 1)),
        ("LlamaTokenizer", {}, None),
        ("LlamaTokenizer", {"add_bos_token": None}, None),
        ("PreTrainedTokenizerFast", {"add_bos_token": True, "add_eos_token": True}, None),
        ("Qwen2Tokenizer", {"add_bos_token": True}, None),
        (None, {"add_bos_token": True}, None),
    ],
)
def test_texts_have_the_ends_that_their_class_gives_them(directory, name, config, ends, has_bos):
    """None: those of tokenizer.json."""
    template_of(directory / "tokenizer.json", "<s> $A" if has_bos else "$A", {"<s>": 0})
    configure(directory, tokenizer_class=name, **config)
    tokenizer = Tokenizer(str(directory))
    text = tokenizer.encode("one", add_special_tokens=False)
    bos, eos = ends or (has_bos, False)
    assert tokenizer.encode("one") == [0] * bos + text + [1] * eos


def test_a_template_that_writes_bos_has_it_once(directory):
    configure(directory, tokenizer_class="LlamaTokenizerFast", add_bos_token=True)
    ids = Tokenizer(str(directory)).apply_chat_template([{"role": "user", "content": "one"}])
    assert ids.count(0) == 1


# --- before anything is loaded


def test_serve_misses_a_tokenizer_before_it_loads_anything(directory):
    tiny.write_config(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        serve_it(directory)


def test_a_model_that_is_not_supported_is_told_before_the_tokenizer(directory):
    tiny.write_config(directory, model_type="xyzzy")
    (directory / "tokenizer.json").write_text("{")
    for start in (serve_it, lambda path: LLM(str(path))):
        with pytest.raises(ConfigError, match="model type 'xyzzy' is not supported"):
            start(directory)


def test_a_tokenizer_that_is_asked_for_by_name_must_be_there(directory, tmp_path):
    tiny.write_config(directory)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty' has no tokenizer"):
        LLM(str(directory), tokenizer=str(tmp_path / "empty"))


def test_what_is_wrong_with_a_tokenizer_does_not_wait_for_the_weights(directory, monkeypatch):
    tiny.write_config(directory)
    (directory / "tokenizer.json").write_text("{")

    def load_for_long(config, on_phase):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            on_phase("loading", 1, 2)
        raise AssertionError("the weights are there")

    monkeypatch.setattr("fastgen_jax.engine.engine.Engine", load_for_long)
    with pytest.raises(CheckpointError, match="cannot load the tokenizer of"):
        loading.load(EngineConfig(model=str(directory)), ServerConfig(), lambda *phase: None)
