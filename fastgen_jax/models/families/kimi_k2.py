"""Kimi K2 (Moonshot AI, 2025): DeepSeek-V3 with more experts, all in one group, and fewer heads."""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import deepseek_v3

WEIGHTS, IGNORED = deepseek_v3.WEIGHTS, deepseek_v3.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    return dataclasses.replace(deepseek_v3.config(hf), family="kimi_k2")
