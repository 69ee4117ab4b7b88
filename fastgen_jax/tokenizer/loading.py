"""From the files of a checkpoint to a tokenizer of transformers. No code of the checkpoint runs."""

import json
import logging
from pathlib import Path
from typing import Any

from fastgen_jax.errors import CheckpointError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def has_tokenizer(path: str) -> bool:
    """False for a directory without tokenizer files; a hub id is taken to have them."""
    directory = Path(path)
    return not directory.is_dir() or any((directory / name).exists() for name in TOKENIZER_FILES)


def load(path: str) -> Any:
    """The tokenizer of a directory or of a cached hub repository. Runs no code from there.

    tokenizer.json is taken as it stands. AutoTokenizer would rebuild it as the class that
    tokenizer_config.json names, and imports more; only older formats need it.
    """
    logging.getLogger("transformers").addFilter(_is_not_about_torch)
    import transformers  # half a second, hence only when there is text to handle
    from huggingface_hub import snapshot_download

    try:
        if not Path(path).is_dir():
            path = snapshot_download(path, local_files_only=True)
        if (Path(path) / "tokenizer.json").exists():
            fast = transformers.PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
            fast._tokenizer = _with_specials_found_first(fast.backend_tokenizer)
        else:
            # Left out, trust_remote_code would have transformers ask a terminal, and obey.
            fast = transformers.AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
        if not fast.is_fast:
            raise ValueError("it has no fast form; convert it to a tokenizer.json")
    except Exception as error:  # tokenizers raises plain Exception at damaged files
        raise CheckpointError(f"cannot load the tokenizer of {path!r}: {error}") from error
    return fast


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
