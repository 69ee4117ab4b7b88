"""Granite 3 (Granite Team, IBM, 2024): Llama with multipliers in place of fixed scales."""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import llama

WEIGHTS, IGNORED = llama.WEIGHTS, llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    return dataclasses.replace(
        llama.config(hf),
        family="granite",
        embedding_scale=hf.get("embedding_multiplier", 1.0),
        residual_scale=hf.get("residual_multiplier", 1.0),
        attention_scale=hf.get("attention_multiplier", 1.0),
        logits_scale=1 / hf.get("logits_scaling", 1.0),
    )
