"""A model's directory: where it is, and what its JSON files say."""

import os
from pathlib import Path
from typing import Any

import fastgen_jax.models.families as families
from fastgen_jax.checkpoints import hub
from fastgen_jax.checkpoints.overrides import Overrides, overridden
from fastgen_jax.checkpoints.quantisation import BESIDE, settings
from fastgen_jax.checkpoints.tensor_files import read_json
from fastgen_jax.errors import ConfigError
from fastgen_jax.models.config import ModelConfig

EOS = "eos_token_id"


def locate(model: str, *, revision: str | None = None, with_weights: bool = True) -> Path:
    """The directory of a model: a path as it is, a hub id downloaded (with a progress bar) on first
    use.

    Args:
        revision: branch, tag or commit of the hub's repository; None for its main branch.
        with_weights: False where only config or tokenizer are read.

    Raises:
        ConfigError: neither a directory nor a repository that can be downloaded.
        CheckpointError: a repository without weights that can be read.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ConfigError(
                f"revision={revision!r} is for hub ids, and {model!r} is a directory; leave it out"
            )
        return path
    looks_like_id = model.count("/") <= 1 and not model.startswith((".", "/", "~"))
    if path.exists() or not looks_like_id:
        raise ConfigError(f"no directory {model!r}; give a Hugging Face directory or a hub id")
    return hub.download(model, revision, with_weights=with_weights)


def locate_tokenizer(
    model: str,
    tokenizer: str | None = None,
    *,
    revision: str | None = None,
    overrides: Overrides = None,
) -> Path:
    """Where the tokenizer's files are: the model's, unless it has its own. The model's config.json
    is read first, so that what is not supported is told before anything large is downloaded.
    """
    directory = locate(model, revision=revision, with_weights=False)
    read_config(directory, overrides)
    return directory if tokenizer is None else locate(tokenizer, with_weights=False)


def read_hf(directory: Path, overrides: Overrides = None) -> dict[str, Any]:
    """config.json, as everything here is to see it: with what a file beside it says of
    quantisation.

    Args:
        overrides: what a user changes of it.
    """
    hf, beside = read_json(directory / "config.json"), directory / BESIDE
    if not settings(hf) and beside.exists():
        hf["quantization_config"] = read_json(beside)
    return overridden(hf, overrides)


def read_config(directory: Path, overrides: Overrides = None) -> ModelConfig:
    """The ModelConfig of a checkpoint directory."""
    if (directory / hub.ADAPTER).is_file() and not (directory / "config.json").exists():
        base = read_json(directory / hub.ADAPTER).get("base_model_name_or_path")
        raise ConfigError(
            f"{str(directory)!r} holds an adapter ({hub.ADAPTER}), not a model; merge it into its "
            f"base model {base!r} (merge_and_unload of peft) and give what that saves"
        )
    return as_config(read_hf(directory, overrides))


def as_config(given: ModelConfig | dict[str, Any] | str | os.PathLike[str]) -> ModelConfig:
    """A ModelConfig as it is, of what a config.json says, or of a directory that has one."""
    if isinstance(given, ModelConfig):
        return given
    if isinstance(given, str | os.PathLike):
        return read_config(locate(os.fspath(given), with_weights=False))
    hf = given
    if "model_type" not in hf:
        raise ConfigError("config.json has no model_type")
    try:
        return families.model_config(hf)
    except KeyError as error:
        raise ConfigError(f"config.json lacks {error}") from error
    except TypeError as error:
        raise ConfigError(f"config.json has a value of the wrong type: {error}") from error


def read_generation_config(directory: Path, overrides: Overrides = None) -> dict[str, Any]:
    """generation_config.json, or {} where there is none; without the end of sequence that a user
    changes in config.json, for that one is to count.
    """
    path = directory / "generation_config.json"
    found = read_json(path) if path.exists() else {}
    if EOS in (overrides or {}):
        found.pop(EOS, None)
    return found
