"""What several families say in the same way: reading a config.json, and tables of tensors."""

import math
from typing import Any

from fastgen_jax.errors import ConfigError
from fastgen_jax.models.config import RopeConfig

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
    "short_mscale": "short_mscale",
    "long_mscale": "long_mscale",
}


def hf_rope(hf: dict[str, Any], *, interleaved: bool = False) -> RopeConfig:
    """Rotary parameters of a config.json, from `rope_parameters` (transformers 5) or `rope_scaling`
    and `rope_theta`.

    Raises:
        ConfigError: an unknown rope type, or one that lacks what it needs.
    """
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    kind = {"su": "longrope", "mrope": "default"}.get(kind, kind)  # its first name; see wrappers
    fields = {ours: rope[name] for name, ours in _ROPE_NAMES.items() if rope.get(name) is not None}
    longest = hf.get("max_position_embeddings", 2048)
    original = hf.get("original_max_position_embeddings") or longest
    if kind == "longrope":
        fields.setdefault("original_max_position", original)
        fields.setdefault("factor", max(longest / fields["original_max_position"], 1.0))
        fields |= {name: tuple(rope.get(name) or ()) for name in ("short_factor", "long_factor")}
    elif kind != "default":
        fields.setdefault("original_max_position", original)
        if "factor" not in fields:
            raise ConfigError(f"rope type {kind!r} needs a 'factor' in config.json")
    partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial not in (None, 1):
        head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
        fields["size"] = int(head_dim * partial)
    theta = rope.get("rope_theta") or hf.get("rope_theta") or 10000.0
    return RopeConfig(kind=kind, theta=float(theta), interleaved=interleaved, **fields)


def rope_by_window(
    hf: dict[str, Any], theta: float, local_theta: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `rope_parameters` of layers that see everything and of those with a window.

    transformers 5 has them by layer type; before, `rope_scaling` was for the former alone.

    theta, local_theta: of those that say none.
    """
    by_type = hf.get("rope_parameters") or {"full_attention": hf.get("rope_scaling")}
    return (
        {"rope_theta": theta} | (by_type.get("full_attention") or {}),
        {"rope_theta": local_theta} | (by_type.get("sliding_attention") or {}),
    )


def layer_windows(hf: dict[str, Any], every: int | None = None) -> tuple[int | None, ...]:
    """Each layer's sliding window, from `layer_types` or, before transformers 5, from
    `sliding_window_pattern` (every so many layers one sees everything) or `max_window_layers` (the
    first ones see everything).

    every: the pattern if the config has none.
    """
    window, n_layers = hf.get("sliding_window"), hf["num_hidden_layers"]
    if not window or not hf.get("use_sliding_window", True):
        return ()
    if kinds := hf.get("layer_types"):
        if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
            raise ConfigError(f"layer types {sorted(unknown)} are not supported")
        is_local = [kind == "sliding_attention" for kind in kinds]
    elif every := hf.get("sliding_window_pattern", every):
        is_local = [(i + 1) % every > 0 for i in range(n_layers)]
    else:
        is_local = [i >= hf.get("max_window_layers", 0) for i in range(n_layers)]
    return tuple(window if local else None for local in is_local) if any(is_local) else ()


def field(hf: dict[str, Any], *names: str) -> Any:
    """A field that goes by several names; KeyError names the first."""
    for name in names:
        if hf.get(name) is not None:
            return hf[name]
    raise KeyError(names[0])


def only(hf: dict[str, Any], **values: Any) -> None:
    """Raises ConfigError for a field that is there with another value than the supported one."""
    for name, value in values.items():
        if hf.get(name) not in (None, value):
            raise ConfigError(
                f"a model with {name}={hf[name]!r} in config.json is not supported, only {value!r}"
            )


def alibi_slopes(n_heads: int, max_bias: float = 8.0) -> tuple[float, ...]:
    """Of each head (Press et al., 2022): geometric. A number of heads that is no power of two takes
    every other slope of the next power of two, then those between.
    """
    n = 2 ** math.ceil(math.log2(n_heads))
    slopes = [2 ** (-max_bias * i / n) for i in range(1, n + 1)]
    return tuple(slopes if n == n_heads else (slopes[1::2] + slopes[::2])[:n_heads])


def activation(name: str) -> str:
    """Our name of a Hugging Face activation."""
    names = {
        **dict.fromkeys(("silu", "swish"), "silu"),
        **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh"),
        **{"gelu": "gelu", "relu": "relu", "relu2": "relu2"},
    }
    if name not in names:
        raise ConfigError(f"activation {name!r} is not supported; known: {', '.join(names)}")
    return names[name]


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """A config's token id field, which may hold none, one or several."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def without(weights: dict[str, tuple[str, str]], *words: str) -> dict[str, tuple[str, str]]:
    """The entries of a table like WEIGHTS whose names have none of the words."""
    return {
        name: entry for name, entry in weights.items() if not any(word in name for word in words)
    }
