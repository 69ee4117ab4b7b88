"""MiniMax-M2 (MiniMax, 2025): Mixtral's names, queries and keys normalised over all heads, of which
half turns, and DeepSeek-V3's scores of experts.
"""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import llama, mixtral
from fastgen_jax.models.families.qwen3 import QK_NORMS
from fastgen_jax.models.hf_config import only

MOE = "model.layers.{}.block_sparse_moe"
WEIGHTS = mixtral.WEIGHTS | QK_NORMS | {
    f"{MOE}.e_score_correction_bias": ("layers.{}.mlp.score_bias", "plain"),
}  # fmt: skip
IGNORED = llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    hf = {"head_dim": 128, "rope_theta": 5e6} | hf
    only(hf, scoring_func="sigmoid", use_routing_bias=True, shared_intermediate_size=0)
    only(hf, use_qk_norm=True, qk_norm_type="per_layer", attention_bias=False)
    only(hf, attn_type_list=[1] * hf["num_hidden_layers"])  # 0: linear attention
    if hf.get("rotary_dim"):
        hf = {"partial_rotary_factor": hf["rotary_dim"] / hf["head_dim"]} | hf
    experts = dataclasses.replace(mixtral.mixture(hf), scores="sigmoid", score_bias=True)
    return dataclasses.replace(llama.config(hf), family="minimax_m2", qk_norm="all", moe=experts)
