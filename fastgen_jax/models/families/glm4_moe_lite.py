"""GLM-4.7-Flash (Z.ai, 2026): DeepSeek-V3, latent attention included, with other numbers."""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import deepseek_v3, glm4_moe

WEIGHTS, IGNORED = deepseek_v3.WEIGHTS, deepseek_v3.IGNORED
DEFAULTS = glm4_moe.DEFAULTS | {"partial_rotary_factor": 1.0, "routed_scaling_factor": 1.8}


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    return dataclasses.replace(deepseek_v3.config(DEFAULTS | hf), family="glm4_moe_lite")
