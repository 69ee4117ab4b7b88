"""Solar Open (Upstage, 2025): GLM-4.5 that turns whole heads and has experts in every layer."""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import deepseek_v3, glm4_moe, llama
from fastgen_jax.models.hf_config import only

WEIGHTS, IGNORED = llama.WEIGHTS | deepseek_v3.EXPERTS, llama.IGNORED
DEFAULTS = {
    "first_k_dense_replace": 0,
    "head_dim": 128,
    "partial_rotary_factor": 1.0,
    "rope_theta": 1e6,
}


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    only(hf, first_k_dense_replace=0, use_qk_norm=False, partial_rotary_factor=1)
    hf = DEFAULTS | {"intermediate_size": hf["moe_intermediate_size"]} | hf
    return dataclasses.replace(glm4_moe.config(hf), family="solar_open")
