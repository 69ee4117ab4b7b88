"""From the files of a checkpoint to a tokenizer of transformers. No code of the checkpoint runs."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastgen_jax.checkpoints.tensor_files import read_json
from fastgen_jax.errors import CheckpointError
from fastgen_jax.tokenizer.sentencepiece import sentencepiece_tokenizer

# What a tokenizer is read from, the best first, and what each needs beside it.
FORMATS = {"tokenizer.json": (), "tokenizer.model": (), "vocab.json": ("merges.txt",)}
CONFIG = "tokenizer_config.json"
# Classes that heed add_bos_token and add_eos_token whatever tokenizer.json says, and whether they
# add BOS where only the other one is there. transformers 5 heeds neither beside a tokenizer.json.
HEEDING = {
    "LlamaTokenizer": True,
    "CodeLlamaTokenizer": True,
    "GemmaTokenizer": True,
    "CohereTokenizer": True,
    "GPTNeoXTokenizer": False,
}


def has_tokenizer(path: str) -> bool:
    """False for a directory without tokenizer files; a hub id is taken to have them."""
    directory = Path(path)
    return not directory.is_dir() or any((directory / name).exists() for name in FORMATS)


def tokenizer_file(directory: Path) -> str:
    """The name of the file that the directory's tokenizer is read from; loads nothing.

    Raises:
        CheckpointError: there is none, or not what belongs to it. (transformers makes a tokenizer
            without a vocabulary of tokenizer_config.json alone.)
    """
    for name, others in FORMATS.items():
        if not (directory / name).exists():
            continue
        for other in others:
            if not (directory / other).exists():
                raise CheckpointError(
                    f"{str(directory)!r} has {name} without {other}, and a tokenizer needs both; "
                    f"copy {other} from where the model comes from"
                )
        _check_class(directory, name)
        return name
    _check_class(directory, None)
    raise CheckpointError(
        f"{str(directory)!r} has no tokenizer, which would be in {', or in '.join(FORMATS)}; copy "
        "that from where the model comes from, or name a directory that has it with --tokenizer"
    )


def _check_class(directory: Path, file: str | None) -> None:
    """Raises CheckpointError if only the checkpoint's own code could make its tokenizer.

    Args:
        file: what the tokenizer is read from, if anything.
    """
    own = list(_own_classes(_config(directory)))
    if not own or file in ("tokenizer.json", "tokenizer.model"):
        return
    raise CheckpointError(
        f"the tokenizer of {str(directory)!r} is the class {own[0]} of its own code, and code of "
        "checkpoints never runs here; where you trust it, have transformers save it as a "
        "tokenizer.json (AutoTokenizer.from_pretrained, then save_pretrained), and add that"
    )


def _own_classes(config: dict[str, Any]) -> Iterator[str]:
    """Classes of the checkpoint's code that its tokenizer_config.json names: `file.Class`."""
    auto_map = config.get("auto_map") or {}
    named = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    for name in [named] if isinstance(named, str) else named or ():
        if name:
            yield str(name)


