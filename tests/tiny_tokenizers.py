"""Tokenizer directories made in milliseconds, one per kind of decoder that Llamas use."""

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

BOS, EOS, USER, ASSISTANT, TOOL = "<s>", "</s>", "<|user|>", "<|assistant|>", "<tool>"
SPECIAL = [BOS, EOS, USER, ASSISTANT]
TEXTS = [
    "Anna has three apples and a red ball.",
    "The code of Anna is 7312. What is the code of Anna?",
    "naïve café, 你好世界, здравствуй, 😀👩‍👩‍👧 and more.",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'narrator' %}{{ raise_exception('no narrator') }}{% endif %}"
    "<|{{ message.role }}|>\n{{ message.content | trim }}{{ eos_token }}\n"
    "{% endfor %}{# non-special: #}{{ '<tool>' if tools }}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def byte_level(directory: Path, chat_template: str | None = CHAT_TEMPLATE) -> str:
    """GPT-2, Llama 3, SmolLM: tokens are strings of bytes, so a character may span several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _save(tokenizer, directory, chat_template)


def sentencepiece(directory: Path, chat_template: str | None = CHAT_TEMPLATE) -> str:
    """Llama 1 and 2, TinyLlama: ▁ is a space, unknown characters are spelled in byte tokens."""
    tokenizer = Tokenizer(_sentencepiece_model())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    space, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), strip])
    return _save(tokenizer, directory, chat_template, normalized=True)


def metaspace(directory: Path, chat_template: str | None = CHAT_TEMPLATE) -> str:
    """SentencePiece as some converters write it."""
    tokenizer = Tokenizer(_sentencepiece_model())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    return _save(tokenizer, directory, chat_template)


def with_tokens(path: str, *texts: str, special: bool = True) -> str:
    """The same directory, with these tokens added."""
    tokenizer = Tokenizer.from_file(f"{path}/tokenizer.json")
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text in texts])
    tokenizer.save(f"{path}/tokenizer.json")
    return path


def make_old(directory: Path):
    """Leaves the tokenizer in the form that had no tokenizer.json."""
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    (directory / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    (directory / "tokenizer.json").unlink()


KINDS = {"byte_level": byte_level, "sentencepiece": sentencepiece, "metaspace": metaspace}


def _sentencepiece_model() -> models.BPE:
    characters = sorted(set("▁" + "".join(TEXTS[:2])) - {" "})
    merges = [("▁", "A"), ("n", "n"), ("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "▁"), ("o", "f")]
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    pieces += [left + right for left, right in merges]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    return models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )


def _save(
    tokenizer: Tokenizer, directory: Path, chat_template: str | None, normalized: bool = False
) -> str:
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=normalized) for token in SPECIAL]
    )
    tokenizer.add_tokens([AddedToken(TOOL, special=False, normalized=False)])
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[bos]
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return str(directory)
