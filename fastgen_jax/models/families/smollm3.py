"""SmolLM3 (Hugging Face, 2025): Llama with some layers that do not rotate queries and keys."""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import llama
from fastgen_jax.models.hf_config import layer_windows

WEIGHTS, IGNORED = llama.WEIGHTS, llama.IGNORED
FULL, LOCAL = "full_attention", "sliding_attention"


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    hf = {"tie_word_embeddings": True, "rope_theta": 2e6, "use_sliding_window": False} | hf
    layers = range(hf["num_hidden_layers"])
    interval = hf.get("no_rope_layer_interval", 4)
    # 1 for a layer that does rotate, whatever the field's name suggests.
    rotates = hf.get("no_rope_layers") or [(i + 1) % interval for i in layers]
    if not hf.get("layer_types"):
        hf |= {"layer_types": [FULL if rotates[i] else LOCAL for i in layers]}
    return dataclasses.replace(
        llama.config(hf),
        family="smollm3",
        unrotated_layers=tuple(i for i in layers if not rotates[i]),
        windows=layer_windows(hf),
    )
