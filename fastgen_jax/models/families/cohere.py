"""Command R (Cohere, 2024): attention and MLP side by side after one layer norm without bias, and
rotary pairs that are neighbours.
"""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import llama
from fastgen_jax.models.families.qwen3 import QK_NORMS
from fastgen_jax.models.hf_config import hf_rope

WEIGHTS = llama.WEIGHTS | QK_NORMS
del WEIGHTS["model.layers.{}.post_attention_layernorm.weight"]
IGNORED = llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    hf = {"tie_word_embeddings": True} | hf
    return dataclasses.replace(
        llama.config(hf),
        family="cohere",
        max_position=hf.get("model_max_length") or hf.get("max_position_embeddings", 8192),
        residual="parallel",
        shared_norm=True,
        norm="layer",
        norm_bias=False,
        norm_eps=hf.get("layer_norm_eps", 1e-5),
        rope=hf_rope(hf, interleaved=True),
        qk_norm="each_head" if hf.get("use_qk_norm") else None,
        logits_scale=hf.get("logit_scale", 0.0625),
    )
