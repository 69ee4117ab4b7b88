"""Ministral (Mistral AI, 2024): Mistral in which some layers see everything."""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import llama
from fastgen_jax.models.hf_config import layer_windows

WEIGHTS, IGNORED = llama.WEIGHTS, llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    windows = layer_windows({"sliding_window": 4096} | hf)
    return dataclasses.replace(llama.config(hf), family="ministral", windows=windows)
