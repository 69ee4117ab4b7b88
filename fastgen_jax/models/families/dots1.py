"""dots.llm1 (rednote, 2025): Qwen3 with experts of DeepSeek-V3 after a few dense layers."""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import deepseek_v3, llama
from fastgen_jax.models.families.qwen3 import QK_NORMS
from fastgen_jax.models.hf_config import layer_windows

WEIGHTS = llama.WEIGHTS | QK_NORMS | deepseek_v3.EXPERTS
IGNORED = llama.IGNORED
DEFAULTS = {
    "first_k_dense_replace": 0,
    "max_window_layers": 62,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "sliding_window": 4096,
}


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    hf = DEFAULTS | hf
    groups = {name: hf.get(name) or 1 for name in ("n_group", "topk_group")}
    return dataclasses.replace(
        llama.config(hf),
        family="dots1",
        qk_norm="head",
        windows=layer_windows(hf),
        moe=deepseek_v3.mixture(hf | groups),
    )
