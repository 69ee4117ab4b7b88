"""Qwen3-MoE (Qwen Team, 2025): Qwen3 with experts."""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import llama, qwen2_moe

WEIGHTS = llama.WEIGHTS | qwen2_moe.EXPERTS | {
    "model.layers.{}.self_attn.q_norm.weight": ("layers.{}.attention.q_norm.weight", "plain"),
    "model.layers.{}.self_attn.k_norm.weight": ("layers.{}.attention.k_norm.weight", "plain"),
}  # fmt: skip
IGNORED = llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    return dataclasses.replace(
        llama.config(hf),
        family="qwen3_moe",
        qk_norm="head",
        windows=(window,) * hf["num_hidden_layers"] if window else (),
        moe=qwen2_moe.mixture(hf),
    )
