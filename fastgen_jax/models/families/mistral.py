"""Mistral (Jiang et al., 2023): Llama with a sliding window."""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import llama

WEIGHTS, IGNORED = llama.WEIGHTS, llama.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    window = hf.get("sliding_window", 4096)  # null: none
    windows = (window,) * hf["num_hidden_layers"] if window else ()
    return dataclasses.replace(llama.config(hf), family="mistral", windows=windows)
