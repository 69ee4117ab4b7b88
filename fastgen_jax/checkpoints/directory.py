"""A model's directory: where it is, and what its JSON files say."""

from pathlib import Path
from typing import Any

from fastgen_jax.checkpoints.tensor_files import read_json
from fastgen_jax.errors import ConfigError
from fastgen_jax.models import families
from fastgen_jax.models.config import ModelConfig

HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "*.jinja"]
ADAPTER = "adapter_config.json"  # of peft


def locate(model: str) -> Path:
    """The directory of a model: a path as it is, a hub id downloaded (with a progress bar) on first
    use.

    Raises:
        ConfigError: neither a directory nor a repository that can be downloaded.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    looks_like_id = model.count("/") <= 1 and not model.startswith((".", "/", "~"))
    if path.exists() or not looks_like_id:
        raise ConfigError(f"no directory {model!r}; give a Hugging Face directory or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES, ignore_patterns="*/*"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"{model!r} is no directory here and could not be downloaded ({first_line}); check the "
            "name, the network, or give the path of a downloaded directory"
        ) from error


def read_config(directory: Path) -> ModelConfig:
    """The ModelConfig of a checkpoint directory."""
    if (directory / ADAPTER).is_file() and not (directory / "config.json").exists():
        base = read_json(directory / ADAPTER).get("base_model_name_or_path")
        raise ConfigError(
            f"{str(directory)!r} holds an adapter ({ADAPTER}), not a model; merge it into its base "
            f"model {base!r} (merge_and_unload of peft) and give what that saves"
        )
    hf = read_json(directory / "config.json")
    if "model_type" not in hf:
        raise ConfigError("config.json has no model_type")
    try:
        return families.family(hf["model_type"]).config(hf)
    except KeyError as error:
        raise ConfigError(f"config.json lacks {error}") from error
    except TypeError as error:
        raise ConfigError(f"config.json has a value of the wrong type: {error}") from error


def read_generation_config(directory: Path) -> dict[str, Any]:
    """generation_config.json, or {} where there is none."""
    path = directory / "generation_config.json"
    return read_json(path) if path.exists() else {}
