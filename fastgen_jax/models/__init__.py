"""Model families: FAMILIES maps a Hugging Face model_type to the module that knows it.

A family module offers `config(hf) -> ModelConfig`, `WEIGHTS` and `IGNORED`; the module that they
describe is decoder.Model.
"""

import importlib
from types import ModuleType
from typing import Any

from fastgen_jax.config import RopeConfig
from fastgen_jax.errors import ConfigError

FAMILIES = {  # model_type -> module
    "llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "qwen2": "qwen2",
}
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


def layer_windows(hf: dict[str, Any]) -> tuple[int | None, ...]:
    """Each layer's sliding window, from `layer_types` or, before transformers 5, from
    `use_sliding_window` and `max_window_layers` (the first ones see everything).
    """
    window, n_layers = hf.get("sliding_window"), hf["num_hidden_layers"]
    if not window:
        return ()
    if kinds := hf.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if not hf.get("use_sliding_window", True):
        return ()
    n_full = hf.get("max_window_layers", 0)
    return tuple(window if i >= n_full else None for i in range(n_layers))


def activation(name: str) -> str:
    """Our name of a Hugging Face activation."""
    names = {
        **dict.fromkeys(("silu", "swish"), "silu"),
        **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh"),
        **{"gelu": "gelu", "relu": "relu"},
    }
    if name not in names:
        raise ConfigError(f"activation {name!r} is not supported; known: {', '.join(names)}")
    return names[name]


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """A config's token id field, which may hold none, one or several."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