def _config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, or {} where there is none."""
    path = directory / CONFIG
    return read_json(path) if path.exists() else {}


def load(path: str) -> Any:
    """The tokenizer of a directory or of a cached hub repository. Runs no code from there.

    tokenizer.json is taken as it stands. AutoTokenizer would rebuild it as the class that
    tokenizer_config.json names, and imports more; only older formats need it.
    """
    directory = Path(path) if Path(path).is_dir() else _cached(path)
    file = tokenizer_file(directory)
    config = _config(directory)
    logging.getLogger("transformers").addFilter(_is_not_about_torch)
    import transformers  # half a second, hence only when there is text to handle

    # Left out, trust_remote_code would have transformers ask a terminal, and obey.
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        if file == "vocab.json":
            fast = transformers.AutoTokenizer.from_pretrained(directory, **options)
            if not fast.is_fast or len(fast) < len(read_json(directory / file)):
                raise ValueError(f"{type(fast).__name__} does not read it; add a tokenizer.json")
            return fast
        if file == "tokenizer.json":
            fast = transformers.PreTrainedTokenizerFast.from_pretrained(directory, **options)
        else:
            fast = _converted(directory, file, config, options)
        fast._tokenizer = _with_specials_found_first(fast.backend_tokenizer)
        _set_ends(fast, config, file)
    except Exception as error:  # tokenizers raises plain Exception at damaged files
        raise CheckpointError(
            f"cannot load the tokenizer of {str(directory)!r} from {file}: {error}"
        ) from error
    return fast


def _converted(directory: Path, file: str, config: dict[str, Any], options: dict[str, Any]) -> Any:
    """What a file in another format would be as a tokenizer.json.

    Raises:
        ValueError: it cannot be converted, or a token would get another id than the files say.
    """
    from transformers import PreTrainedTokenizerFast

    added = _added_tokens(directory, config)
    is_legacy = config.get("legacy") is not False
    backend, special_tokens = sentencepiece_tokenizer(directory / file, added, is_legacy=is_legacy)
    # Without a vocab_file of its own it would look for one, and convert that.
    fast: Any = PreTrainedTokenizerFast.from_pretrained(
        directory, tokenizer_object=backend, vocab_file="", **options
    )
    for name, text in special_tokens.items():
        if getattr(fast, name) is None:
            setattr(fast, name, text)
    for id, text in added.items():
        if (found := fast.backend_tokenizer.token_to_id(text)) != id:
            raise ValueError(f"token {text!r} has id {id} in {CONFIG}, and gets {found}")
    return fast


def _added_tokens(directory: Path, config: dict[str, Any]) -> dict[int, str]:
    """Tokens beside the vocabulary, by their ids."""
    path = directory / "added_tokens.json"
    listed = config.get("added_tokens_decoder")
    if listed is None:
        return {id: text for text, id in read_json(path).items()} if path.exists() else {}
    return {int(id): token["content"] for id, token in listed.items()}


def _set_ends(fast: Any, config: dict[str, Any], file: str) -> None:
    """Has the tokenizer begin texts with BOS, or end them with EOS, as the class that
    tokenizer_config.json names would. Chats have what their template writes.
    """
    wanted = {name: config.get(name) for name in ("add_bos_token", "add_eos_token")}
    adds_bos = True  # the classes of SentencePiece's files all do
    if file == "tokenizer.json":
        adds_bos = HEEDING.get(str(config.get("tokenizer_class")).removesuffix("Fast"))
        if adds_bos is None or wanted == dict.fromkeys(wanted):
            return
    bos, eos = wanted.values()
    fast.add_bos_token = adds_bos if bos is None else bool(bos)
    fast.add_eos_token = bool(eos)


def _cached(hub_id: str) -> Path:
    """Where the local Hugging Face cache holds a repository."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"cannot load the tokenizer of {hub_id!r}: it is neither a directory nor a repository "
            f"that was downloaded ({str(error).splitlines()[0]})"
        ) from error


def _with_specials_found_first(backend: Any) -> Any:
    """The tokenizer, with special tokens looked for in the text as it is, before normalisation.

    Some files of LLaMA 1 have <s> normalised to ▁<s>: then tokenizers neither finds it inside text
    nor hides it when it decodes.
    """
    normalize = backend.normalizer.normalize_str if backend.normalizer else str
    added = backend.get_added_tokens_decoder().values()
    specials = [token for token in added if token.special and token.normalized]
    if all(normalize(token.content) == token.content for token in specials):
        return backend
    spec = json.loads(backend.to_str())
    for token in spec["added_tokens"]:
        token["normalized"] = token["normalized"] and not token["special"]
    return type(backend).from_str(json.dumps(spec))


def _is_not_about_torch(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()
