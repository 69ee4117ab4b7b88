"""GLM-4.5, 4.6 and 4.7 (Z.ai, 2025): Llama that turns half of each head, and perhaps normalises it;
DeepSeek-V3's experts after a few dense layers.
"""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import deepseek_v3, llama
from fastgen_jax.models.families.qwen3 import QK_NORMS

WEIGHTS = llama.WEIGHTS | QK_NORMS | deepseek_v3.EXPERTS
IGNORED = deepseek_v3.IGNORED
DEFAULTS = {
    "first_k_dense_replace": 1,
    "n_group": 1,
    "n_shared_experts": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
}


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    hf = DEFAULTS | hf
    return dataclasses.replace(
        llama.config(hf),
        family="glm4_moe",
        out_bias=False,
        qk_norm="head" if hf.get("use_qk_norm") else None,
        moe=deepseek_v3.mixture(hf),
    )
