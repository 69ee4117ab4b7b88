"""SentencePiece's models (tokenizer.model) as tokenizers that give the same ids.

Kudo and Richardson, "SentencePiece", 2018; the fields are those of sentencepiece_model.proto.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

SPACE = "▁"
UNIGRAM, BPE = 1, 2  # trainer_spec.model_type
ORDINARY, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # a piece's type; 6: a byte


class Converted(NamedTuple):
    """A tokenizers.Tokenizer, and how its vocabulary calls what a config may leave unsaid."""

    backend: Any
    special_tokens: dict[str, str]


def sentencepiece_tokenizer(path: Path, added: Mapping[int, str], *, is_legacy: bool) -> Converted:
    """The tokenizer of a model file.

    Args:
        added: tokens by their ids, some of which may be other names of the model's pieces, as those
            of InternLM 2.
        is_legacy: what follows a control token gets the space of a text's beginning too.

    Raises:
        ValueError: the file is damaged, or a model of a kind that nothing here computes.
    """
    import tokenizers

    model = _read(path)
    pieces = [piece.piece for piece in model.pieces]
    known = set(pieces)
    names = [_renamed(piece, added.get(id, piece), known) for id, piece in enumerate(pieces)]
    backend = tokenizers.Tokenizer(_model(model, names))
    _set_steps(backend, model, is_legacy)
    _add_tokens(backend, model, names)
    spec = model.trainer_spec
    ids = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id}
    return Converted(backend, {key: names[id] for key, id in ids.items() if id >= 0})


def _read(path: Path) -> Any:
    """The ModelProto in a file."""
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import import_protobuf

    protobuf: Any = import_protobuf()
    model = protobuf.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        model.Clear()
    if not model.pieces:
        raise ValueError("it is no SentencePiece model; copy it again")
    for problem in _problems(model):
        raise ValueError(f"{problem}, which nothing here computes; add a tokenizer.json")
    return model


def _problems(model: Any) -> Iterator[str]:
    """What is in a model that its tokenizer could not do."""
    from tokenizers import normalizers

    kind, normalizer = model.trainer_spec.model_type, model.normalizer_spec
    symbols = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    if kind not in (UNIGRAM, BPE):
        yield f"it is a model of type {kind}, neither Unigram nor BPE"
    if any(piece.type == UNUSED for piece in model.pieces):
        yield "it has unused pieces"
    if model.trainer_spec.treat_whitespace_as_suffix:
        yield "it has spaces at the ends of words"
    if kind == UNIGRAM and any(not text.strip(SPACE) for text in symbols):
        yield "it has symbols of spaces alone"
    if normalizer.precompiled_charsmap:
        normalize = normalizers.Precompiled(normalizer.precompiled_charsmap).normalize_str
        if changed := [text for text in symbols if normalize(text) != text]:
            yield f"it does not normalize the symbol {changed[0]!r}"


def _renamed(piece: str, name: str, known: set[str]) -> str:
    return piece if name in known else name


def _add_tokens(backend: Any, model: Any, names: list[str]) -> None:
    """Has control tokens, and symbols of chats, found in texts before all else."""
    from tokenizers import AddedToken

    for name, piece in zip(names, model.pieces, strict=True):
        is_special = piece.type in (CONTROL, UNKNOWN)
        if is_special or (piece.type == USER_DEFINED and _is_markup(name)):
            backend.add_tokens([AddedToken(name, special=is_special, normalized=False)])


def _is_markup(piece: str) -> bool:
    """Whether a symbol stands between texts, as those of chats; others are parts of text."""
    return piece[0] in "<[" and piece[-1] in ">]"


def _model(model: Any, names: list[str]) -> Any:
    from tokenizers import models

    spec = model.trainer_spec
    if spec.model_type == UNIGRAM:
        best = max(piece.score for piece in model.pieces)
        scores = [
            len(piece.piece) * best - 0.1 if piece.type == USER_DEFINED else piece.score
            for piece in model.pieces
        ]
        vocab = list(zip(names, scores, strict=True))
        return models.Unigram(vocab, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    ids = {name: id for id, name in enumerate(names)}
    return models.BPE(
        vocab=ids,
        merges=_merges(model, ids),
        unk_token=names[spec.unk_id],
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
        ignore_merges=any(piece.type == USER_DEFINED for piece in model.pieces),
    )


def _merges(model: Any, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to make an ordinary piece of two others, those of the best scores first."""
    ordinary = [piece for piece in model.pieces if piece.type == ORDINARY and piece.piece in ids]
    parts = {piece.piece for piece in ordinary}
    found = [
        (-piece.score, ids[left], ids[right], left, right)
        for piece in ordinary
        for left, right in _halves(piece.piece)
        if left in parts and right in parts
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _halves(piece: str) -> Iterator[tuple[str, str]]:
    return ((piece[:i], piece[i:]) for i in range(1, len(piece)))


def _set_steps(backend: Any, model: Any, is_legacy: bool) -> None:
    """Gives the tokenizer what SentencePiece does before and after its model."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    spec = model.normalizer_spec
    before: list[Any] = []
    splits: list[Any] = []
    if spec.precompiled_charsmap:
        before.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        before.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        before.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix and is_legacy:
        before.append(normalizers.Prepend(SPACE))
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    if spec.add_dummy_prefix and not is_legacy:
        splits.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False))
    symbols = [p.piece for p in model.pieces if p.type == USER_DEFINED and not _is_markup(p.piece)]
    if symbols and model.trainer_spec.model_type == BPE:
        pattern = "|".join(map(_pattern, sorted(symbols, key=len, reverse=True)))
        splits.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    if splits:
        backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    after: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        after.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(after)


def _pattern(text: str) -> str:
    """A regular expression for this text alone."""
    return "".join(rf"\x{{{ord(character):x}}}" for character in text)
