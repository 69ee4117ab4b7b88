"""Ranked strings of bytes, as tiktoken's files and Mistral's tekken.json list them, as tokenizers.

How text is split before it is merged, and which tokens are special, a tekken.json says itself;
beside the others repository code says it, so that those are known here by the class of that code.
"""

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastgen_jax.checkpoints.tensor_files import read_json
from fastgen_jax.tokenizer.vocabulary import BYTE_LEVEL_CODES

LETTERS = {byte: letter for letter, byte in BYTE_LEVEL_CODES.items()}
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI = (
    rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{SHORT}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{SHORT}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Class(NamedTuple):
    """What a class of repository code says: how it splits text, whether it normalizes it (NFC), and
    the tokens that follow the ranked ones; those of Kimi are in tokenizer_config.json.
    """

    pattern: str
    is_nfc: bool = False
    specials: tuple[str, ...] = ()
    eos: str | None = None


EXTRAS = (f"<|extra_{i}|>" for i in range(205))
CLASSES = {
    "QWenTokenizer": Class(
        QWEN,
        is_nfc=True,
        specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>", *EXTRAS),
        eos="<|endoftext|>",
    ),
    "TikTokenTokenizer": Class(KIMI),
}


def tiktoken_tokenizer(path: Path, name: str, added: Mapping[int, str]) -> tuple[Any, str | None]:
    """The tokenizers.Tokenizer of a file of lines `base64 rank`, and its EOS if its class has one.

    Args:
        name: of the class that reads it, one of CLASSES.
        added: its tokens by their ids, where the class leaves them to tokenizer_config.json.

    Raises:
        ValueError: the file is damaged, or the class unknown.
    """
    if name not in CLASSES:
        raise ValueError(
            f"the code of its class {name} says how it splits text, and is not known here as those "
            f"of {' and '.join(CLASSES)} are; add a tokenizer.json"
        )
    known = CLASSES[name]
    lines = [line.split() for line in path.read_bytes().splitlines() if line]
    ranked = [base64.b64decode(token, validate=True) for token, _ in lines]
    if [int(rank) for _, rank in lines] != list(range(len(ranked))):
        raise ValueError("its ranks are not 0, 1, 2, ...; copy it again")
    ids = range(len(ranked), max(added, default=0) + 1)
    specials = known.specials or [added.get(id, f"<|reserved_token_{id}|>") for id in ids]
    special_ids = {text: len(ranked) + i for i, text in enumerate(specials)}
    backend = _backend(ranked, 0, special_ids, known.pattern)
    if known.is_nfc:
        from tokenizers import normalizers

        backend.normalizer = normalizers.NFC()
    return backend, known.eos


def tekken_tokenizer(path: Path) -> Any:
    """The tokenizers.Tokenizer of a tekken.json, in which special tokens have the first ids.

    Raises:
        ValueError: the file is damaged, or so old that it names no special tokens.
    """
    file = read_json(path)
    if "special_tokens" not in file:
        raise ValueError("it names no special_tokens; add the model's tokenizer.json")
    named = {token["rank"]: token["token_str"] for token in file["special_tokens"]}
    config = file["config"]
    n_special = config.get("default_num_special_tokens") or len(named)
    specials = {named.get(id, f"<SPECIAL_{id}>"): id for id in range(n_special)}
    n_ranked = (config.get("default_vocab_size") or len(file["vocab"]) + n_special) - n_special
    ranked = [base64.b64decode(token["token_bytes"]) for token in file["vocab"][:n_ranked]]
    return _backend(ranked, n_special, specials, config["pattern"])


def _backend(ranked: list[bytes], first: int, specials: dict[str, int], pattern: str) -> Any:
    """A tokenizer of strings that have the ids from `first` on, and of special tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = {_spelled(token): first + rank for rank, token in enumerate(ranked)}
    merges = [(_spelled(left), _spelled(right)) for left, right in _merges(ranked)]
    # Of a piece that is a token no parts are merged: tiktoken looks for it first.
    backend = Tokenizer(models.BPE(vocab | specials, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    backend.decoder = decoders.ByteLevel()
    in_order = sorted(specials, key=specials.__getitem__)
    backend.add_tokens([AddedToken(text, special=True, normalized=False) for text in in_order])
    return backend


def _merges(ranked: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Every way to make a string of two others, by the rank of what is made."""
    ranks = {token: rank for rank, token in enumerate(ranked)}
    for token in ranked:
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [(ranks[a], ranks[b], a, b) for a, b in halves if a in ranks and b in ranks]
        for _, _, left, right in sorted(known):
            yield left, right


def _spelled(token: bytes) -> str:
    return "".join(LETTERS[byte] for byte in token)
