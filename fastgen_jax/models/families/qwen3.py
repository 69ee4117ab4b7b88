"""Qwen3 (Qwen Team, 2025): Qwen2 with norms of each head's queries and keys in place of biases."""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import llama
from fastgen_jax.models.hf_config import layer_windows

QK_NORMS = {
    "model.layers.{}.self_attn.q_norm.weight": ("layers.{}.attention.q_norm.weight", "plain"),
    "model.layers.{}.self_attn.k_norm.weight": ("layers.{}.attention.k_norm.weight", "plain"),
}
WEIGHTS = llama.WEIGHTS | QK_NORMS
IGNORED = llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    hf = {"head_dim": 128, "use_sliding_window": False, "max_window_layers": 28} | hf
    return dataclasses.replace(
        llama.config(hf), family="qwen3", qk_norm="head", windows=layer_windows(hf)
    )
