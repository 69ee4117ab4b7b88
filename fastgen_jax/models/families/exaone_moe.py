"""K-EXAONE (LG AI Research, 2025): EXAONE 4 with norms before attention and MLP, and DeepSeek-V3's
experts after a few dense layers.
"""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import deepseek_v2, deepseek_v3, exaone4, llama
from fastgen_jax.models.families.qwen3 import QK_NORMS

WEIGHTS = llama.WEIGHTS | QK_NORMS | deepseek_v2.EXPERTS | {
    "model.layers.{}.mlp.e_score_correction_bias": ("layers.{}.mlp.score_bias", "plain"),
}  # fmt: skip
IGNORED = (*llama.IGNORED, "mtp.*")  # what predicts a second token
DEFAULTS = {
    "first_k_dense_replace": 1,
    "n_group": 1,
    "num_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "sliding_window": 4096,
    "topk_group": 1,
}


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    hf = DEFAULTS | hf
    if sparse := hf.get("is_moe_layer"):
        hf = {"mlp_layer_types": ["sparse" if it else "dense" for it in sparse]} | hf
    experts = {"n_routed_experts": hf["num_experts"], "n_shared_experts": hf["num_shared_experts"]}
    return dataclasses.replace(
        exaone4.config(hf),
        family="exaone_moe",
        norm_places=("before",),
        moe=deepseek_v3.mixture(hf | experts),
    )
