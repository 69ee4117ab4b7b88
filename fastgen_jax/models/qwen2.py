"""Qwen2 and Qwen2.5 (Qwen Team, 2024): Llama with biases of queries, keys and values."""

import dataclasses
from typing import Any

from fastgen_jax.config import ModelConfig
from fastgen_jax.models import layer_windows, llama

WEIGHTS, IGNORED = llama.WEIGHTS, llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    hf = {"use_sliding_window": False, "max_window_layers": 28} | hf
    return dataclasses.replace(
        llama.config(hf), family="qwen2", qkv_bias=True, windows=layer_windows(hf)
    )
