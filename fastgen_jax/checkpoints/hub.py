"""The hub: of a repository only those files are downloaded that are read here."""

from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path

from fastgen_jax.checkpoints.tensor_files import weight_names
from fastgen_jax.errors import CheckpointError, ConfigError

CONFIG, ADAPTER = "config.json", "adapter_config.json"  # of a model, of peft
# Configs, tokenizers and chat templates, beside the weights.
TEXTS = ("*.json", "*.jinja", "merges.txt", "vocab.txt")
TEXTS += ("*.model", "tokenizer.model.*", "*.tiktoken")
TEMPLATES = "additional_chat_templates"  # the only folder; others have the weights in other forms


def wanted(files: Collection[str], repository: str, *, with_weights: bool = True) -> list[str]:
    """Which of a repository's files are read.

    Raises:
        CheckpointError: there is no config, or no weights that can be read.
    """
    names = [file for file in files if "/" not in file]
    found = [name for name in names if any(fnmatchcase(name, text) for text in TEXTS)]
    found += [file for file in files if fnmatchcase(file, f"{TEMPLATES}/*.jinja")]
    is_adapter = ADAPTER in names and CONFIG not in names  # who reads the config says what to do
    if with_weights and not is_adapter:
        found += weight_names(names, repository)
        if CONFIG not in names:
            raise CheckpointError(
                f"{CONFIG} is missing in {repository!r}; is this the repository of a Hugging Face "
                "model?"
            )
    return found


def download(repository: str, revision: str | None, *, with_weights: bool) -> Path:
    """The directory of a repository in the hub's cache, complete; as it is if nobody answers.

    Raises:
        ConfigError: it cannot be downloaded.
        CheckpointError: there is nothing that can be read.
    """
    from huggingface_hub.errors import GatedRepoError, HFValidationError
    from huggingface_hub.utils import httpx

    try:
        return _download(repository, revision, with_weights)
    except GatedRepoError as error:
        raise ConfigError(
            f"{repository!r} is gated on the hub; ask for access on its page, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from error
    except (httpx.HTTPError, HFValidationError, OSError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"{repository!r} is no directory here and could not be downloaded ({first_line}); "
            "check the name, the revision, the network, or give the path of a downloaded directory"
        ) from error


def _download(repository: str, revision: str | None, with_weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import httpx

    try:
        siblings = HfApi().model_info(repository, revision=revision).siblings or ()
    except (httpx.HTTPError, OSError) as error:
        try:  # nothing is demanded of what is there: who reads it says what is missing
            return Path(
                snapshot_download(
                    repository, revision=revision, local_files_only=True, allow_patterns=[]
                )
            )
        except LocalEntryNotFoundError:
            raise error from None
    files = [sibling.rfilename for sibling in siblings]
    names = wanted(files, repository, with_weights=with_weights)
    return Path(snapshot_download(repository, revision=revision, allow_patterns=names))
