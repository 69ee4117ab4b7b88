"""GLM-4-0414 and GLM-Z1 (GLM Team, 2025): GLM-4 with norms before and after attention and MLP."""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import glm

LAYER = "model.layers.{}"
WEIGHTS = glm.WEIGHTS | {
    f"{LAYER}.post_self_attn_layernorm.weight": ("layers.{}.attention_out_norm.weight", "plain"),
    f"{LAYER}.post_mlp_layernorm.weight": ("layers.{}.mlp_out_norm.weight", "plain"),
}
IGNORED = glm.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    return dataclasses.replace(glm.config(hf), family="glm4", norm_places=("before", "after"))
