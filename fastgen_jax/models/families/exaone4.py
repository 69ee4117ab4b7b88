"""EXAONE 4 (LG AI Research, 2025): norms after attention and MLP and of each head's queries and
keys; where some layers have a window, the others do not turn.
"""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import llama, olmo2
from fastgen_jax.models.hf_config import layer_windows

WEIGHTS, IGNORED = olmo2.WEIGHTS, olmo2.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    hf = {"rms_norm_eps": 1e-5} | hf
    pattern = hf.get("sliding_window_pattern")
    if isinstance(pattern, str) and not hf.get("layer_types"):
        hf |= {"layer_types": _layer_types(pattern, hf["num_hidden_layers"])}
    windows = layer_windows(hf, every=4)
    is_hybrid = bool(hf.get("sliding_window"))
    unrotated = [i for i in range(hf["num_hidden_layers"]) if not (windows and windows[i])]
    return dataclasses.replace(
        llama.config(hf),
        family="exaone4",
        norm_places=("after",),
        qk_norm="head",
        windows=windows,
        unrotated_layers=tuple(unrotated) if is_hybrid else (),
    )


def _layer_types(pattern: str, n_layers: int) -> list[str]:
    """Of "LLLG", repeated: local or global; the last layer is global in any case."""
    kinds = {"L": "sliding_attention", "G": "full_attention"}
    types = [kinds[pattern[i % len(pattern)]] for i in range(n_layers)]
    return [*types[:-1], "full_attention"]
