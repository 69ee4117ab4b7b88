"""Gemma 3 (Gemma Team, 2025): Gemma 2 with norms of queries and keys in place of soft caps, and
another rotary base in layers with a window. Of checkpoints that also see, the text part.
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
OUTER = ("bos_token_id", "eos_token_id", "tie_word_embeddings")  # of a config with a text_config
WEIGHTS = gemma2.WEIGHTS | QK_NORMS
IGNORED = (*gemma2.IGNORED, "vision_tower.*", "multi_modal_projector.*")


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json, or of the text_config in it."""
    text = DEFAULTS | hf.get("text_config", hf)
    text |= {name: hf[name] for name in OUTER if name in hf}
    rope, local_rope = _ropes(text)
    return dataclasses.replace(
        gemma2.config(text | {"rope_parameters": None, "rope_scaling": None}),
        family=hf["model_type"],
        rope=rope,
        local_rope=local_rope,
        windows=layer_windows(text, every=6),
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
