"""Gemma 3 (Gemma Team, 2025): Gemma 2 with norms of queries and keys in place of soft caps, and
another rotary base in layers with a window.
"""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig, RopeConfig
from fastgen_jax.models.families import gemma2
from fastgen_jax.models.families.qwen3 import QK_NORMS
from fastgen_jax.models.hf_config import hf_rope, layer_windows, rope_by_window

# What the hub's text_configs leave out.
DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4
WEIGHTS = gemma2.WEIGHTS | QK_NORMS
IGNORED = gemma2.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    hf = DEFAULTS | hf
    rope, local_rope = _ropes(hf)
    return dataclasses.replace(
        gemma2.config(hf | {"rope_parameters": None, "rope_scaling": None}),
        family="gemma3_text",
        rope=rope,
        local_rope=local_rope,
        windows=layer_windows(hf, every=6),
        qk_norm="head",
    )


def _ropes(hf: dict[str, Any]) -> tuple[RopeConfig, RopeConfig]:
    """Of layers that see everything and of those with a window; max_position_embeddings counts the
    stretched positions.
    """
    stretched = hf["max_position_embeddings"]
    theta, local_theta = hf.get("rope_theta", GLOBAL_THETA), hf.get("rope_local_base_freq")
    whole, local = rope_by_window(hf, theta, local_theta or LOCAL_THETA)
    original = int(stretched / whole.get("factor", 1))
    return (
        hf_rope({"original_max_position_embeddings": original, "rope_parameters": whole}),
        hf_rope({"max_position_embeddings": stretched, "rope_parameters": local}),
    )
