"""FlexOlmo (Shi et al., 2025): OLMo 2 with experts."""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import olmo2, olmoe, qwen2_moe

WEIGHTS, IGNORED = olmo2.WEIGHTS | qwen2_moe.EXPERTS, olmo2.IGNORED
DEFAULTS = {"norm_topk_prob": False, "rms_norm_eps": 1e-6, "rope_theta": 5e5}


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    hf = DEFAULTS | hf
    return dataclasses.replace(olmo2.config(hf), family="flex_olmo", moe=olmoe.mixture(hf))
