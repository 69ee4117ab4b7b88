"""Nemotron 4 and Minitron (NVIDIA, 2024): Llama with layer norms around one and an MLP without gate
and squared ReLU; the first half of a head turns.
"""

import dataclasses
from typing import Any

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.families import arcee, llama
from fastgen_jax.models.hf_config import hf_rope, without

WEIGHTS = without(arcee.WEIGHTS, "norm") | llama.LAYER_NORMS
IGNORED = arcee.IGNORED


def config(hf: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json."""
    return dataclasses.replace(
        arcee.config(hf),
        family="nemotron",
        norm="layer",
        norm_eps=hf.get("norm_eps", 1e-5),
        norm_offset=1.0,
        rope=hf_rope({"partial_rotary_factor": 0.5} | hf),
    )
