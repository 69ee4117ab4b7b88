"""OLMoE (Muennighoff et al., 2024): Llama with experts, queries and keys normalised over all
heads.
"""

import dataclasses
from typing import Any

from fastgen_jax.errors import ConfigError
from fastgen_jax.models.config import ModelConfig, MoeConfig
from fastgen_jax.models.families import llama, qwen3_moe

WEIGHTS, IGNORED = qwen3_moe.WEIGHTS, llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    if hf.get("clip_qkv") is not None:
        raise ConfigError("olmoe: clip_qkv is not supported")
    hf = {"rms_norm_eps": 1e-5} | hf
    return dataclasses.replace(llama.config(hf), family="olmoe", qk_norm="all", moe=mixture(hf))


def mixture(hf: dict[str, Any]) -> MoeConfig:
    """Experts in every layer, as large as a dense MLP."""
    return MoeConfig(
        n_experts=hf["num_experts"],
        n_chosen=hf["num_experts_per_tok"],
        ffn_size=hf["intermediate_size"],
        layers=tuple(range(hf["num_hidden_layers"])),
        normalise=hf.get("norm_topk_prob", False),
    )
