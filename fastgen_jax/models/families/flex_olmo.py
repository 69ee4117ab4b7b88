"""FlexOlmo (Shi et al., 2025): OLMo 2 with experts."""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig, MoeConfig
from fastgen_jax.models.families import olmo2, qwen2_moe

WEIGHTS, IGNORED = olmo2.WEIGHTS | qwen2_moe.EXPERTS, olmo2.IGNORED
DEFAULTS = {"norm_topk_prob": False, "rms_norm_eps": 1e-6, "rope_theta": 5e5}


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    hf = DEFAULTS | hf
    moe = MoeConfig(
        n_experts=hf["num_experts"],
        n_chosen=hf["num_experts_per_tok"],
        ffn_size=hf["intermediate_size"],
        layers=tuple(range(hf["num_hidden_layers"])),
        normalise=hf["norm_topk_prob"],
    )
    return dataclasses.replace(olmo2.config(hf), family="flex_olmo", moe=moe)
