"""From the files of a checkpoint to a tokenizer of transformers. No code of the checkpoint runs."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastgen_jax.checkpoints.tensor_files import read_json
from fastgen_jax.errors import CheckpointError
from fastgen_jax.tokenizer.ranks import tekken_tokenizer, tiktoken_tokenizer
from fastgen_jax.tokenizer.sentencepiece import sentencepiece_tokenizer

CONFIG = "tokenizer_config.json"
# What a tokenizer is read from, the best first, and what each needs beside it.
FORMATS = {
    "tokenizer.json": (),
    "tekken.json": (),
    "tokenizer.model": (),
    "vocab.json": ("merges.txt",),
    "qwen.tiktoken": (CONFIG,),
    "tiktoken.model": (CONFIG,),
}
ENDS = ("add_bos_token", "add_eos_token")
# Classes that heed ENDS whatever tokenizer.json says, and whether they add BOS where only the other
# one is there. transformers 5 heeds neither beside a tokenizer.json.
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
    name = next((name for name in FORMATS if (directory / name).exists()), None)
    for other in FORMATS.get(name or "", ()):
        if not (directory / other).exists():
            raise CheckpointError(
                f"{str(directory)!r} has {name} without {other}, and a tokenizer needs both; "
                f"copy {other} from where the model comes from"
            )
    if name in (None, "vocab.json"):
        _check_class(directory)
    if name is None:
        raise CheckpointError(
            f"{str(directory)!r} has no tokenizer, which would be in {', or in '.join(FORMATS)}; "
            "copy that from where the model comes from, or name a directory that has it with "
            "--tokenizer"
        )
    return name


def _check_class(directory: Path) -> None:
    """Raises CheckpointError if only the checkpoint's own code could make its tokenizer."""
    own = list(_own_classes(_config(directory)))
    if own:
        raise CheckpointError(
            f"the tokenizer of {str(directory)!r} is the class {own[0]} of its own code, and code "
            "of checkpoints never runs here; add a tokenizer.json, as converted copies have it"
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
            fast._tokenizer = _with_specials_found_first(fast.backend_tokenizer)
            adds_bos = HEEDING.get(str(config.get("tokenizer_class")).removesuffix("Fast"))
            if adds_bos is not None and any(config.get(name) is not None for name in ENDS):
                _set_ends(fast, config, adds_bos)
        else:
            fast = _converted(directory, file, config, options)
            _set_ends(fast, config, adds_bos=not file.startswith(("qwen", "tiktoken")))
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
    if file == "tokenizer.model":
        is_legacy = config.get("legacy") is not False
        backend, named = sentencepiece_tokenizer(directory / file, added, is_legacy=is_legacy)
    elif file == "tekken.json":
        backend = tekken_tokenizer(directory / file)
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    else:
        name = str(config.get("tokenizer_class"))
        backend, eos = tiktoken_tokenizer(directory / file, name, added)
        named = {"eos_token": eos} if eos else {}
    # Without a vocab_file of its own it would look for one, and convert that.
    fast: Any = PreTrainedTokenizerFast.from_pretrained(
        directory, tokenizer_object=backend, vocab_file="", **options
    )
    for name, text in named.items():
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


def _set_ends(fast: Any, config: dict[str, Any], adds_bos: bool) -> None:
    """Has the tokenizer begin texts with BOS, or end them with EOS, as tokenizer_config.json says.
    Chats have what their template writes.

    Args:
        adds_bos: where it does not say.
    """
    bos, eos = (config.get(name) for name in ENDS)
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
