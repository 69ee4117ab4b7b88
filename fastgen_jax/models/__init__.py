"""Model families: FAMILIES maps a Hugging Face model_type to the module that knows it.

A family module offers `config(hf) -> ModelConfig`, `Model` (an NNX module), `WEIGHTS` and
`IGNORED`.
"""

import importlib
from types import ModuleType
from typing import Any

from fastgen_jax.config import RopeConfig
from fastgen_jax.errors import ConfigError

FAMILIES = {"llama": "llama"}
_ROPE_NAMES = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_position",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
}


def family(model_type: str) -> ModuleType:
    """The module of a Hugging Face model_type; ConfigError names the known ones."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"model type {model_type!r} is not supported; known: {known}")
    return importlib.import_module(f"fastgen_jax.models.{FAMILIES[model_type]}")


def hf_rope(hf: dict[str, Any]) -> RopeConfig:
    """Rotary parameters of a config.json, from `rope_parameters` (transformers 5) or `rope_scaling`
    and `rope_theta`.

    Raises:
        ConfigError: an unknown rope type, or one that lacks what it needs.
    """
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    fields = {ours: rope[name] for name, ours in _ROPE_NAMES.items() if rope.get(name) is not None}
    original = hf.get("original_max_position_embeddings") or hf.get("max_position_embeddings", 2048)
    if kind != "default":
        fields.setdefault("original_max_position", original)
        if "factor" not in fields:
            raise ConfigError(f"rope type {kind!r} needs a 'factor' in config.json")
    theta = rope.get("rope_theta") or hf.get("rope_theta") or 10000.0
    return RopeConfig(kind=kind, theta=float(theta), **fields)


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """A config's token id field, which may hold none, one or several."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
