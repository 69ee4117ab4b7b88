"""Gemma 2 (Gemma Team, 2024): Gemma with norms before and after, soft caps, and a sliding window in
every other layer.
"""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import gemma, llama
from fastgen_jax.models.hf_config import layer_windows

NORM = "model.layers.{}"
WEIGHTS = llama.WEIGHTS | {
    f"{NORM}.post_attention_layernorm.weight": ("layers.{}.attention_out_norm.weight", "plain"),
    f"{NORM}.pre_feedforward_layernorm.weight": ("layers.{}.mlp_norm.weight", "plain"),
    f"{NORM}.post_feedforward_layernorm.weight": ("layers.{}.mlp_out_norm.weight", "plain"),
}
IGNORED = llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    return dataclasses.replace(
        gemma.config(hf),
        family="gemma2",
        norm_places=("before", "after"),
        windows=layer_windows({"sliding_window": 4096} | hf, every=2),
        attention_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_soft_cap=hf.get("attn_logit_softcapping", 50.0),
        logits_soft_cap=hf.get("final_logit_softcapping", 30.0),
    )
