"""How a vocabulary spells bytes, and how much text one of its tokens can stand for."""

import json
from collections.abc import Iterator
from typing import Any

NFC_SHRINKS = 3  # three conjoining jamo of 3 bytes become a syllable of 3
KEEPING = ("ByteLevel", "Metaspace", "Digits", "Sequence")  # pre-tokenizers that drop no text


def _byte_level_codes() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 is itself, the other 68 follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [code for code in range(256) if code not in printable]
    return {chr(code): code for code in printable} | {
        chr(256 + i): code for i, code in enumerate(others)
    }


BYTE_LEVEL_CODES = _byte_level_codes()


def longest_token(backend: Any) -> int | None:
    """The most bytes of UTF-8 for which a single token can stand; None where there is no bound, as
    with normalisers that drop text, or unknown characters that fuse into one token.

    INVARIANT: a text of b bytes has at least b / longest_token tokens.

    Args:
        backend: a tokenizers.Tokenizer.
    """
    added = backend.get_added_tokens_decoder().values()
    shrinking = _shrinking(backend.normalizer)
    splits = list(_steps(backend.pre_tokenizer, "pretokenizers"))
    vocab = backend.get_vocab(with_added_tokens=False)
    is_byte_level = any(step["type"] == "ByteLevel" for step in splits)
    swallows = any(token.lstrip or token.rstrip for token in added)  # any number of spaces
    if swallows or not all(map(_keeps_text, splits)):
        return None
    if shrinking is None or not _spells_all_bytes(backend.model, vocab, is_byte_level):
        return None
    pieces = map(len, vocab) if is_byte_level else (len(piece.encode()) for piece in vocab)
    return shrinking * max(*pieces, *(len(token.content.encode()) for token in added), 1)


def _steps(part: Any, members: str) -> Iterator[dict[str, Any]]:
    """What tokenizer.json says of a normalizer or pre-tokenizer; of each, in a sequence of them."""
    if part is None:
        return
    pending = [json.loads(part.__getstate__())]
    while pending:
        spec = pending.pop(0)
        yield spec
        pending = [*spec.get(members, ()), *pending]


def _keeps_text(split: dict[str, Any]) -> bool:
    is_known = split["type"] in KEEPING or split["type"] == "Split"
    return is_known and split.get("behavior") != "Removed"


def _shrinking(normalizer: Any) -> int | None:
    """By what factor it may shorten a text; None if there is no telling."""
    factor = 1
    for step in _steps(normalizer, "normalizers"):
        if step["type"] == "NFC":
            factor *= NFC_SHRINKS
        elif step["type"] == "Replace":
            found = step["pattern"].get("String")
            if not found or len(step["content"].encode()) < len(found.encode()):
                return None
        elif step["type"] not in ("Prepend", "Sequence"):
            return None
    return factor


def _spells_all_bytes(model: Any, vocab: dict[str, int], is_byte_level: bool) -> bool:
    """Whether every text has tokens of its own; else stretches of it may share one, or none."""
    if type(model).__name__ != "BPE":
        return False
    if is_byte_level:
        return vocab.keys() >= BYTE_LEVEL_CODES.keys()
    return model.byte_fallback and vocab.keys() >= {f"<0x{byte:02X}>" for byte in range(256)}
