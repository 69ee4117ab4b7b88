"""Text of Qwen3-VL-MoE (Qwen Team, 2025): Qwen3-MoE with a layer's experts in one tensor."""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import qwen3_moe
from fastgen_jax.models.hf_config import without

EXPERTS = "model.layers.{}.mlp.experts"
EITHER = "experts|plain"  # (E, in, out), as the hub has it, or (E, out, in)
WEIGHTS = without(qwen3_moe.WEIGHTS, EXPERTS) | {
    f"{EXPERTS}.gate_up_proj": ("layers.{}.mlp.gate_up", EITHER),
    f"{EXPERTS}.down_proj": ("layers.{}.mlp.down", EITHER),
}
IGNORED = qwen3_moe.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    hf = hf | {"norm_topk_prob": True, "use_sliding_window": False}  # it knows neither
    return dataclasses.replace(qwen3_moe.config(hf), family="qwen3_vl_moe_text")
